"""The shipped studio base: small, in half precision, and it makes characters talk."""

import csv
import itertools
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from kit.draws import draw_normal
from kit.metrics.mouth import box_regions, opening_by_color
from kit.metrics.sync import lip_sync, speech_envelope
from kit.models.base import Denoiser, Encoders
from kit.models.wan_base import WanBase
from kit.run.fit import fit
from kit.run.prepare import prepare
from kit.sampling.frames import StillSource, to_pictures
from kit.sampling.pipeline import TalkSampler, no_progress
from kit.sampling.scene import Scene
from kit.studio.characters import MOUTH
from kit.studio.drawing import paint_frames
from kit.studio.scenes import Take, World, draw_clip, truth
from kit.studio.voices import Corpus

ROOT = Path(__file__).parents[1]
BASE, SAMPLE = ROOT / "data" / "studio_base", ROOT / "data" / "sample"
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
NUM_FRAMES = 57


@pytest.fixture(scope="module")
def base() -> WanBase:
    return WanBase(path=str(BASE), dtype="float32", video_dtype="bfloat16", text_length=64)


@pytest.fixture(scope="module")
def denoiser(base: WanBase) -> Denoiser:
    return base.load_denoiser(torch.device("cpu"))


@pytest.fixture(scope="module")
def encoders(base: WanBase) -> Encoders:
    return base.load_encoders(torch.device("cpu"))


@pytest.fixture(scope="module")
def take() -> Take:
    """A character and a voice that the base never saw."""
    world, corpus = World("test", seed=5, two_speakers=0.0), Corpus(SAMPLE / "voices", "test")
    takes = (draw_clip(world, index, NUM_FRAMES, corpus) for index in itertools.count())
    return next(take for take in takes if take.speaking == "one")


@pytest.fixture(scope="module")
def scene(take: Take) -> Scene:
    """The first frame is the portrait."""
    portrait = StillSource(next(paint_frames(take.scene)), (64, 64))
    return Scene(take.caption, take.tracks, portrait, torch.ones(1, 8, 8))


@pytest.fixture(scope="module")
def region(take: Take) -> Tensor:
    """Where the drawn mouth is at any time, and a little around it. [64, 64]"""
    boxes = torch.tensor([frame["characters"][0]["mouth_box"] for frame in truth(take)["frames"]])
    around = torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])
    return box_regions(around, 64, 64, margin=4.0)


@pytest.fixture(scope="module")
def opening(denoiser: Denoiser, encoders: Encoders, scene: Scene, region: Tensor) -> Tensor:
    return mouth_opening(denoiser, encoders, scene, region)


def mouth_opening(denoiser: Denoiser, encoders: Encoders, scene: Scene, region: Tensor) -> Tensor:
    """Sample two chunks and measure the mouth. [T]"""
    sampler = TalkSampler(steps=8, shift=3.0, text_scale=1.0, audio_scale=1.5, num_frames=33)
    chunks = sampler.sample(denoiser, encoders, scene, 0, no_progress)
    frames = torch.from_numpy(np.concatenate([to_pictures(pixels) for pixels, _ in chunks]))
    return opening_by_color(frames, region, MOUTH)


def test_weights_are_few_and_in_half_precision() -> None:
    files = list(BASE.rglob("*.safetensors"))
    folders = {file.parent.name for file in files}
    assert folders == {
        "transformer", "audio", "vae", "text_encoder", "image_encoder", "audio_encoder"
    }  # fmt: skip
    assert sum(file.stat().st_size for file in files) <= 15e6
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        assert dtypes == {"F16"}, file


def test_the_base_has_no_problems(base: WanBase) -> None:
    assert base.problems() == []


def test_lips_follow_the_voice(opening: Tensor, scene: Scene) -> None:
    sync = lip_sync(opening, speech_envelope(scene.tracks[0], 25, NUM_FRAMES))
    assert sync.r > 0.75
    assert abs(sync.lag_frames) <= 2


def test_without_a_voice_the_lips_rest(
    denoiser: Denoiser, encoders: Encoders, scene: Scene, region: Tensor, opening: Tensor
) -> None:
    silence = replace(scene, tracks=torch.zeros_like(scene.tracks))
    closed = mouth_opening(denoiser, encoders, silence, region)
    # The portrait's mouth may be open, and closes first.
    assert closed[12:].std() < 0.5 * opening[12:].std()


@pytest.mark.slow
def test_two_hundred_steps_from_the_base_lower_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shards = tmp_path / "shards"
    prepare(
        SAMPLE / "shards", shards, recipe=QUICKSTART, encode=True, window=None, buckets=None,
        clip_seconds=20, sequence_fps=25, overwrite=False, report=lambda line: None,
    )  # fmt: skip
    words = [f"data.path={shards}", "preview=null", "trainer.max_steps=200", "data.num_workers=0"]
    folder = fit(QUICKSTART, words, lambda line: None)
    with (folder / "metrics.csv").open() as file:
        losses = [float(row["loss/velocity"]) for row in csv.DictReader(file)]
    assert len(losses) == 200
    assert statistics.mean(losses[-50:]) < 0.9 * statistics.mean(losses[:50])


def test_tiled_decoding_is_nearly_that_of_whole_frames() -> None:
    whole, tiled = (
        WanBase(path=str(BASE), dtype="float32", decode_tile=tile).load_encoders(
            torch.device("cpu")
        )
        for tile in (None, 96)
    )
    coarse = draw_normal((1, 27, 5, 5), "coarse")
    pixels = F.interpolate(coarse, (128, 160), mode="bicubic").view(1, 3, 9, 128, 160).clamp(-1, 1)
    latents = whole.encode_video(pixels)
    assert torch.equal(tiled.encode_video(pixels), latents)
    expected, decoded = whole.decode_video(latents), tiled.decode_video(latents)
    assert decoded.shape == expected.shape
    assert not torch.equal(decoded, expected)
    assert (decoded - expected).abs().mean() < 0.02
    assert expected.std() > 0.2
    small = latents[..., :8, :8]
    assert torch.equal(tiled.decode_video(small), whole.decode_video(small))
