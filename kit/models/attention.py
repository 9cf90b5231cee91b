"""Attention and rotary positions as pure functions; N tokens, h heads, d channels of one head."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.models.cpu import mixed_by_head, suits_by_head

ROTARY_BASE = 10_000


class KeysValues(NamedTuple):
    """What queries look at.

    Attributes:
        key: [B, N', h, d]
        value: [B, N', h, d]
        bias: added to the scores; -inf hides a key. [B, 1, 1, N']
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None = None


def attend(query: Tensor, seen: KeysValues) -> Tensor:
    """Attend in the dtype of the values and put the heads side by side.

    Args:
        query: [B, N, h, d]
        seen: keys and values.

    Returns:
        [B, N, h * d]
    """
    dtype = seen.value.dtype
    query, key, value = (x.to(dtype).transpose(1, 2) for x in (query, seen.key, seen.value))
    bias = None if seen.bias is None else seen.bias.to(dtype)
    mixed: Tensor = _mixture(query, key)(query, key, value, attn_mask=bias)
    return mixed.transpose(1, 2).flatten(2)


def _mixture(query: Tensor, key: Tensor) -> Callable[..., Tensor]:
    """Choose who computes; on a CPU, torch's own takes half of a training step in bfloat16."""
    if suits_by_head(query, key):
        return mixed_by_head
    is_slow = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return mixed_plainly if is_slow and query.requires_grad else F.scaled_dot_product_attention


def mixed_plainly(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """Compute attention by its definition. [B, h, N, d], [B, h, N', d], twice -> [B, h, N, d]"""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # [B, h, N, N']
    if attn_mask is not None:
        scores = scores + attn_mask
    mixed: Tensor = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return mixed


def padding_bias(length: int, count: int, device: torch.device) -> Tensor:
    """Let the last two of `length` keys stand for `count` equal ones.

    Equal keys share their weight, so that one key does for all of them with the logarithm of their
    number added to its score. bfloat16 is too coarse for that logarithm: there would be up to 1.6 %
    more or less of them. A second key makes up for what rounding leaves of the first.

    Args:
        length: of all keys.
        count: equal keys, 3 or more.
        device: of the keys.

    Returns:
        Added to the scores, float32. [1, 1, 1, length]
    """
    first = torch.tensor(math.log(0.97 * count), dtype=torch.bfloat16).item()
    bias = torch.zeros(length, device=device)
    bias[-2:] = torch.tensor([first, math.log(count - math.exp(first))])
    return bias.view(1, 1, 1, length)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Give heads an axis of their own. [..., h * d] to [..., h, d]"""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def frequencies(dim: int, device: torch.device) -> Tensor:
    """List the angular frequencies of `dim` channels, in float64. [dim / 2]"""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    return torch.pow(ROTARY_BASE, -exponents)


def rotation(positions: Tensor, dim: int) -> Tensor:
    """Find how pairs of channels turn at positions, which need not be whole numbers.

    Args:
        positions: angles are computed in their dtype. [..., N]
        dim: channels of a head.

    Returns:
        Points on the unit circle. complex64 [..., N, 1, dim / 2]
    """
    angles = positions[..., None, None] * frequencies(dim, positions.device).to(positions)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


@lru_cache(maxsize=16)
def grid_rotation(grid: tuple[int, int, int], dim: int, device: torch.device) -> Tensor:
    """Find how the tokens of a video turn, ordered by time, then row, then column.

    Made from its definition at each new grid, not kept as a buffer of the network: casting it to
    bfloat16 would round it, and building it without memory would lose it.

    Returns:
        Points on the unit circle. complex64 [N, 1, dim / 2]

    Source:
        Wan2.1: rows and columns take 2 * (d // 6) channels each, time takes the rest.
    """
    side = 2 * (dim // 6)
    # A table made in inference mode could not be used in training afterwards.
    with torch.inference_mode(False), torch.no_grad():
        places = (torch.arange(n, dtype=torch.float64, device=device) for n in grid)
        axes = torch.meshgrid(*places, indexing="ij")
        dims = (dim - 2 * side, side, side)
        parts = [rotation(axis.flatten(), d) for axis, d in zip(axes, dims, strict=True)]
        return torch.cat(parts, dim=-1)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn neighbouring channels as pairs; the result is float32. [..., N, h, d]"""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)
