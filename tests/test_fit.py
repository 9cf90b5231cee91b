"""`kit fit`: learns, leaves what it promises, and goes on bit for bit after being killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kit.adapters.files import load_adapter
from kit.batch import Batch
from kit.errors import InputError
from kit.objectives.flow_matching import FlowMatching
from kit.run.fit import fit
from kit.training.checkpoints import AtomicCheckpoints
from kit.training.curves import read_curves

RECIPE = Path(__file__).parent / "recipes" / "tiny.yaml"
SHORT_PREVIEWS = {
    "preview.every": 1,
    "preview.seconds": 0.3,
    "sampling.num_frames": 9,
    "sampling.context_frames": 5,
    "sampling.steps": 1,
}
TIMES = ("seconds",)
"""Columns of the curves that no two runs share."""


def overrides(shards: Path, **more: Any) -> list[str]:
    values = {
        "name": "run",
        "data.path": shards,
        "data.window_frames": 9,
        "data.windows_per_clip": 2,
        "data.context_frames": 5,
        "data.first_chunk": 0.5,
        "data.num_workers": 0,
        "optimizer.warmup_steps": 2,
        "trainer.max_steps": 6,
        "trainer.save_every": 2,
        "preview": "null",
        **more,
    }
    return [f"{key}={value}" for key, value in values.items()]


def losses(folder: Path) -> list[dict[str, str]]:
    rows = read_curves(folder / "metrics.csv")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_leaves_adapter_curves_checkpoints_and_recipe(encoded_shards: Path) -> None:
    said: list[str] = []
    folder = fit(str(RECIPE), overrides(encoded_shards), said.append)
    tensors, info = load_adapter(folder / "adapter.safetensors")
    assert info.steps == 6 and info.kind == "lora" and tensors
    assert (folder / "recipe.yaml").read_text() == info.recipe
    assert (folder / "loss.png").stat().st_size > 1000
    assert [row["step"] for row in losses(folder)] == ["1", "2", "3", "4", "5", "6"]
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000004.ckpt", "step-00000006.ckpt"]
    assert json.loads((folder / "fit.json").read_text())["steps"] == 6
    assert any((folder / "tensorboard").iterdir())


def test_a_checkpoint_holds_only_what_trains(encoded_shards: Path) -> None:
    folder = fit(str(RECIPE), overrides(encoded_shards), print_nothing)
    checkpoint = torch.load(folder / "checkpoints" / "step-00000006.ckpt", weights_only=True)
    tensors, _ = load_adapter(folder / "adapter.safetensors")
    assert len(checkpoint["state_dict"]) == sum(".lora_" in name for name in tensors)
    assert all(".lora_" in name for name in checkpoint["state_dict"])
    assert checkpoint["recipe"]["adapter"]["rank"] == 8


def test_raw_and_encoded_shards_train_alike(raw_shards: Path, encoded_shards: Path) -> None:
    few = {"trainer.max_steps": 2, "data.references_per_window": 1}
    raw = fit(str(RECIPE), overrides(raw_shards, name="raw", **few), print_nothing)
    encoded = fit(str(RECIPE), overrides(encoded_shards, name="encoded", **few), print_nothing)
    assert losses(raw) == losses(encoded)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_learns(encoded_shards: Path, accumulate: int) -> None:
    more = {"trainer.max_steps": 60, "trainer.save_every": 60, "trainer.accumulate": accumulate}
    folder = fit(str(RECIPE), overrides(encoded_shards, **more), print_nothing)
    course = [float(row["loss/velocity"]) for row in losses(folder)]
    assert sum(course[-10:]) < 0.85 * sum(course[:10])


def test_audio_parts_can_train_fully(encoded_shards: Path) -> None:
    more = {"adapter.parts": "[attention]", "adapter.train_fully": "[audio]"}
    folder = fit(str(RECIPE), overrides(encoded_shards, **more), print_nothing)
    tensors, info = load_adapter(folder / "adapter.safetensors")
    assert info.train_fully == ("audio",)
    assert "audio_proj.proj1.weight" in tensors
    assert not any("ffn" in name for name in tensors)


def test_activation_checkpointing_changes_nothing(encoded_shards: Path) -> None:
    plain = fit(str(RECIPE), overrides(encoded_shards, name="plain"), print_nothing)
    more = {"trainer.checkpoint_blocks": 1, "name": "less_memory"}
    saving = fit(str(RECIPE), overrides(encoded_shards, **more), print_nothing)
    assert [float(row["loss/velocity"]) for row in losses(plain)] == pytest.approx(
        [float(row["loss/velocity"]) for row in losses(saving)], rel=1e-5
    )


def test_goes_on_bit_for_bit_when_more_steps_are_asked_for(encoded_shards: Path) -> None:
    whole = fit(str(RECIPE), overrides(encoded_shards, name="whole"), print_nothing)
    for steps in (3, 6):
        more = {"name": "parts", "trainer.max_steps": steps, "trainer.accumulate": 1}
        parts = fit(str(RECIPE), overrides(encoded_shards, **more), print_nothing)
    assert losses(parts) == losses(whole)
    assert_same_tensors(parts, whole)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM])
def test_goes_on_bit_for_bit_after_a_signal(encoded_shards: Path, blow: signal.Signals) -> None:
    more = {
        "trainer.max_steps": 80,
        "trainer.save_every": 3,
        "trainer.accumulate": 2,
        "adapter.dropout": 0.1,
    }
    whole = fit(str(RECIPE), overrides(encoded_shards, name="whole", **more), print_nothing)
    again = overrides(encoded_shards, name="again", **more)
    strike_after(5, Path("runs/again/metrics.csv"), again, blow)
    assert 5 <= len(losses(Path("runs/again"))) < 80
    # With other loader processes, too.
    again = overrides(encoded_shards, name="again", **{**more, "data.num_workers": 2})
    folder = fit(str(RECIPE), again, print_nothing)
    assert losses(folder) == losses(whole)
    assert_same_tensors(folder, whole)


def test_another_recipe_does_not_go_on(encoded_shards: Path) -> None:
    fit(str(RECIPE), overrides(encoded_shards), print_nothing)
    before = Path("runs/run/adapter.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"adapter\.rank: was 8, is 4"):
        fit(str(RECIPE), overrides(encoded_shards, **{"adapter.rank": 4}), print_nothing)
    assert Path("runs/run/adapter.safetensors").read_bytes() == before


def change_losses(
    monkeypatch: pytest.MonkeyPatch, epoch: int, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Let a change befall the loss of every batch that begins with a sample of this epoch."""
    exact = FlowMatching.losses

    def changed(
        self: FlowMatching, denoiser: torch.nn.Module, batch: Batch, seed: int
    ) -> dict[str, torch.Tensor]:
        losses = exact(self, denoiser, batch, seed)
        is_due = batch.draws[0, 0] == epoch
        return {name: change(loss) if is_due else loss for name, loss in losses.items()}

    monkeypatch.setattr(FlowMatching, "losses", changed)


