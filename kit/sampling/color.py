"""Keep the colours of a long video where its first frame had them."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

# sRGB to XYZ under D65 (IEC 61966-2-1), rows give X, Y, Z.
_RGB_TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE = (0.95047, 1.0, 1.08883)
_EPSILON = 0.008856
_SLOPE, _OFFSET = 7.787, 16 / 116


Space = Literal["lab", "rgb"]


def match_color(frames: Tensor, reference: Tensor, strength: float, space: Space = "lab") -> Tensor:
    """Give each frame the mean and spread of the reference's colours, channel by channel.

    Args:
        frames: pixels, -1 to 1. [3, T, H, W]
        reference: pixels, -1 to 1. [3, H, W]
        strength: 0 leaves the frames, 1 moves them fully.
        space: whose channels.

    Source: InfiniteTalk's colour correction (Reinhard et al. 2001) in CIE Lab, D65.
    """
    if strength == 0:
        return frames
    enter, leave = _SPACES[space]
    pixels = (frames.float() + 1) / 2
    moved = leave(_transfer(enter(pixels), enter((reference.float() + 1) / 2)))
    return torch.lerp(pixels, moved.clamp(0, 1), strength) * 2 - 1


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """Convert sRGB, 0 to 1, to CIE Lab. [3, ...]"""
    linear = torch.where(rgb > 0.04045, ((rgb.clamp(min=0) + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = _mix(_matrix(rgb), linear) / _white(rgb)
    root = xyz.clamp(min=_EPSILON) ** (1 / 3)
    x, y, z = torch.where(xyz > _EPSILON, root, _SLOPE * xyz + _OFFSET)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def lab_to_rgb(lab: Tensor) -> Tensor:
    """Convert CIE Lab to sRGB; colours outside sRGB fall outside 0 to 1. [3, ...]"""
    lightness, a, b = lab
    y = (lightness + 16) / 116
    roots = torch.stack([y + a / 500, y, (y - b / 200).clamp(min=0)])
    xyz = torch.where(roots > _EPSILON ** (1 / 3), roots**3, (roots - _OFFSET) / _SLOPE)
    linear = _mix(torch.linalg.inv(_matrix(lab)), xyz * _white(lab))
    encoded = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, encoded, linear * 12.92)


def _same(rgb: Tensor) -> Tensor:
    return rgb


_SPACES: dict[Space, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "lab": (rgb_to_lab, lab_to_rgb),
    "rgb": (_same, _same),
}


def _transfer(frames: Tensor, reference: Tensor) -> Tensor:
    mean = frames.mean((-2, -1), keepdim=True)
    std = frames.std((-2, -1), correction=0, keepdim=True)
    to_mean = reference.mean((-2, -1))[:, None, None, None]
    to_std = reference.std((-2, -1), correction=0)[:, None, None, None]
    scale = torch.where(std > 0, to_std / std.clamp(min=1e-12), torch.zeros_like(std))
    return (frames - mean) * scale + to_mean


def _mix(matrix: Tensor, channels: Tensor) -> Tensor:
    return torch.einsum("ij,j...->i...", matrix, channels)


def _matrix(like: Tensor) -> Tensor:
    return torch.tensor(_RGB_TO_XYZ, device=like.device, dtype=like.dtype)


def _white(like: Tensor) -> Tensor:
    white = torch.tensor(_WHITE, device=like.device, dtype=like.dtype)
    return white.view(3, *[1] * (like.ndim - 1))
