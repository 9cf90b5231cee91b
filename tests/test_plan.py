"""`kit plan`: memory, time and disk of a run, told without loading anything."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from kit import cli
from kit.batch import Batch
from kit.errors import InputError
from kit.models.audio import AudioSizes
from kit.models.base import Denoiser
from kit.models.low_bits import FORMS
from kit.models.wan import Wan
from kit.models.wan_base import WanBase
from kit.planning.network import num_bytes
from kit.planning.tally import imagining
from kit.planning.training import (
    Setup,
    count,
    measure_pass,
    measure_update,
    measure_whole_pass,
    step_memory,
)
from kit.recipe import change
from kit.run.fit import fit
from kit.run.plan import plan
from kit.run.plan_fit import build_setup, plan_fit
from kit.run.plan_parts import outline
from kit.run.plan_sample import AS_WRITTEN, plan_sample
from kit.run.recipes import FIT, SAMPLE, read_as
from tests.test_fit import RECIPE, overrides

TALK = RECIPE.with_name("tiny_talk.yaml")
HELD = ("frozen weights", "trained weights", "average of them", "optimiser", "gradients")

DEPTH = 7

Make = Callable[..., Setup]


def few(shards: Path, **more: object) -> list[str]:
    """Train the audio parts only: few factors, quickly counted."""
    return overrides(shards, **{"adapter.parts": "[audio]", **more})


@pytest.fixture
def make(encoded_shards: Path) -> Make:
    """Build what memory depends on, from the tiny recipe with some values replaced."""

    def build(*words: str) -> Setup:
        recipe = change(read_as(str(RECIPE), few(encoded_shards), FIT), words)
        return build_setup(recipe, outline(recipe, recipe.build("base")))

    return build


@pytest.fixture
def deep(tiny_base: WanBase) -> Callable[[Setup], Setup]:
    """Give a tiny network seven blocks."""
    files = tiny_base.configurations("base")
    config = {**files["transformer/config.json"], "num_layers": DEPTH}

    def network() -> Denoiser:
        with torch.device("meta"):
            return Wan(config, audio=AudioSizes(**files["audio/config.json"]))

    return partial(replace, network=network)


def test_what_is_kept_is_what_torch_keeps() -> None:
    """Two layers and a nonlinearity: their bytes can be counted by hand."""
    width, rows = 64, 32
    with imagining() as tally:
        network = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        weights = tally.live
        assert weights == 4 * 2 * (width * width + width)
        loss = network(torch.empty(rows, width)).sum()
        # The input, tanh's result, which the second layer needs as well, and the sum.
        assert tally.live - weights == 4 * (2 * rows * width + 1)
        assert tally.flops == 2 * 2 * rows * width * width
        loss.backward()
        # The input needs no gradient: one product for it less.
        assert tally.flops == 5 * 2 * rows * width * width
        assert tally.peak >= tally.live >= 2 * weights


def test_imagined_numbers_leave_nothing_behind(batch: Batch, make: Make) -> None:
    """What real networks remember of grids must be real again."""
    setup = make()
    measure_pass(setup, batch)
    real = setup.network().to_empty(device="cpu")
    conditions = batch.conditions
    assert real(batch.latents, torch.ones(len(batch.keys)), conditions).shape == batch.latents.shape


def test_weights_are_counted_as_they_are_held(make: Make) -> None:
    setup = make()
    counts = count(setup)
    assert counts.frozen_bytes == 4 * (counts.parameters - counts.trained)
    assert counts.trained_bytes == 4 * counts.trained
    update = measure_update(setup)
    # Two averages, and a step count of four bytes for each of some hundred factors.
    assert 2 * counts.trained_bytes < update.state < 2.1 * counts.trained_bytes


def test_what_is_held_is_what_torch_holds(make: Make) -> None:
    """The parameters of the real network, and of its adapter."""
    setup, counts = make(), count(make())
    real = setup.network().to_empty(device="cpu")
    setup.adapter.inject(real, seed=0)
    held = sum(p.numel() * p.element_size() for p in real.parameters())
    assert counts.frozen_bytes + counts.trained_bytes == held


@pytest.mark.parametrize("every", [0, 1, 3])
def test_a_few_blocks_tell_what_all_take(
    every: int, batch: Batch, make: Make, deep: Callable[[Setup], Setup]
) -> None:
    setup, one = deep(make(f"trainer.checkpoint_blocks={every}")), _first(batch, 1)
    on_a_line = measure_pass(setup, one)
    # Of so small a network, the way back may be fullest elsewhere.
    assert [*on_a_line] == pytest.approx([*measure_whole_pass(setup, one)], rel=0.05)


def test_what_saves_memory_is_said_to(batch: Batch, make: Make) -> None:
    plain, one = make(), _first(batch, 1)
    kept = {
        every: measure_pass(make(f"trainer.checkpoint_blocks={every}"), one) for every in (0, 1, 2)
    }
    assert kept[1].kept < kept[2].kept < kept[0].kept
    assert kept[1].flops > kept[2].flops > kept[0].flops
    assert kept[0].kept < measure_pass(plain, batch).kept
    adam8 = measure_update(make("optimizer.state_bits=8"))
    assert adam8.state < measure_update(plain).state


def test_processes_share_what_is_held(batch: Batch, make: Make) -> None:
    """All but what one of them computes; the block that works is put together."""
    one, four = make(), make("trainer.devices=4")
    counts, passed, update = count(one), measure_pass(one, batch), measure_update(one)
    alone = step_memory(one, counts, passed, update).device
    shared = step_memory(four, counts, passed, update).device
    for name in HELD:
        assert shared[name] == alone[name] // 4
    assert shared["gathered weights"] == 2 * counts.block + counts.rest


@pytest.mark.parametrize("form", sorted(FORMS))
def test_few_bits_are_counted_as_bits(form: str) -> None:
    """A linear layer of 128 x 128 weights in each form, with its factors."""
    bits = {"nf4": 4.5, "nf4_double": 4.127, "int8": 8.25, "fp8": 8.0}
    layer = FORMS[form].layer(nn.Linear(128, 128, bias=False, device="meta"), torch.bfloat16)
    assert num_bytes(dict(layer.named_parameters())["weight"]) == pytest.approx(
        bits[form] / 8 * 128 * 128, rel=0.01
    )


def test_the_tiny_recipe_is_told(
    encoded_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    out = tmp_path / "plan.json"
    plan(str(RECIPE), few(encoded_shards), lines.append, rate=1.0, out=out)
    text = "\n".join(lines)
    assert "encoded shards" in text and "64x64, 9 frames: 48 tokens" in text
    assert "1 TFLOP/s, as stated" in text and "missing" not in text
    facts = json.loads(out.read_text())
    assert not facts["remedies"]
    assert facts["peak"] == sum(facts["memory"]["device"].values())
    assert facts["seconds_per_step"] == pytest.approx(facts["flops_per_step"] / 1e12)
    shards = sum(file.stat().st_size for file in encoded_shards.glob("*.tar"))
    assert facts["disk"]["shards"] == shards


def test_disk_is_what_a_run_leaves(
    encoded_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = few(encoded_shards)
    told = plan_fit(read_as(str(RECIPE), words, FIT), 1e12, None)
    folder = fit(str(RECIPE), words, lambda line: None)
    checkpoints = [file.stat().st_size for file in (folder / "checkpoints").iterdir()]
    expected = next(size for name, size in told.disk.items() if "checkpoints" in name)
    assert sum(checkpoints) == pytest.approx(expected * 2 / 3, rel=0.15)
    # The next plan knows how long a step takes.
    known = plan_fit(read_as(str(RECIPE), words, FIT), None, None)
    assert known.rate.startswith("median step of ") and known.seconds_per_step


def test_what_is_missing_is_told_and_the_rest_planned(tmp_path: Path) -> None:
    words = few(tmp_path / "nothing", **{"trainer.device": "cuda"})
    found = plan_fit(read_as(str(RECIPE), words, FIT), None, 80e9)
    assert found.data.kind is None and found.peak > 0
    assert any(note.startswith("missing: data.path") for note in found.notes)
    assert found.seconds_per_step is None or torch.cuda.is_available()


def test_a_base_on_the_hub_is_planned_with_public_sizes() -> None:
    recipe = read_as("recipes/my_character.yaml", [], FIT)
    base_outline = outline(recipe, recipe.build("base"))
    num_parameters = sum(p.numel() for p in base_outline.network().parameters())
    assert num_parameters == 18_882_046_784  # InfiniteTalk, see the published checkpoint
    assert "Wan2.1-I2V-14B" in base_outline.notes[0]


def test_a_base_of_unknown_sizes_cannot_be_planned(tmp_path: Path) -> None:
    words = few(tmp_path, **{"base.path": tmp_path / "none"})
    with pytest.raises(InputError, match="base.path"):
        plan_fit(read_as(str(RECIPE), words, FIT), None, None)


def test_what_would_fit_is_suggested(encoded_shards: Path) -> None:
    whole = {"adapter.parts": "[]", "adapter.train_fully": "[ffn]"}  # so that no few bits go
    recipe = read_as(str(RECIPE), few(encoded_shards, **whole), FIT)
    narrow = plan_fit(recipe, 1e12, 1e6)
    word = "trainer.checkpoint_blocks=1"
    assert not any("quantise" in suggested for suggested in narrow.remedies)
    assert narrow.limit == 1e6 < narrow.remedies[word] < narrow.peak
    assert not any("fits" in line for line in narrow.lines())
    enough = replace(narrow, limit=narrow.remedies[word])
    assert any(word in line and "fits" in line for line in enough.lines())


def test_sampling_by_setting(tmp_path: Path) -> None:
    words = ["adapter=null", f"out={tmp_path / 'talk.mp4'}", "sampling.num_frames=9"]
    words.append("sampling.context_frames=5")
    found = plan_sample(read_as(str(TALK), words, SAMPLE), 1e12, None)
    written = found.settings[AS_WRITTEN]
    one_by_one = found.settings["sampling.together=false"]
    assert one_by_one["denoising"] < written["denoising"]
    forgetting = found.settings["sampling.remember=false"]
    assert forgetting["denoising"] != written["denoising"]
    away = found.settings["sampling.offload=turns"]
    assert away["decoding"] < written["decoding"]
    assert found.steps == 8 and found.flops_per_step > 0


def test_a_pretraining_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "recipes/studio/video.yaml"]) == 2
    assert "valid: fit, sample" in capsys.readouterr().err


def _first(batch: Batch, count: int) -> Batch:
    conditions = type(batch.conditions)(
        **{name: value[:count] for name, value in vars(batch.conditions).items()}
    )
    return Batch(
        batch.keys[:count],
        batch.draws[:count],
        batch.latents[:count],
        conditions,
        batch.null_text[:count],
        batch.num_context[:count],
    )
