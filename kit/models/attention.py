"""Attention and rotary positions as pure functions; N tokens, h heads, d channels of one head."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROTARY_BASE = 10_000


class Rotation(NamedTuple):
    """Angles by which pairs of channels turn. [..., N, 1, d / 2] each, float32"""

    cos: Tensor
    sin: Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend in the dtype of `value` and put the heads side by side.

    Args:
        query: [B, N, h, d]
        key: [B, N', h, d]
        value: [B, N', h, d]
        mask: True where a key may be seen. [B, 1, 1, N']

    Returns:
        [B, N, h * d]
    """
    query, key, value = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
    mixed: Tensor = _mixture(query)(query, key, value, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(2)


def _mixture(query: Tensor) -> Callable[..., Tensor]:
    """Choose who computes; on a CPU, torch's own takes half of a training step in bfloat16."""
    is_slow = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return mixed_plainly if is_slow and query.requires_grad else F.scaled_dot_product_attention


def mixed_plainly(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """Compute attention by its definition. [B, h, N, d], [B, h, N', d], twice -> [B, h, N, d]"""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # [B, h, N, N']
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    mixed: Tensor = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return mixed


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Give heads an axis of their own. [..., h * d] to [..., h, d]"""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def frequencies(dim: int, device: torch.device) -> Tensor:
    """List the angular frequencies of `dim` channels, in float64. [dim / 2]"""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    return torch.pow(ROTARY_BASE, -exponents)


def rotation(positions: Tensor, dim: int) -> Rotation:
    """Find the angles of positions, which need not be whole numbers. [..., N]"""
    angles = positions.double()[..., None, None] * frequencies(dim, positions.device)
    return Rotation(angles.cos().float(), angles.sin().float())


@lru_cache(maxsize=16)
def grid_rotation(grid: tuple[int, int, int], dim: int, device: torch.device) -> Rotation:
    """Find the angles of a video's tokens, ordered by time, then row, then column.

    Angles are made from their definition at each new grid, not kept as buffers of the network:
    casting it to bfloat16 would round them, and building it without memory would lose them.

    Source:
        Wan2.1: rows and columns take 2 * (d // 6) channels each, time takes the rest.
    """
    side = 2 * (dim // 6)
    # A table made in inference mode could not be used in training afterwards.
    with torch.inference_mode(False), torch.no_grad():
        axes = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
        dims = (dim - 2 * side, side, side)
        parts = [rotation(axis.flatten(), d) for axis, d in zip(axes, dims, strict=True)]
        return Rotation(
            torch.cat([p.cos for p in parts], -1), torch.cat([p.sin for p in parts], -1)
        )


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn neighbouring channels as pairs; the result is float32. [..., N, h, d]"""
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    pairs = (even * turn.cos - odd * turn.sin, even * turn.sin + odd * turn.cos)
    return torch.stack(pairs, dim=-1).flatten(-2)
