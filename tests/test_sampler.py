"""Sampling: any length, chunk by chunk."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kit.batch import Conditions
from kit.data.media import VideoWriter
from kit.draws import draw_normal
from kit.models.base import Encoders
from kit.models.wan import Wan
from kit.sampling.chunks import Chunk
from kit.sampling.color import rgb_to_lab
from kit.sampling.frames import StillSource, VideoSource, to_pictures, to_pixels
from kit.sampling.pipeline import TalkSampler, no_progress
from kit.sampling.scene import Scene, chunk_conditions

MakeWan = Callable[[], Wan]
PORTRAIT = to_pictures(draw_normal((1, 3, 40, 36), "portrait").tanh())[0]


def make_sampler(**options: Any) -> TalkSampler:
    return TalkSampler(**{"steps": 2, "num_frames": 9, "context_frames": 5, **options})


def make_scene(num_frames: int, num_speakers: int = 1) -> Scene:
    masks = torch.zeros(num_speakers, 4, 4)
    for speaker in range(num_speakers):
        masks[speaker, :, 2 * speaker : 2 * speaker + 2] = 1
    tracks = 0.1 * draw_normal((num_speakers, 640 * num_frames), "speech")
    return Scene("a person speaks", tracks, StillSource(PORTRAIT, (32, 32)), masks)


def sample(
    sampler: TalkSampler, denoiser: nn.Module, encoders: Encoders, scene: Scene, seed: int = 0
) -> list[Tensor]:
    made = sampler.sample(denoiser, encoders, scene, seed, no_progress)
    return [pixels for pixels, _ in made]


@pytest.fixture(scope="module")
def denoiser(tiny_denoiser: MakeWan) -> Wan:
    return tiny_denoiser()


@pytest.mark.parametrize(
    ("num_frames", "shown"), [(3, [3]), (9, [9]), (15, [9, 4, 2]), (17, [9, 4, 4])]
)
def test_the_video_is_as_long_as_the_speech(
    denoiser: Wan, tiny_encoders: Encoders, num_frames: int, shown: list[int]
) -> None:
    sampler = make_sampler(text_scale=1.0, audio_scale=1.0, steps=1)
    chunks = sample(sampler, denoiser, tiny_encoders, make_scene(num_frames))
    assert [len(chunk) for chunk in chunks] == shown
    for chunk in chunks:
        assert chunk.shape[1:] == (3, 32, 32)
        assert chunk.abs().max() <= 1 + 1e-5
        assert chunk.std() > 0.01


def test_seeds_decide_the_frames(denoiser: Wan, tiny_encoders: Encoders) -> None:
    sampler, scene = make_sampler(), make_scene(12, num_speakers=2)

    def frames(seed: int) -> Tensor:
        torch.manual_seed(17 + seed)
        return torch.cat(sample(sampler, denoiser, tiny_encoders, scene, seed))

    first = frames(0)
    assert torch.equal(frames(0), first)
    assert not torch.allclose(frames(1), first, atol=0.01)


def test_a_chunk_is_handed_over_before_the_next_begins(
    denoiser: Wan, tiny_encoders: Encoders
) -> None:
    told: list[tuple[int, int]] = []

    def tell(chunk: Chunk, step: int) -> None:
        told.append((chunk.index, step))

    chunks = make_sampler().sample(denoiser, tiny_encoders, make_scene(12), 0, tell)
    assert told == []
    next(chunks)
    assert told == [(0, 1), (0, 2)]
    next(chunks)
    assert told == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_context_is_clean_before_and_after_every_step() -> None:
    sampler, context = make_sampler(steps=3), draw_normal((1, 16, 2, 4, 4), "context")
    shown = []

    def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
        shown.append(noisy)
        return draw_normal((1, 16, 3, 4, 4), "velocity")

    noise = draw_normal((1, 16, 3, 4, 4), "noise")
    latents = sampler.denoise(velocity, noise, context, lambda step: None)
    assert all(torch.equal(noisy[:, :, :2], context) for noisy in [*shown, latents])
    # A constant velocity leads from noise straight to noise - velocity.
    expected = (noise - draw_normal((1, 16, 3, 4, 4), "velocity"))[:, :, 2:]
    torch.testing.assert_close(latents[:, :, 2:], expected)


def test_context_is_the_portrait_then_the_last_frames(
    denoiser: Wan, tiny_encoders: Encoders
) -> None:
    shown: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, noisy: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
            shown.append(noisy[:1])
            predicted: Tensor = denoiser(noisy, sigma, conditions)
            return predicted

    scene = make_scene(13)
    first, _ = sample(make_sampler(steps=1), Watching(), tiny_encoders, scene)
    portrait = tiny_encoders.encode_video(scene.source.frame(0)[None, :, None])
    tail = tiny_encoders.encode_video(first[None, -5:].transpose(1, 2))
    assert torch.equal(shown[0][:, :, :1], portrait)
    assert not torch.isclose(shown[0][:, :, 1:], portrait).all()
    assert torch.equal(shown[1][:, :, :2], tail)
    assert not torch.equal(shown[0][:, :, 2:], shown[1][:, :, 2:])


def test_references_follow_the_source_and_colours_its_first_frame(
    denoiser: Wan, tiny_encoders: Encoders
) -> None:
    asked: list[int] = []

    class Brightening:
        def frame(self, index: int) -> Tensor:
            asked.append(index)
            return 0.1 * to_pixels(PORTRAIT)[:, :32, :32] + 0.03 * index

        def again(self) -> "Brightening":
            return self

    scene = replace(make_scene(17), source=Brightening())
    video = torch.cat(sample(make_sampler(steps=1), denoiser, tiny_encoders, scene))
    assert asked == [0, 0, 4, 8]
    frames, first = rgb_to_lab(video.transpose(0, 1) / 2 + 0.5), Brightening().frame(0)
    wanted = rgb_to_lab(first / 2 + 0.5)
    for frame in frames.unbind(1):
        torch.testing.assert_close(frame.mean((-2, -1)), wanted.mean((-2, -1)), rtol=0, atol=0.1)


def test_guidance_runs_the_branches_it_needs(denoiser: Wan, tiny_encoders: Encoders) -> None:
    scene = make_scene(9)

    class Counting(nn.Module):
        def forward(self, noisy: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
            self.size = len(noisy)
            predicted: Tensor = denoiser(noisy, sigma, conditions)
            return predicted

    for text_scale, audio_scale, size in ((5.0, 4.0, 3), (1.0, 4.0, 2), (1.0, 1.0, 1)):
        counting = Counting()
        sampler = make_sampler(text_scale=text_scale, audio_scale=audio_scale, steps=1)
        sample(sampler, counting, tiny_encoders, scene)
        assert counting.size == size


def test_audio_guidance_of_zero_ignores_the_speech(denoiser: Wan, tiny_encoders: Encoders) -> None:
    sampler = make_sampler(text_scale=1.0, audio_scale=0.0, steps=1)
    scene = make_scene(9)
    other = replace(scene, tracks=scene.tracks.flip(1))
    (first,), (second,) = (sample(sampler, denoiser, tiny_encoders, s) for s in (scene, other))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)


def test_unfit_options_are_said_in_words() -> None:
    assert make_sampler().problems(4) == []
    lines = make_sampler(num_frames=10, context_frames=12).problems(4)
    assert lines[:2] == [
        "sampling.num_frames: 10 is not 4n + 1 frames",
        "sampling.context_frames: 12 is not 4n + 1 frames",
    ]
    assert "leave nothing new" in lines[2]


def test_pictures_and_pixels() -> None:
    pixels = to_pixels(PORTRAIT)
    assert pixels.shape == (3, 40, 36)
    assert pixels.abs().max() <= 1
    assert (to_pictures(pixels[None])[0] == PORTRAIT).all()
    assert to_pictures(torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_a_video_source_gives_frames_by_time(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    with VideoWriter(clip, fps=25, height=40, width=36, speech=None) as writer:
        writer.write(np.stack([np.roll(PORTRAIT, 3 * shift, axis=1) for shift in range(10)]))
    source = VideoSource(clip, (32, 32), fps=25)
    frames = [source.frame(index) for index in (0, 4, 4, 10_000, 20_000)]
    assert all(frame.shape == (3, 32, 32) for frame in frames)
    assert not torch.equal(frames[0], frames[1])
    assert torch.equal(frames[1], frames[2])
    assert torch.equal(frames[3], frames[4])


def test_without_reference_the_source_tells_only_the_size(
    denoiser: Wan, tiny_encoders: Encoders
) -> None:
    scene = replace(make_scene(12), has_reference=False)
    other = replace(scene, source=StillSource(PORTRAIT[::-1].copy(), (32, 32)))
    with_reference = replace(scene, has_reference=True)
    frames = [
        torch.cat(sample(make_sampler(), denoiser, tiny_encoders, each))
        for each in (scene, other, with_reference)
    ]
    assert torch.equal(frames[0], frames[1])
    assert not torch.allclose(frames[0], frames[2], atol=0.01)


def test_projected_guidance_begins_anew_with_each_chunk(
    denoiser: Wan, tiny_encoders: Encoders
) -> None:
    scene = make_scene(12)
    plain, projected = (
        torch.cat(sample(make_sampler(guidance=name), denoiser, tiny_encoders, scene))
        for name in ("plain", "projected")
    )
    assert not torch.allclose(plain, projected, atol=0.01)
    sampler, conditions = make_sampler(guidance="projected", steps=1), one_chunk(tiny_encoders)
    noisy, sigma = draw_normal(tuple(conditions.reference.shape), "noise"), torch.tensor(0.9)
    with torch.no_grad():
        first = sampler.guided(denoiser, conditions, conditions.text)
        velocities = [first(noisy, sigma), first(noisy, sigma)]
        again = sampler.guided(denoiser, conditions, conditions.text)(noisy, sigma)
    assert torch.equal(velocities[0], again)
    assert not torch.allclose(velocities[1], again, atol=1e-3)


def one_chunk(encoders: Encoders) -> Conditions:
    """Encode what steers the first chunk of a scene."""
    sampler, scene = make_sampler(), make_scene(9)
    encoded = sampler.encode(encoders, scene)
    (chunk,) = sampler.plan(encoded.num_frames)
    return chunk_conditions(encoders, encoded, chunk, scene.source.frame(0))


class Travelling(nn.Module):
    """A denoiser that notes where it is told to be, and where it is when it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.journal: list[str] = []

    def to(self, *args: Any, **kwargs: Any) -> "Travelling":
        self.journal.append(f"to {args[0]}")
        return self

    def forward(self, noisy: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        self.journal.append("predict")
        return torch.zeros_like(noisy)


class Watching:
    """Encoders that note in a denoiser's journal when they work on video."""

    def __init__(self, encoders: Encoders, journal: list[str]) -> None:
        self.encoders, self.journal = encoders, journal

    def __getattr__(self, name: str) -> Any:
        if name in ("encode_video", "decode_video"):
            self.journal.append(name)
        return getattr(self.encoders, name)


def test_a_denoiser_leaves_the_device_while_encoders_work(tiny_encoders: Encoders) -> None:
    scale = {"text_scale": 1.0, "audio_scale": 1.0}
    denoiser = Travelling()
    encoders: Any = Watching(tiny_encoders, denoiser.journal)
    sample(make_sampler(offload="turns", steps=1, **scale), denoiser, encoders, make_scene(12))
    first = ["encode_video", "encode_video", "to cpu", "predict", "to cpu", "decode_video"]
    # The reference of the second chunk is that of the first, so that only its context is encoded.
    assert denoiser.journal == first + first[1:]
    denoiser.journal.clear()
    sample(make_sampler(steps=1, **scale), denoiser, tiny_encoders, make_scene(12))
    assert set(denoiser.journal) == {"predict"}


def test_offloading_changes_no_frame(denoiser: Wan, tiny_encoders: Encoders) -> None:
    made = [
        torch.cat(sample(make_sampler(offload=o), denoiser, tiny_encoders, make_scene(12)))
        for o in ("none", "turns")
    ]
    assert torch.equal(*made)
