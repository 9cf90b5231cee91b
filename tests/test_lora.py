"""Adapters: no change at the start, only the chosen parameters, to a file and back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kit.adapters.files import AdapterInfo, load_adapter, write_adapter
from kit.adapters.lora import Lora, apply_adapter, trained_parameters
from kit.batch import Batch
from kit.draws import draw_normal
from kit.errors import InputError
from kit.models.wan import Wan
from kit.models.wan_base import WanBase

TINY_BASE = Path(__file__).parents[1] / "data" / "tiny_base"
MakeWan = Callable[[], Wan]
INFO = AdapterInfo("ann", "wan", 4, 8.0, ("attention", "ffn"), ("audio",), 7, "seed: 0\n")


def velocity(denoiser: Wan, batch: Batch) -> Tensor:
    # Torch multiplies in another order where a weight asks for a gradient, even without one.
    denoiser.requires_grad_(False)
    with torch.no_grad():
        sigma = torch.full((len(batch.keys),), 0.7)
        predicted: Tensor = denoiser(batch.latents, sigma, batch.conditions)
    return predicted


def train_at_random(denoiser: Wan) -> dict[str, Tensor]:
    """Move all that trains, and give it as an adapter file holds it."""
    trained = trained_parameters(denoiser)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.add_(0.05 * draw_normal(tuple(parameter.shape), name))
    return {name: parameter.detach() for name, parameter in trained.items()}


@pytest.mark.parametrize("parts", [("attention", "ffn", "audio"), ("audio",)])
def test_fresh_factors_change_nothing(
    tiny_denoiser: MakeWan, batch: Batch, parts: tuple[str, ...]
) -> None:
    denoiser = tiny_denoiser()
    before = velocity(denoiser, batch)
    Lora(rank=4, parts=parts, train_fully=[]).inject(denoiser, seed=0)  # type: ignore[arg-type]
    assert torch.equal(velocity(denoiser, batch), before)


@pytest.mark.parametrize("part", ["attention", "ffn", "audio"])
def test_factors_sit_on_the_layers_of_their_part(tiny_denoiser: MakeWan, part: str) -> None:
    denoiser = tiny_denoiser()
    layers = denoiser.parts()[part]
    Lora(rank=4, parts=[part]).inject(denoiser, seed=0)  # type: ignore[list-item]
    trained = trained_parameters(denoiser)
    assert set(trained) == {f"{n}.lora_{f}.weight" for n in layers for f in "AB"}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.shape[0] for name, p in trained.items() if ".lora_A." in name} == {4}


def test_parts_that_train_fully(tiny_denoiser: MakeWan, batch: Batch) -> None:
    denoiser = tiny_denoiser()
    before = velocity(denoiser, batch)
    Lora(parts=[], train_fully=["audio"]).inject(denoiser, seed=0)
    trained = trained_parameters(denoiser)
    audio = {n for n, _ in denoiser.named_parameters() if "audio_" in n or "norm_x" in n}
    assert set(trained) == audio
    assert torch.equal(velocity(denoiser, batch), before)


def test_what_trains_is_float32_in_a_bfloat16_base() -> None:
    base = WanBase(path=str(TINY_BASE), random_weights=0, dtype="bfloat16")
    denoiser = base.load_denoiser(torch.device("cpu"))
    Lora(rank=2, parts=["attention"], train_fully=["audio"]).inject(denoiser, seed=0)
    trained = trained_parameters(denoiser)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    frozen = [p for p in denoiser.parameters() if not p.requires_grad]
    assert torch.bfloat16 in {parameter.dtype for parameter in frozen}


def test_seeds_decide_fresh_factors(tiny_denoiser: MakeWan) -> None:
    def factors(seed: int) -> dict[str, Tensor]:
        torch.rand(1)  # Torch's own generator must not count.
        denoiser = tiny_denoiser()
        Lora(rank=4).inject(denoiser, seed)
        return {name: value.detach() for name, value in trained_parameters(denoiser).items()}

    first, again, other = factors(0), factors(0), factors(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[n], other[n]) for n in first if ".lora_A." in n)


def test_gradients_reach_all_that_trains(tiny_denoiser: MakeWan, batch: Batch) -> None:
    denoiser = tiny_denoiser()
    Lora(rank=4, parts=["attention", "ffn"], train_fully=["audio"]).inject(denoiser, seed=0)
    train_at_random(denoiser)
    denoiser(batch.latents, torch.full((3,), 0.7), batch.conditions).square().mean().backward()
    for name, parameter in denoiser.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert all(p.grad is not None and p.grad.any() for p in trained_parameters(denoiser).values())


def test_to_a_file_and_back(tiny_denoiser: MakeWan, batch: Batch, tmp_path: Path) -> None:
    denoiser, path = tiny_denoiser(), tmp_path / "adapter.safetensors"
    before = velocity(denoiser, batch)
    lora = Lora(rank=4, alpha=8.0, parts=["attention", "ffn"], train_fully=["audio"])
    lora.inject(denoiser, seed=0)
    write_adapter(path, train_at_random(denoiser), INFO)
    after = velocity(denoiser, batch)
    assert not torch.allclose(after, before, atol=1e-2)

    tensors, info = load_adapter(path)
    assert info == INFO
    assert not any("base_layer" in name or "default" in name for name in tensors)
    fresh = tiny_denoiser()
    apply_adapter(fresh, tensors, info.alpha)
    assert torch.equal(velocity(fresh, batch), after)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_alpha_scales_what_factors_add(tiny_denoiser: MakeWan) -> None:
    denoiser = tiny_denoiser()
    Lora(rank=4, alpha=2.0, parts=["ffn"]).inject(denoiser, seed=0)
    tensors = train_at_random(denoiser)
    name = denoiser.parts()["ffn"][0]
    plain, layer = tiny_denoiser().get_submodule(name), denoiser.get_submodule(name)
    x = draw_normal((3, 48), "x")
    added = x @ tensors[f"{name}.lora_A.weight"].T @ tensors[f"{name}.lora_B.weight"].T
    torch.testing.assert_close(layer(x), plain(x) + 0.5 * added)


def test_an_absent_alpha_is_the_rank() -> None:
    assert Lora(rank=4).alpha == 4
    assert Lora(rank=4, alpha=2.0).alpha == 2


def test_problems_are_said_in_words(tiny_base: WanBase) -> None:
    empty = tiny_base.empty_denoiser()
    assert Lora().problems(empty) == []
    unknown = Lora(parts=["atention"], train_fully=["fnn"])  # type: ignore[list-item]
    first, second = unknown.problems(empty)
    assert first.startswith("adapter.parts: unknown part 'atention'; did you mean 'attention'?")
    assert second.startswith("adapter.train_fully: unknown part 'fnn'; did you mean 'ffn'?")
    (both,) = Lora(parts=["audio", "ffn"], train_fully=["audio"]).problems(empty)
    assert both == "adapter: 'audio' is in both parts and train_fully"
    (nothing,) = Lora(parts=[]).problems(empty)
    assert "nothing would train" in nothing


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", (4, 64)),
        ("transformer.blocks.0.attn1.to_q.lora_B.weight", (64, 4)),
        ("transformer.blocks.9.attn1.to_q.lora_A.weight", (4, 48)),
        ("transformer.blocks.0.norm_x.weight", (64,)),
        ("audio_proj.nowhere.weight", (3,)),
    ],
)
def test_misfits_are_named(tiny_denoiser: MakeWan, name: str, shape: tuple[int, ...]) -> None:
    denoiser = tiny_denoiser()
    with pytest.raises(InputError, match="1 of its 1 tensors do not fit") as caught:
        apply_adapter(denoiser, {name: torch.zeros(shape)}, alpha=4.0)
    assert name in str(caught.value)
    assert not any("lora" in name for name, _ in denoiser.named_parameters())


def test_unfit_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(InputError, match="no file"):
        load_adapter(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="was not written by this kit"):
        load_adapter(path)
    write_adapter(path, {"x": torch.zeros(100)}, INFO)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="cannot be read"):
        load_adapter(path)


def test_a_new_adapter_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    for steps in (1, 2):
        write_adapter(path, {"x": torch.full((2,), steps)}, replace(INFO, steps=steps))
    tensors, info = load_adapter(path)
    assert info.steps == 2
    assert tensors["x"].tolist() == [2, 2]
