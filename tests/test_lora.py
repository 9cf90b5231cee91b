"""Adapters: no change at the start, only the chosen parameters, to a file and back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kit.adapters.files import AdapterInfo, load_adapter, write_adapter
from kit.adapters.kinds import KINDS
from kit.adapters.lora import Lora, adapter_tensors, apply_adapter, trained_parameters
from kit.batch import Batch
from kit.draws import draw_normal
from kit.errors import InputError
from kit.models.wan import Wan
from kit.models.wan_base import WanBase

TINY_BASE = Path(__file__).parents[1] / "data" / "tiny_base"
MakeWan = Callable[[], Wan]
INFO = AdapterInfo("ann", "wan", "lora", ("attention", "ffn"), ("audio",), 7, "seed: 0\n")


def velocity(denoiser: Wan, batch: Batch) -> Tensor:
    # Torch multiplies in another order where a weight asks for a gradient, even without one.
    denoiser.requires_grad_(False)
    with torch.no_grad():
        sigma = torch.full((len(batch.keys),), 0.7)
        predicted: Tensor = denoiser(batch.latents, sigma, batch.conditions)
    return predicted


def train_at_random(denoiser: Wan, kind: str = "lora") -> dict[str, Tensor]:
    """Move all that trains, and give it as an adapter file holds it."""
    trained = trained_parameters(denoiser)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.add_(0.05 * draw_normal(tuple(parameter.shape), name))
    return adapter_tensors(denoiser, trained, kind)


@pytest.mark.parametrize("parts", [("attention", "ffn", "audio"), ("audio",)])
@pytest.mark.parametrize("kind", KINDS)
def test_fresh_factors_change_nothing(
    tiny_denoiser: MakeWan, batch: Batch, kind: Any, parts: Any
) -> None:
    denoiser = tiny_denoiser()
    before = velocity(denoiser, batch)
    Lora(kind=kind, rank=4, parts=parts, train_fully=[]).inject(denoiser, seed=0)
    torch.testing.assert_close(velocity(denoiser, batch), before, rtol=1e-5, atol=1e-5)


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


OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"alpha": 8.0},
    "ranks by part": {"ranks": {"ffn": 2}, "alphas": {"ffn": 6.0, "audio": 1.0}},
    "rank-stabilised": {"rank_stabilised": True},
    "dora": {"kind": "dora", "alpha": 2.0},
    "loha": {"kind": "loha", "alpha": 8.0},
    "lokr": {"kind": "lokr", "alpha": 2.0, "rank": 2},
    "lokr of one factored side": {"kind": "lokr", "alpha": 2.0, "rank": 2, "factor": 4},
    "lokr of whole sides": {"kind": "lokr", "alpha": 2.0, "rank": 64},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_to_a_file_and_back(
    tiny_denoiser: MakeWan, batch: Batch, tmp_path: Path, options: dict[str, Any]
) -> None:
    denoiser, path = tiny_denoiser(), tmp_path / "adapter.safetensors"
    before = velocity(denoiser, batch)
    lora = Lora(**{"rank": 4, "parts": ["attention", "ffn"], "train_fully": ["audio"], **options})
    if "audio" in lora.alphas:
        lora = Lora(**{"rank": 4, **options})
    lora.inject(denoiser, seed=0)
    write_adapter(path, train_at_random(denoiser, lora.kind), replace(INFO, kind=lora.kind))
    after = velocity(denoiser, batch)
    assert not torch.allclose(after, before, atol=1e-2)

    tensors, info = load_adapter(path)
    assert info == replace(INFO, kind=lora.kind)
    assert not any("base_layer" in name or "default" in name for name in tensors)
    fresh = tiny_denoiser()
    apply_adapter(fresh, tensors, info.kind)
    torch.testing.assert_close(velocity(fresh, batch), after, rtol=1e-5, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_all_kinds_learn(tiny_denoiser: MakeWan, batch: Batch, options: dict[str, Any]) -> None:
    denoiser = tiny_denoiser()
    Lora(**{"rank": 4, **options}).inject(denoiser, seed=0)
    trained = trained_parameters(denoiser)
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)
    sigma, target = torch.full((3,), 0.7), draw_normal(tuple(batch.latents.shape), "target")
    losses = []
    for _ in range(8):
        error = denoiser(batch.latents, sigma, batch.conditions) - target
        loss = error.square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.99 * losses[0]


def test_alpha_scales_what_factors_add(tiny_denoiser: MakeWan) -> None:
    denoiser = tiny_denoiser()
    Lora(rank=4, alpha=2.0, parts=["ffn"]).inject(denoiser, seed=0)
    tensors = train_at_random(denoiser)
    name = denoiser.parts()["ffn"][0]
    plain, layer = tiny_denoiser().get_submodule(name), denoiser.get_submodule(name)
    x = draw_normal((3, 48), "x")
    added = x @ tensors[f"{name}.lora_A.weight"].T @ tensors[f"{name}.lora_B.weight"].T
    torch.testing.assert_close(layer(x), plain(x) + 0.5 * added)


def test_sizes_of_parts() -> None:
    assert Lora(rank=4).size("ffn") == (4, 4.0)
    assert Lora(rank=4, alpha=2.0).size("ffn") == (4, 2.0)
    parts = Lora(rank=4, ranks={"ffn": 16}, alphas={"audio": 1.0})
    assert [parts.size(p) for p in ("attention", "ffn", "audio")] == [(4, 4.0), (16, 16.0), (4, 1)]
    assert Lora(rank=16, alpha=8.0, rank_stabilised=True).size("ffn") == (16, 32.0)


def test_options_of_other_kinds_are_refused(tiny_base: WanBase) -> None:
    empty = tiny_base.empty_denoiser()
    (line,) = Lora(kind="loha", dropout=0.1).problems(empty)
    assert line == "adapter.dropout: 'loha' has none; take 0"
    (line,) = Lora(factor=4).problems(empty)
    assert line == "adapter.factor: 'lora' splits no sizes; leave it out"
    (line,) = Lora(parts=["ffn"], ranks={"audio": 2}).problems(empty)
    assert line == "adapter: 'audio' has a rank or alpha, but is not in parts"


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
    layer, _, factor = name.partition(".lora_")
    other = {"A.weight": ("B", (48, 4)), "B.weight": ("A", (4, 48)), "": ("", ())}[factor]
    tensors = {name: torch.zeros(shape)}
    if factor:
        tensors[f"{layer}.lora_{other[0]}.weight"] = torch.zeros(other[1])
    with pytest.raises(InputError, match=r"1 of its \d tensors do not fit") as caught:
        apply_adapter(denoiser, tensors, "lora")
    assert layer in str(caught.value)
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
