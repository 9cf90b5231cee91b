"""Samples of one shape become a batch; padding changes nothing that is real."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from kit.batch import Batch, Conditions, Sample, collate
from kit.draws import draw_normal


def make_sample(index: int, text_length: int, num_speakers: int) -> Sample:
    return Sample(
        key=f"clip{index}",
        epoch=4,
        index=index,
        latents=draw_normal((16, 3, 4, 4), index, "latents"),
        reference=draw_normal((16, 3, 4, 4), index, "reference"),
        image=draw_normal((5, 8), index, "image"),
        text=draw_normal((text_length, 8), index, "text"),
        null_text=draw_normal((2, 8), "null"),
        audio=draw_normal((num_speakers, 9, 5, 2, 8), index, "audio"),
        speaker_masks=torch.ones(num_speakers, 4, 4),
        num_context=index,
    )


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [make_sample(0, 7, 1), make_sample(1, 3, 2)]


@pytest.fixture(scope="module")
def stacked(samples: list[Sample]) -> Batch:
    return collate(samples)


def tensors(conditions: Conditions) -> dict[str, Tensor]:
    return {field.name: getattr(conditions, field.name) for field in fields(conditions)}


def test_samples_keep_their_values(samples: list[Sample], stacked: Batch) -> None:
    assert stacked.keys == ("clip0", "clip1")
    assert stacked.draws.tolist() == [[4, 0], [4, 1]]
    assert stacked.num_context.tolist() == [0, 1]
    for i, sample in enumerate(samples):
        assert torch.equal(stacked.latents[i], sample.latents)
        assert torch.equal(stacked.null_text[i], sample.null_text)
        assert torch.equal(stacked.conditions.image[i], sample.image)
        assert torch.equal(stacked.conditions.reference[i], sample.reference)
        assert torch.equal(stacked.conditions.text[i, : len(sample.text)], sample.text)
        assert torch.equal(stacked.conditions.audio[i, : len(sample.audio)], sample.audio)


def test_padding_is_zero(stacked: Batch) -> None:
    conditions = stacked.conditions
    assert conditions.text.shape == (2, 7, 8)
    assert not conditions.text[1, 3:].any()
    assert conditions.audio.shape == (2, 2, 9, 5, 2, 8)
    assert not conditions.audio[0, 1].any()
    assert not conditions.speaker_masks[0, 1].any()
    assert conditions.num_speakers.tolist() == [1, 2]


def test_the_reference_mask_marks_the_first_frame_alone(stacked: Batch) -> None:
    mask = stacked.conditions.reference_mask
    assert mask.shape == (2, 4, 3)
    assert mask[:, :, 0].all()
    assert not mask[:, :, 1:].any()


def test_numbers_change_dtype_and_counts_do_not(stacked: Batch) -> None:
    moved = stacked.to(torch.device("cpu"), torch.bfloat16)
    assert moved.latents.dtype == moved.null_text.dtype == torch.bfloat16
    assert moved.conditions.text.dtype == torch.bfloat16
    assert moved.conditions.num_speakers.dtype == moved.num_context.dtype == torch.int64
    kept = stacked.to(torch.device("cpu"))
    assert kept.latents.dtype == torch.float32
    assert stacked.to(torch.device("meta")).conditions.audio.is_meta


def test_conditions_are_put_behind_each_other(stacked: Batch) -> None:
    other = replace(stacked.conditions, text=stacked.conditions.text + 1)
    together = tensors(Conditions.cat([stacked.conditions, other]))
    for name, value in together.items():
        expected = torch.cat([tensors(stacked.conditions)[name], tensors(other)[name]])
        assert torch.equal(value, expected)
