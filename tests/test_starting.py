"""Training that goes on from an adapter, on top of one, or near the base; adapters on and off."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kit.adapters.consumers import UNSUPPORTED
from kit.adapters.export import FORMATS
from kit.adapters.files import AdapterInfo, write_adapter
from kit.adapters.kinds import KINDS
from kit.adapters.lora import Lora, adapter_tensors, trained_parameters
from kit.batch import Batch
from kit.draws import draw_normal
from kit.guidance import drop_text
from kit.models.lora_files import LoraFile
from kit.models.switch import bare
from kit.models.wan import Wan
from kit.models.wan_base import WanBase
from kit.objectives.flow_matching import FlowMatching
from kit.run.export import Settings, export
from tests.originals import draw_states, write_original

MakeWan = Callable[[], Wan]
CPU = torch.device("cpu")
PARTS: Any = ["attention", "ffn"]


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_original(tmp_path_factory.mktemp("wan"), draw_states(6))


def load(wan: Path, **options: Any) -> Wan:
    audio = str(wan / "infinitetalk.safetensors")
    base = WanBase(path=str(wan), audio_weights=audio, dtype="float32", **options)
    denoiser = base.load_denoiser(CPU)
    assert isinstance(denoiser, Wan)
    return denoiser


def velocity(denoiser: Wan, batch: Batch) -> Tensor:
    denoiser.requires_grad_(False)
    with torch.no_grad():
        predicted: Tensor = denoiser(batch.latents, torch.full((3,), 0.7), batch.conditions)
    return predicted


def train(wan: Path, path: Path, lora: Lora, denoiser: Wan | None = None) -> Wan:
    denoiser = denoiser or load(wan)
    lora.inject(denoiser, seed=0)
    with torch.no_grad():
        for name, parameter in trained_parameters(denoiser).items():
            parameter.add_(0.1 * draw_normal(tuple(parameter.shape), name))
    recipe = f"base: {{type: wan, path: {wan}}}\nadapter: {{type: lora, factor: -1}}\n"
    info = AdapterInfo("ann", "wan", lora.kind, lora.parts, lora.train_fully, 40, recipe)
    tensors = adapter_tensors(denoiser, trained_parameters(denoiser), lora.kind)
    write_adapter(path, tensors, info)
    return denoiser


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dialect", ["kit", *FORMATS])
def test_training_goes_on_from_files_of_all_programs(
    wan: Path, batch: Batch, tmp_path: Path, kind: Any, dialect: str
) -> None:
    if (kind, dialect) in UNSUPPORTED:
        pytest.skip(UNSUPPORTED[kind, dialect])
    path = tmp_path / "adapter.safetensors"
    lora = Lora(kind=kind, rank=2, alpha=3.0, parts=PARTS, ranks={"ffn": 4})
    after = velocity(train(wan, path, lora), batch)
    export(path, [dialect], tmp_path, print, settings=Settings(dtype="float32"))
    (file,) = (tmp_path / dialect).glob("*.safetensors")
    going_on = Lora(kind=kind, rank=8, parts=PARTS, start=str(file))
    denoiser = load(wan)
    assert going_on.problems(denoiser) == []
    going_on.inject(denoiser, seed=1)
    trained = trained_parameters(denoiser)
    assert len(trained) >= 48 and all(p.requires_grad for p in trained.values())
    torch.testing.assert_close(velocity(denoiser, batch), after, rtol=1e-4, atol=1e-4)


def test_whole_parts_and_fresh_layers_go_together(wan: Path, batch: Batch, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    after = velocity(train(wan, path, Lora(rank=2, parts=["ffn"], train_fully=["audio"])), batch)
    more = Lora(rank=4, parts=PARTS, train_fully=["audio"], start=str(path))
    denoiser = load(wan)
    assert more.problems(denoiser) == []
    more.inject(denoiser, seed=1)
    ranks = {
        name: p.shape[0] for name, p in trained_parameters(denoiser).items() if "lora_A" in name
    }
    assert {r for name, r in ranks.items() if "ffn" in name} == {2}
    assert {r for name, r in ranks.items() if "attn" in name} == {4}
    torch.testing.assert_close(velocity(denoiser, batch), after, rtol=1e-5, atol=1e-5)


def test_what_would_be_lost_is_refused(wan: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    train(wan, path, Lora(rank=2, parts=["ffn"], train_fully=["audio"]))
    denoiser = load(wan)
    (line,) = Lora(kind="loha", start=str(path)).problems(denoiser)
    assert line == f"adapter.kind: '{path}' is a lora, not a loha"
    lost = Lora(parts=["attention"], start=str(path)).problems(denoiser)
    assert lost[0].startswith(f"adapter.parts: '{path}' changes transformer.blocks.0.ffn")
    assert lost[1].startswith(f"adapter.train_fully: '{path}' changes audio_proj.")
    path.write_bytes(b"no adapter")
    (line,) = Lora(start=str(path)).problems(denoiser)
    assert line.startswith("adapter.start: ")


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_adapter_trains_on_top_of_a_first(
    wan: Path, batch: Batch, tmp_path: Path, kind: Any
) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    after = velocity(train(wan, first, Lora(kind=kind, rank=2)), batch)
    on_top = load(wan, loras=[LoraFile(str(first))])
    torch.testing.assert_close(velocity(on_top, batch), after, rtol=1e-4, atol=1e-4)
    both = velocity(train(wan, second, Lora(rank=2), on_top), batch)
    if kind == "dora":
        return  # its change depends on the weights that it meets, so that order counts
    files = [LoraFile(str(path)) for path in (second, first)]
    merged = load(wan, loras=files)
    torch.testing.assert_close(velocity(merged, batch), both, rtol=1e-4, atol=1e-4)
    halves = load(wan, loras=[replace(files[0], strength=0.5)] * 2 + files[1:])
    torch.testing.assert_close(velocity(halves, batch), both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_adapter_a_network_is_the_base(
    wan: Path, batch: Batch, tmp_path: Path, kind: Any
) -> None:
    before = velocity(load(wan), batch)
    denoiser = train(wan, tmp_path / "a.safetensors", Lora(kind=kind, rank=2))
    wanted = {name: p.requires_grad for name, p in denoiser.named_parameters()}
    sigma = torch.full((3,), 0.7)
    with torch.no_grad(), bare(denoiser):
        bared = denoiser(batch.latents, sigma, batch.conditions)
        with bare(denoiser):
            pass
        again = denoiser(batch.latents, sigma, batch.conditions)
    torch.testing.assert_close(bared, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, bared)
    assert {name: p.requires_grad for name, p in denoiser.named_parameters()} == wanted
    assert any(wanted.values())
    assert not torch.allclose(velocity(denoiser, batch), before, atol=1e-2)


def test_the_base_is_kept_where_there_is_no_text(wan: Path, batch: Batch, tmp_path: Path) -> None:
    def course(keep: float) -> list[float]:
        """Train on noise and measure how far the velocity without text has moved."""
        denoiser = load(wan)
        Lora(rank=4, parts=PARTS).inject(denoiser, seed=0)
        optimizer = torch.optim.Adam(trained_parameters(denoiser).values(), lr=3e-3)
        objective = FlowMatching(keep_base=keep)
        conditions = drop_text(batch.conditions, batch.null_text)
        asked = batch.latents, torch.full((3,), 0.7), conditions
        with torch.no_grad():
            before = denoiser(*asked)
        losses = []
        for step in range(12):
            parts = objective.losses(denoiser, batch, seed=step)
            losses.append(parts["velocity"].item())
            optimizer.zero_grad()
            torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            moved = (denoiser(*asked) - before).norm().item()
        return [moved, losses[0] - losses[-1]]

    free, kept = course(0.0), course(20.0)
    assert kept[0] < 0.7 * free[0]


def test_keeping_the_base_is_a_loss_of_its_own(wan: Path, batch: Batch) -> None:
    denoiser = load(wan)
    Lora(rank=4).inject(denoiser, seed=0)
    fresh = FlowMatching(keep_base=2.0).losses(denoiser, batch, seed=0)
    assert fresh.keys() == {"velocity", "base"}
    assert fresh["base"].item() == pytest.approx(0, abs=1e-8)
    plain = FlowMatching().losses(denoiser, batch, seed=0)
    assert plain.keys() == {"velocity"}
    torch.testing.assert_close(plain["velocity"], fresh["velocity"])
