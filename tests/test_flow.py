"""The straight path between latents and noise, and its inverse."""

import pytest
import torch

from kit.draws import draw_normal
from kit.flow import (
    add_noise,
    context_frames,
    hold_context,
    shift_sigma,
    velocity_target,
)

LATENTS, NOISE = draw_normal((2, 3, 4, 2, 2), "x"), draw_normal((2, 3, 4, 2, 2), "e")


def test_the_path_leads_from_latents_to_noise() -> None:
    assert torch.equal(add_noise(LATENTS, NOISE, torch.zeros(2)), LATENTS)
    assert torch.equal(add_noise(LATENTS, NOISE, torch.ones(2)), NOISE)
    mixed = add_noise(LATENTS, NOISE, torch.tensor([0.0, 1.0]))
    assert torch.equal(mixed, torch.stack([LATENTS[0], NOISE[1]]))


def test_velocity_is_the_derivative_of_the_path() -> None:
    here, there = torch.tensor([0.25, 0.5]), torch.tensor([0.75, 1.0])
    step = add_noise(LATENTS, NOISE, there) - add_noise(LATENTS, NOISE, here)
    torch.testing.assert_close(step / 0.5, velocity_target(LATENTS, NOISE))


def test_the_dtype_of_latents_stays() -> None:
    noisy = add_noise(LATENTS.bfloat16(), NOISE.bfloat16(), torch.tensor([0.3, 0.6]))
    assert noisy.dtype == torch.bfloat16


def test_shift() -> None:
    levels = torch.linspace(0, 1, 11)
    assert torch.equal(shift_sigma(levels, 1.0), levels)
    shifted = shift_sigma(levels, 7.0)
    assert shifted[[0, -1]].tolist() == [0, 1]
    assert (shifted.diff() > 0).all()
    # The middle of a shift s lies at s / (s + 1).
    assert shifted[5] == pytest.approx(7 / 8)
    torch.testing.assert_close(shift_sigma(shifted, 1 / 7), levels)
    torch.testing.assert_close(shift_sigma(shift_sigma(levels, 2.0), 3.0), shift_sigma(levels, 6.0))


def test_context_is_held_for_each_sample() -> None:
    held = hold_context(NOISE, LATENTS, torch.tensor([0, 3]))
    assert torch.equal(held[0], NOISE[0])
    assert torch.equal(held[1, :, :3], LATENTS[1, :, :3])
    assert torch.equal(held[1, :, 3:], NOISE[1, :, 3:])


def test_context_may_be_shorter_than_the_video() -> None:
    held = hold_context(NOISE, LATENTS[:, :, :2], torch.tensor([1, 2]))
    assert held.shape == NOISE.shape
    assert torch.equal(held[0, :, :1], LATENTS[0, :, :1])
    assert torch.equal(held[0, :, 1:], NOISE[0, :, 1:])
    assert torch.equal(held[1, :, :2], LATENTS[1, :, :2])


def test_context_frames_are_the_leading_ones() -> None:
    marked = context_frames(torch.tensor([0, 1, 4]), 4)
    assert marked.int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
