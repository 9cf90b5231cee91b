"""What layers do to video tokens, with the roundings of the public code; B, N tokens, D width."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def by_pieces(update: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Update tokens that do not see each other, without gradients a quarter of them at a time.

    What is needed on the way, such as the wide layer inside a feed-forward layer, is then no larger
    than the tokens themselves. [B, N, D]
    """
    if torch.is_grad_enabled():
        return update(x)
    updated = torch.empty_like(x)
    for some, target in zip(x.chunk(4, dim=1), updated.chunk(4, dim=1), strict=True):
        target.copy_(update(some))
    return updated


def normalize(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Divide by the root mean square in float32, round to the input's dtype, then scale."""
    return (F.rms_norm(x.float(), x.shape[-1:], eps=norm.eps).to(x.dtype) * norm.weight).to(x.dtype)


def modulate(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise, round to the input's dtype, then scale and shift in float32. [B, N, D]"""
    normed = F.layer_norm(x, norm.normalized_shape, eps=norm.eps).to(x.dtype)
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


def add_gated(x: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    """Add in float32. [B, N, D]"""
    return torch.addcmul(x, change, gate).to(x.dtype)


def linear_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a layer in float32, outside of autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def unpatchify(patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Lay out patches of 2x2 positions, channels last in each, as a video [B, C, F, H, W]."""
    cells = patches.reshape(len(patches), *grid, 2, 2, -1)  # [B, F, h, w, 2, 2, C]
    return cells.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
