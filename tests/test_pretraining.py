"""`kit pretrain`: every task learns, goes on bit for bit, and writes a part that a base loads."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kit.data.clips import read_pictures
from kit.data.encode import to_video
from kit.data.shards import Shards
from kit.errors import InputError
from kit.models.base import Encoders
from kit.models.wan_base import WanBase
from kit.pretraining import TASKS
from kit.pretraining.video import turn_hues
from kit.run.pretrain import pretrain
from kit.training.curves import read_curves

ROOT = Path(__file__).parents[1]
TINY = ROOT / "data" / "tiny_base"
CONFIGS = {"video": TINY / "vae", "speech": TINY / "audio_encoder", "words": TINY}
PARTS = {
    "video": ["vae"],
    "speech": ["audio_encoder"],
    "words": ["text_encoder", "image_encoder"],
}


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(task: str, shards: Path, **more: Any) -> Path:
    values = {
        "name": task,
        "into": "base",
        "task.config": CONFIGS[task],
        # Turned hues make so short a course of the loss too rough to see it fall.
        **({"task.start": "null", "task.recolor": 0} if task == "video" else {}),
        "data.path": shards,
        "data.window_frames": 5,
        "data.context_frames": 1,
        "data.batch_size": 2,
        "data.num_workers": 0,
        "optimizer.lr": {"video": 0.3}.get(task, 5e-3),
        "optimizer.course": "constant",
        "optimizer.warmup_steps": 0,
        "trainer.max_steps": 12,
        "trainer.save_every": 4,
        "trainer.precision": "32-true",
        "trainer.ema_decay": 0.5,
        **more,
    }
    words = [f"{key}={value}" for key, value in values.items()]
    return pretrain(str(ROOT / f"recipes/studio/{task}.yaml"), words, lambda line: None)


def course(name: str) -> list[float]:
    rows = read_curves(Path("runs") / name / "metrics.csv")
    names = [key for key in rows[0] if key.startswith("loss/")]
    return [sum(float(row[key]) for key in names) for row in rows]


def features(task: str, encoders: Encoders, video: Tensor) -> Tensor:
    if task == "video":
        return encoders.encode_video(video)
    if task == "speech":
        return encoders.encode_speech(video.flatten()[None, :16000])
    return encoders.encode_image(video[:, :, 0])


@pytest.mark.parametrize("task", TASKS)
def test_learns_and_writes_a_part_of_a_base(task: str, raw_shards: Path) -> None:
    more = {"task.pictures": "true", "trainer.max_steps": 40} if task == "video" else {}
    base = run(task, raw_shards, **more)
    losses = course(task)
    assert sum(losses[-4:]) < sum(losses[:4])
    shutil.copytree(TINY, "whole")
    for part in PARTS[task]:
        shutil.copytree(base / part, Path("whole") / part, dirs_exist_ok=True)
    whole = WanBase(path="whole", random_weights=0, dtype="float32")
    drawn = WanBase(path=str(TINY), random_weights=0, dtype="float32")
    assert whole.problems() == [] and whole.fingerprint() != drawn.fingerprint()
    encoders, before = (b.load_encoders(torch.device("cpu")) for b in (whole, drawn))
    video = torch.rand(1, 3, 5, 64, 64) * 2 - 1
    made, drawn_before = (features(task, each, video) for each in (encoders, before))
    assert torch.isfinite(made).all() and not torch.equal(made, drawn_before)


@pytest.mark.parametrize("task", TASKS)
def test_goes_on_bit_for_bit(task: str, raw_shards: Path) -> None:
    run(task, raw_shards, name="whole", into="whole")
    for steps in (8, 12):
        run(task, raw_shards, name="parts", into="parts", **{"trainer.max_steps": steps})
    assert course("whole") == course("parts")
    for part in PARTS[task]:
        one, other = (
            load_file(next((Path(folder) / part).glob("*.safetensors")))
            for folder in ("whole", "parts")
        )
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_measured_latents_have_mean_zero_and_spread_one(raw_shards: Path) -> None:
    base = run("video", raw_shards)
    shutil.copytree(TINY, "whole")
    shutil.copytree(base / "vae", Path("whole/vae"), dirs_exist_ok=True)
    encoders = WanBase(path="whole", random_weights=0, dtype="float32").load_encoders(
        torch.device("cpu")
    )
    shards = Shards(raw_shards)
    videos = [to_video(read_pictures(shards, number, list(range(5)))) for number in range(3)]
    latents = torch.cat([encoders.encode_video(video[None]).flatten() for video in videos])
    assert abs(float(latents.mean())) < 0.5 and 0.5 < float(latents.std()) < 2


def test_the_video_codec_is_trained_in_parts(raw_shards: Path) -> None:
    run("video", raw_shards, **{"name": "pictures", "task.pictures": "true", "into": "one"})
    before = load_file("one/vae/diffusion_pytorch_model.safetensors")
    past = [name for name, tensor in before.items() if tensor.ndim == 5 and tensor.shape[2] > 1]
    # A single picture has no past: what looks back stays as it began, at zero.
    assert past and not any(before[name][:, :, :-1].any() for name in past)
    run("video", raw_shards, **{"name": "clips", "task.start": "one", "into": "two"})
    after = load_file("two/vae/diffusion_pytorch_model.safetensors")
    assert any(after[name][:, :, :-1].any() for name in past)


def test_a_part_that_was_not_trained_is_named(raw_shards: Path) -> None:
    with pytest.raises(InputError, match=r"task.start: nowhere/vae/.* is missing"):
        run("video", raw_shards, **{"task.start": "nowhere"})


def test_hues_turn_and_greys_stay() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1, 1)
    third = 2 * math.pi / 3
    torch.testing.assert_close(turn_hues(red, third).flatten(), torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(turn_hues(red, 2 * third).flatten(), torch.tensor([0.0, 0.0, 1.0]))
    grey = torch.full((3, 2, 2, 2), 0.3)
    torch.testing.assert_close(turn_hues(grey, 1.0), grey)


def test_a_decoder_alone_leaves_latents_as_they_are(raw_shards: Path) -> None:
    first = run("video", raw_shards) / "vae"
    before = load_file(first / "diffusion_pytorch_model.safetensors")
    config = (first / "config.json").read_text()
    more = {"task.start": "base", "task.decoder_only": "true", "name": "polish"}
    after = load_file(run("video", raw_shards, **more) / "vae/diffusion_pytorch_model.safetensors")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert (first / "config.json").read_text() == config
