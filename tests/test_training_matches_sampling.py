"""A training batch is what the sampler feeds the network for the same material."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kit.batch import Batch, Conditions, collate
from kit.data.clips import RawSample
from kit.data.encode import ClipEncoder, to_video
from kit.draws import draw_normal
from kit.models.base import Encoders
from kit.objectives.flow_matching import noisy_latents
from kit.sampling.chunks import Progress
from kit.sampling.frames import to_pictures, to_pixels
from kit.sampling.pipeline import TalkSampler, no_progress
from kit.sampling.scene import Scene

SEED, WINDOW, CONTEXT, SIZE = 5, 9, 5, 32
CLIP = to_pictures(draw_normal((30, 3, SIZE, SIZE), "clip").tanh())
TRACKS = 0.1 * draw_normal((2, 30 * 640), "tracks")
MASKS = torch.zeros(2, SIZE // 8, SIZE // 8)
MASKS[0, :, :2], MASKS[1, :, 2:] = 1, 1


class ClipSource:
    """The clip as a source video."""

    def frame(self, index: int) -> Tensor:
        return to_pixels(CLIP[index])

    def again(self) -> "ClipSource":
        return self


class PerfectDenoiser(nn.Module):
    """Knows the clip, so that sampling passes through exactly the states that training draws."""

    def __init__(self, batch: Batch, noise: Tensor) -> None:
        super().__init__()
        self.velocity = noise - batch.latents
        self.seen: list[tuple[Tensor, Tensor, Conditions]] = []

    def forward(self, noisy: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        self.seen.append((noisy, sigma, conditions))
        return self.velocity


def training_batch(
    encoders: Encoders, start: int, num_speakers: int, *, shows_last: bool = False
) -> Batch:
    raw = RawSample(
        key="clip",
        epoch=0,
        index=0,
        start=start,
        pixels=CLIP[start : start + WINDOW],
        reference=CLIP[start],
        tracks=TRACKS[:num_speakers],
        caption="two people talk",
        speaker_masks=MASKS[:num_speakers],
        num_context_frames=CONTEXT if start and not shows_last else 1,
        shows_last=shows_last,
    )
    return collate([ClipEncoder(encoders, torch.float32, "").sample(raw, 4)])


@pytest.mark.parametrize("num_speakers", [1, 2])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_network_sees_the_same(tiny_encoders: Encoders, number: int, num_speakers: int) -> None:
    sampler = TalkSampler(
        steps=4, text_scale=1.0, audio_scale=1.0, num_frames=WINDOW, context_frames=CONTEXT
    )
    start = number * (WINDOW - CONTEXT)
    batch = training_batch(tiny_encoders, start, num_speakers)
    noise = draw_normal(tuple(batch.latents.shape), SEED, number, "noise")
    denoiser = PerfectDenoiser(batch, noise)
    scene = Scene("two people talk", TRACKS[:num_speakers], ClipSource(), MASKS[:num_speakers])
    progress = None
    if number:
        tail = to_video(np.asarray(CLIP[start : start + CONTEXT]))
        progress = Progress(number, tail, tail[:, :0])
    next(sampler.sample(denoiser, tiny_encoders, scene, SEED, no_progress, progress))

    compare(denoiser, batch, noise)


def test_both_ends_are_shown_alike(tiny_encoders: Encoders) -> None:
    sampler = TalkSampler(
        steps=4, text_scale=1.0, audio_scale=1.0, num_frames=WINDOW, context_frames=1,
        continuity="both_ends",
    )  # fmt: skip
    batch = training_batch(tiny_encoders, WINDOW - 1, 1, shows_last=True)
    noise = draw_normal(tuple(batch.latents.shape), SEED, 1, "noise")
    denoiser = PerfectDenoiser(batch, noise)
    scene = Scene("two people talk", TRACKS[:1], ClipSource(), MASKS[:1])
    tail = to_video(np.asarray(CLIP[WINDOW - 1 : WINDOW]))
    progress = Progress(1, tail, tail[:, :0])
    next(sampler.sample(denoiser, tiny_encoders, scene, SEED, no_progress, progress))
    assert batch.conditions.reference_mask[0, :, -1].tolist() == [0, 0, 0, 1]
    compare(denoiser, batch, noise)


def compare(denoiser: PerfectDenoiser, batch: Batch, noise: Tensor) -> None:
    """Compare what a sampler fed the denoiser with what training feeds it."""
    assert len(denoiser.seen) == 4
    for noisy, sigma, conditions in denoiser.seen:
        torch.testing.assert_close(noisy, noisy_latents(batch, noise, sigma), rtol=0, atol=1e-5)
        for field in fields(Conditions):
            ours, theirs = getattr(conditions, field.name), getattr(batch.conditions, field.name)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=field.name)
