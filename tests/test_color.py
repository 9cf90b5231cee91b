"""Colour correction in CIE Lab."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kit.draws import draw_normal
from kit.sampling.color import lab_to_rgb, match_color, rgb_to_lab
from tests import outside


def picture(seed: int, *shape: int) -> Tensor:
    """Draw pixels well inside -1 to 1."""
    return torch.tanh(0.3 * draw_normal((3, *shape), seed) + 0.1 * seed)


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((1, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 1, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 1), (32.30, 79.19, -107.86)),
        ((1, 1, 1), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((0.5, 0.5, 0.5), (53.39, 0, 0)),
    ],
)
def test_known_colours(rgb: tuple[float, ...], lab: tuple[float, ...]) -> None:
    converted = rgb_to_lab(torch.tensor(rgb).float())
    assert converted.tolist() == pytest.approx(lab, abs=0.1)


def test_lab_and_back() -> None:
    levels = torch.linspace(0, 1, 9)
    cube = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij"))
    torch.testing.assert_close(lab_to_rgb(rgb_to_lab(cube)), cube, rtol=0, atol=1e-4)


def test_strength_zero_is_the_identity() -> None:
    frames = picture(1, 2, 8, 8)
    assert torch.equal(match_color(frames, picture(2, 8, 8), 0.0), frames)


def test_frames_that_have_the_colours_keep_them() -> None:
    reference = picture(1, 8, 8)
    frames = torch.stack([reference, reference.flip(-1)], dim=1)
    torch.testing.assert_close(match_color(frames, reference, 1.0), frames, rtol=0, atol=1e-4)


def test_mean_and_spread_become_those_of_the_reference() -> None:
    frames, reference = picture(1, 3, 16, 16), picture(2, 16, 16)
    moved = match_color(frames, reference, 1.0)
    lab, wanted = rgb_to_lab(moved / 2 + 0.5), rgb_to_lab(reference / 2 + 0.5)
    for frame in range(3):
        torch.testing.assert_close(
            lab[:, frame].mean((-2, -1)), wanted.mean((-2, -1)), rtol=0, atol=0.05
        )
        torch.testing.assert_close(
            lab[:, frame].std((-2, -1)), wanted.std((-2, -1)), rtol=0, atol=0.05
        )


def test_strength_mixes_in_rgb() -> None:
    frames, reference = picture(1, 2, 8, 8), picture(2, 8, 8)
    half = match_color(frames, reference, 0.5)
    torch.testing.assert_close(half, (frames + match_color(frames, reference, 1.0)) / 2)


def test_a_plain_frame_takes_the_mean_alone() -> None:
    moved = match_color(torch.full((3, 1, 8, 8), 0.2), picture(2, 8, 8), 1.0)
    assert moved.isfinite().all()
    assert moved.flatten(1).std(dim=1).max() < 1e-3


@pytest.mark.parametrize("strength", ["0.5", "1"])
def test_equals_the_reference(strength: str) -> None:
    tensors = load_file(outside.reference("utils.safetensors"))
    frames, wanted = tensors["inputs/color.video"][0], tensors["inputs/color.reference"]
    moved = match_color(frames, wanted[0, :, 0], float(strength))
    assert (moved - tensors[f"outputs/color.{strength}"][0]).abs().max() < 1e-4