def with_nan_gradient(loss: torch.Tensor) -> torch.Tensor:
    loss.register_hook(lambda gradient: gradient * float("nan"))  # type: ignore[no-untyped-call]
    return loss


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(
    encoded_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_losses(monkeypatch, 2, lambda loss: loss * float("nan"))
    with pytest.raises(InputError, match="nan"):
        fit(str(RECIPE), overrides(encoded_shards, **{"trainer.max_steps": 30}), print_nothing)
    report = json.loads(Path("runs/run/nan_report.json").read_text())
    assert report["keys"] and report["draws"][0][0] == 2
    assert list(Path("runs/run/checkpoints").glob("step-*.ckpt"))


def test_a_gradient_that_is_no_number_is_not_stepped(
    encoded_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_losses(monkeypatch, 1, with_nan_gradient)
    with pytest.raises(InputError, match="grad_norm"):
        fit(str(RECIPE), overrides(encoded_shards, **{"trainer.max_steps": 30}), print_nothing)
    newest = sorted(Path("runs/run/checkpoints").glob("step-*.ckpt"))[-1]
    state = torch.load(newest, weights_only=True)["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_whole_parts_train_in_a_bfloat16_base_with_previews(encoded_shards: Path) -> None:
    data = {"base.dtype": "bfloat16", "adapter.parts": "[attention]"}
    more = {**data, "adapter.train_fully": "[audio]", "trainer.max_steps": 1}
    preview = {
        **SHORT_PREVIEWS,
    }
    with pytest.raises(InputError, match=r"trainer\.precision: 32-true cannot train"):
        fit(str(RECIPE), overrides(encoded_shards, **more), print_nothing)
    raw = {**more, "trainer.precision": "bf16-mixed", **preview}
    words = [word for word in overrides(encoded_shards, **raw) if word != "preview=null"]
    with pytest.raises(InputError, match="data.base: the shards were encoded with"):
        fit(str(RECIPE), words, print_nothing)


def test_a_bfloat16_base_trains_from_raw_shards(raw_shards: Path) -> None:
    more = {
        "base.dtype": "bfloat16",
        "adapter.parts": "[attention]",
        "adapter.train_fully": "[audio]",
        "trainer.precision": "bf16-mixed",
        "trainer.max_steps": 2,
        **SHORT_PREVIEWS,
    }
    words = [word for word in overrides(raw_shards, **more) if word != "preview=null"]
    folder = fit(str(RECIPE), words, print_nothing)
    assert len(list((folder / "previews").glob("*.mp4"))) == 2
    tensors, _ = load_adapter(folder / "adapter.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_other_clips_at_the_same_place_do_not_go_on(encoded_shards: Path, raw_shards: Path) -> None:
    shutil.copytree(encoded_shards, "moved")
    fit(str(RECIPE), overrides(encoded_shards), print_nothing)
    longer = {"trainer.max_steps": 8}
    fit(str(RECIPE), overrides(Path("moved"), **longer), print_nothing)
    index = json.loads(Path("moved/index.json").read_text())
    index["shards"][0]["samples"].pop()
    Path("moved/index.json").write_text(json.dumps(index))
    longer = {"trainer.max_steps": 9}
    with pytest.raises(InputError, match="shards: was"):
        fit(str(RECIPE), overrides(Path("moved"), **longer), print_nothing)


def test_a_finished_run_is_left_as_it_is(encoded_shards: Path) -> None:
    folder = fit(str(RECIPE), overrides(encoded_shards), print_nothing)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    said: list[str] = []
    for steps in (6, 3):
        fit(str(RECIPE), overrides(encoded_shards, **{"trainer.max_steps": steps}), said.append)
    assert "nothing to do" in said[0] and "nothing to do" in said[-1]
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_full_disk_costs_only_the_newest_checkpoint(
    encoded_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = torch.save, []

    def full_at_the_second(checkpoint: Any, file: Any) -> None:
        calls.append(checkpoint)
        save(checkpoint, file)
        if len(calls) == 2:
            raise OSError(28, os.strerror(28), str(file.name))

    monkeypatch.setattr("kit.training.checkpoints.torch.save", full_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        fit(str(RECIPE), overrides(encoded_shards), print_nothing)
    names = [path.name for path in Path("runs/run/checkpoints").iterdir()]
    assert names == ["step-00000002.ckpt"]


def test_atomic_checkpoints_replace_only_when_whole(tmp_path: Path) -> None:
    writer, path = AtomicCheckpoints(), tmp_path / "step.ckpt"
    writer.save_checkpoint({"step": 1}, path)
    with pytest.raises(AttributeError):
        writer.save_checkpoint({"step": lambda: 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["step.ckpt"]


def test_previews_have_sound(encoded_shards: Path, tmp_path: Path) -> None:
    from kit.data.media import probe

    more = {
        "trainer.max_steps": 2,
        **SHORT_PREVIEWS,
    }
    words = [word for word in overrides(encoded_shards, **more) if word != "preview=null"]
    folder = fit(str(RECIPE), words, print_nothing)
    videos = sorted((folder / "previews").glob("*.mp4"))
    assert [video.name for video in videos] == ["step-00000001.mp4", "step-00000002.mp4"]
    info = probe(videos[0])
    assert info.has_sound and info.num_frames == 7


def print_nothing(line: str) -> None:
    """Tell nobody."""


def assert_same_tensors(one: Path, other: Path) -> None:
    left, right = (load_file(folder / "adapter.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def strike_after(steps: int, curves: Path, words: list[str], blow: signal.Signals) -> None:
    """Run `kit fit` in a process of its own and send it a signal once it has done some steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kit", "fit", str(RECIPE), *words],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(read_curves(curves)) < steps and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(blow)
    assert process.wait(timeout=60) in (-signal.SIGKILL, 130)


def test_a_changed_adapter_below_is_noticed(encoded_shards: Path) -> None:
    first = fit(str(RECIPE), overrides(encoded_shards, name="first"), print_nothing)
    old = Path("old.safetensors")
    shutil.copy(first / "adapter.safetensors", old)

    def on_top(steps: int) -> list[str]:
        more = {"adapter.start": old, "trainer.max_steps": steps}
        return overrides(encoded_shards, name="second", **more)

    second = fit(str(RECIPE), on_top(2), print_nothing)
    shutil.copy(second / "adapter.safetensors", old)
    with pytest.raises(InputError, match=r"files\.old\.safetensors: was '\w+', is '\w+'"):
        fit(str(RECIPE), on_top(4), print_nothing)


def test_keeping_the_base_needs_one(encoded_shards: Path) -> None:
    whole = {"adapter.train_fully": "[audio]", "adapter.parts": "[ffn]"}
    words = overrides(encoded_shards, **{"objective.keep_base": 0.5, **whole})
    with pytest.raises(InputError, match=r"objective\.keep_base: parts that train fully"):
        fit(str(RECIPE), words, print_nothing)
