"""Uni3C's controller: a small transformer that runs beside the base, one block behind another.

B is the batch, D the width of the base, d that of the controller, N the number of video tokens,
F, H, W frames, rows and columns of latents.

Source: Uni3C (arXiv 2504.14899) and its released code; parameters have its names.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.models.attention import KeysValues, attend, grid_rotation, rotate, split_heads
from kit.models.tokens import add_gated, by_pieces, linear_float32, normalize

PATCH = (1, 2, 2)
CELL = (4, 8, 8)
"""Video frames, rows and columns of pixels that become one latent position."""

GROUP_CHANNELS = 8


@dataclass(frozen=True)
class Sizes:
    """Sizes of a controller.

    Attributes:
        in_channels: of the latents that it reads: noisy ones, first-frame mask, render.
        guide_channels: of what it reads at the size of pixels: 1 for holes, 6 for cameras.
        guide_dim: width of the layer behind the guide; a multiple of 8.
        base_dim: width of the base's tokens.
        time_dim: width of the base's time embedding.
        dim: width of the controller.
        ffn_dim: width inside its feed-forward layers.
        num_heads: of its attention.
        num_layers: blocks, each of which adds something after the base's block of its number.
    """

    in_channels: int
    guide_channels: int
    guide_dim: int
    base_dim: int
    time_dim: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int


class Rendered(NamedTuple):
    """What the controller sees of the render: the same in all steps.

    Attributes:
        tokens: the render's part of the patch embedding, and the guide's embedding. [B, N, D]
        grid: frames, rows and columns of tokens.
    """

    tokens: Tensor
    grid: tuple[int, int, int]


class ModulatedNorm(nn.Module):
    """Layer norm with weights of its own, scaled, shifted and gated by the noise level."""

    def __init__(self, time_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(time_dim, 3 * dim)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Give what goes into a branch [B, N, d] and the gate of what comes out [B, 1, d]."""
        modulation = linear_float32(self.linear, F.silu(time.float()))
        shift, scale, gate = modulation[:, None].chunk(3, dim=-1)
        normed = self.norm(x).float()
        return torch.addcmul(shift, normed, 1 + scale).to(x.dtype), gate


class SelfAttention(nn.Module):
    """Attention of all video tokens to each other."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=1e-6) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Mix tokens, which turn by their places. [B, N, d]"""
        query, key = (
            rotate(split_heads(normalize(norm, project(x)), self.num_heads), rotation)
            for project, norm in ((self.to_q, self.norm_q), (self.to_k, self.norm_k))
        )
        value = split_heads(self.to_v(x), self.num_heads)
        mixed: Tensor = self.to_out[0](attend(query, KeysValues(key, value)))
        return mixed


class Block(nn.Module):
    """Self-attention and a feed-forward layer; no text, no audio."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm1 = ModulatedNorm(sizes.time_dim, sizes.dim)
        self.self_attn = SelfAttention(sizes.dim, sizes.num_heads)
        self.norm2 = ModulatedNorm(sizes.time_dim, sizes.dim)
        self.ffn = nn.Sequential(
            nn.Linear(sizes.dim, sizes.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(sizes.ffn_dim, sizes.dim),
        )

    def forward(self, x: Tensor, time: Tensor, rotation: Tensor) -> Tensor:
        """Update the tokens. [B, N, d]"""
        normed, gate = self.norm1(x, time)
        x = add_gated(x, self.self_attn(normed, rotation), gate)
        normed, gate = self.norm2(x, time)
        return add_gated(x, by_pieces(self.ffn, normed), gate)


class GuideEmbedding(nn.Module):
    """Embeds what is given for every pixel: where the render has holes, and the rays of cameras."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.mask_proj = nn.Sequential(
            nn.Conv3d(sizes.guide_channels, sizes.guide_dim, CELL, stride=CELL),
            nn.GroupNorm(sizes.guide_dim // GROUP_CHANNELS, sizes.guide_dim),
            nn.SiLU(),
        )
        self.mask_zero_proj = _zeroed(nn.Conv3d(sizes.guide_dim, sizes.base_dim, PATCH, PATCH))

    def forward(self, guide: Tensor) -> Tensor:
        """Embed; the first frame is one latent frame alone. [B, C, T, 8H, 8W] to [B, N, D]"""
        padded = F.pad(guide, (0, 0, 0, 0, CELL[0] - 1, 0))
        return _tokens(self.mask_zero_proj(self.mask_proj(padded)))


class Stack(nn.Module):
    """The blocks between the way in from the base's width and the ways back to it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        same = sizes.base_dim == sizes.dim
        self.proj_in = nn.Identity() if same else nn.Linear(sizes.base_dim, sizes.dim)
        self.controlnet_blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.num_layers))
        self.proj_out = nn.ModuleList(
            _zeroed(nn.Linear(sizes.dim, sizes.base_dim)) for _ in range(sizes.num_layers)
        )


class Controller(nn.Module):
    """Says what to add to the base's tokens after its first blocks; new ones say nothing.

    It reads neither text nor audio, so all guidance branches share what it says.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.controlnet_patch_embedding = nn.Conv3d(
            sizes.in_channels, sizes.base_dim, PATCH, stride=PATCH
        )
        self.controlnet_mask_embedding = GuideEmbedding(sizes)
        self.controlnet = Stack(sizes)

    def embed_render(self, render: Tensor, guide: Tensor | None = None) -> Rendered:
        """Embed what is the same in all steps.

        Args:
            render: normalised latents of the render. [B, C, F, H, W]
            guide: 1 where the render has a hole, then the cameras' rays; none is not the same as
                zeros. [B, guide_channels, 4F - 3, 8H, 8W]
        """
        weight = self.controlnet_patch_embedding.weight
        seen = F.conv3d(render.to(weight.dtype), weight[:, -render.shape[1] :], stride=PATCH)
        tokens = _tokens(seen)
        if guide is not None:
            tokens = tokens + self.controlnet_mask_embedding(guide.to(weight.dtype))
        return Rendered(tokens, (seen.shape[2], seen.shape[3], seen.shape[4]))

    def embed(self, noisy: Tensor, rendered: Rendered) -> Tensor:
        """Embed what differs from step to step, and join it with the render.

        Args:
            noisy: noisy latents and first-frame mask, as the base gets them. [B, C, F, H, W]
            rendered: what is the same in all steps.

        Returns:
            Tokens that go into block 0. [B, N, d]
        """
        patch = self.controlnet_patch_embedding
        weight = patch.weight[:, : noisy.shape[1]]
        tokens = _tokens(F.conv3d(noisy.to(weight.dtype), weight, patch.bias, stride=PATCH))
        embedded: Tensor = self.controlnet.proj_in(tokens + rendered.tokens)
        return embedded

    def update(self, number: int, x: Tensor, time: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Run one block.

        Args:
            number: of the block.
            x: what came out of the block before, or of `embed`. [B, N, d]
            time: the base's time embedding, not yet projected for its blocks. [B, time_dim]
            grid: frames, rows and columns of tokens.
        """
        rotation = grid_rotation(grid, self.sizes.dim // self.sizes.num_heads, x.device)
        updated: Tensor = self.controlnet.controlnet_blocks[number](x, time, rotation)
        return updated

    def residual(self, number: int, x: Tensor) -> Tensor:
        """Turn what came out of a block into what the base's tokens lack. [B, N, d] to [B, N, D]"""
        projected: Tensor = self.controlnet.proj_out[number](x)
        return projected


class Control:
    """The controller in one step, a block at a time, so that no list of residuals is kept.

    Args:
        controller: the network.
        rendered: what it sees of the render.
        noisy: noisy latents and first-frame mask, as the base gets them. [1, C, F, H, W]
        time: the base's time embedding, not yet projected for its blocks. [1, time_dim]
        strength: factor of what is added; 0 computes and changes nothing.
        remember: keep the states of all blocks, each N * d numbers, for a base that is asked again
            at the same level, such as one that runs its guidance branches one by one. Otherwise
            asking for an earlier block begins from the start.
    """

    def __init__(
        self,
        controller: Controller,
        rendered: Rendered,
        noisy: Tensor,
        time: Tensor,
        *,
        strength: float = 1.0,
        remember: bool = False,
    ) -> None:
        self._controller = controller
        self._rendered = rendered
        self._noisy = noisy
        self._time = time
        self._strength = strength
        self._remembers = remember
        self._states: dict[int, Tensor] = {}

    def after(self, number: int, x: Tensor) -> Tensor:
        """Add to the base's video tokens what the controller says after a block of the base.

        Args:
            number: of the base's block.
            x: what came out of it; guidance branches as batch. [B, N, D]
        """
        if self._strength == 0 or number >= self._controller.sizes.num_layers:
            return x
        residual = self._controller.residual(number, self._state(number))
        return torch.add(x, residual.to(x.dtype), alpha=self._strength)

    def _state(self, number: int) -> Tensor:
        if number not in self._states:
            controller, rendered = self._controller, self._rendered
            first = number == 0
            x = controller.embed(self._noisy, rendered) if first else self._state(number - 1)
            x = controller.update(number, x, self._time, rendered.grid)
            if not self._remembers:
                self._states.clear()
            self._states[number] = x
        return self._states[number]


def _tokens(latents: Tensor) -> Tensor:
    """Lay out positions as tokens: by time, then row, then column. [B, D, F, H, W] to [B, N, D]"""
    return latents.flatten(2).transpose(1, 2)


def _zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
