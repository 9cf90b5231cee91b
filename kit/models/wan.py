"""Wan2.1 image-to-video with the audio parts of InfiniteTalk: diffusers' network, our forward.

D is the width of the network, N the number of video tokens, n of them in one latent frame.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanTimeTextImageEmbedding,
    WanTransformer3DModel,
    WanTransformerBlock,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kit.batch import Conditions
from kit.models.attention import Rotation, attend, frequencies, grid_rotation, rotate, split_heads
from kit.models.audio import (
    AudioCrossAttention,
    AudioProjector,
    AudioSizes,
    Positions,
    Speakers,
    describe_speakers,
    speaker_positions,
)
from kit.models.base import Denoiser

SELF_ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
CROSS_ATTENTION = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
IMAGE_ATTENTION = ("attn2.add_k_proj", "attn2.add_v_proj")
FFN = ("ffn.net.0.proj", "ffn.net.2")
AUDIO_ATTENTION = (
    "audio_cross_attn.q_linear",
    "audio_cross_attn.kv_linear",
    "audio_cross_attn.proj",
)
AUDIO_PROJECTOR = ("proj1", "proj1_vf", "proj2", "proj3")


class Context(NamedTuple):
    """What every block gets beside the video tokens.

    Attributes:
        modulation: shift, scale and gate of self-attention, then of the FFN; float32. [B, 6, D]
        rotation: angles of the video tokens.
        text: text tokens, padding included. [B, L, D]
        image: tokens of the reference frame. [B, K, D]
        audio: audio tokens. [B, S, F, K', D']
        speakers: None if every sample has a single speaker.
    """

    modulation: Tensor
    rotation: Rotation
    text: Tensor
    image: Tensor
    audio: Tensor
    speakers: Speakers | None


class Block(nn.Module):
    """One block: the parts of diffusers' block under their names, and audio cross-attention."""

    def __init__(self, block: WanTransformerBlock, dim: int, eps: float, audio_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.attn1, self.attn2, self.ffn = block.attn1, block.attn2, block.ffn
        self.scale_shift_table = block.scale_shift_table
        self.norm_x = FP32LayerNorm(dim, eps=eps)
        self.audio_cross_attn = AudioCrossAttention(dim, block.attn1.heads, audio_dim)
        self.recomputes = False

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Update the video tokens. [B, N, D]"""
        # The decision lies inside the block, so that hooks of sharding stay outside of it.
        if self.recomputes and torch.is_grad_enabled():
            updated: Tensor = checkpoint(self._update, x, context, use_reentrant=False)
            return updated
        return self._update(x, context)

    def _update(self, x: Tensor, context: Context) -> Tensor:
        modulation = self.scale_shift_table.float() + context.modulation
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.chunk(6, dim=1)
        seen, positions = self_attention(self.attn1, modulate(self.norm1(x), shift, scale), context)
        x = add_gated(x, seen, gate)
        x = x + cross_attention(self.attn2, self.norm2(x), context.text, context.image)
        x = x + self.audio_cross_attn(self.norm_x(x), context.audio, positions)
        return add_gated(x, self.ffn(modulate(self.norm3(x), ffn_shift, ffn_scale)), ffn_gate)


class Wan(Denoiser):
    """The denoiser; its state dict is that of diffusers below `transformer.`, plus `audio_proj`.

    Args:
        config: sizes as in diffusers' `transformer/config.json`.
        audio: sizes of the audio parts.
        text_length: text tokens that the network sees, padding included.
    """

    def __init__(
        self, config: Mapping[str, Any], *, audio: AudioSizes, text_length: int = 512
    ) -> None:
        super().__init__()
        self.text_length = text_length
        self.transformer = WanTransformer3DModel.from_config(dict(config))
        # Its tables are buffers outside the state dict; see `grid_rotation`.
        del self.transformer.rope
        sizes = self.transformer.config
        dim = sizes.num_attention_heads * sizes.attention_head_dim
        self.transformer.blocks = nn.ModuleList(
            Block(block, dim, sizes.eps, audio.output_dim) for block in self.transformer.blocks
        )
        self.audio_proj = AudioProjector(audio)

    def forward(self, noisy: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Predict the velocity; see `Denoiser.forward`."""
        net = self.transformer
        num_frames, height, width = noisy.shape[2:]
        mask = conditions.reference_mask[..., None, None].expand(-1, -1, -1, height, width)
        channels = torch.cat([noisy, mask, conditions.reference], dim=1)  # [B, 36, F, H, W]
        dtype = net.patch_embedding.weight.dtype
        x = net.patch_embedding(channels.to(dtype)).flatten(2).transpose(1, 2)  # [B, N, D]
        time, modulation = embed_time(net.condition_embedder, sigma)
        grid = (num_frames, height // 2, width // 2)
        context = self._context(conditions, modulation, grid, dtype)
        for block in net.blocks:
            x = block(x, context)
        return unpatchify(predict(net, x, time), grid)

    def _context(
        self,
        conditions: Conditions,
        modulation: Tensor,
        grid: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> Context:
        embedder = self.transformer.condition_embedder
        missing = self.text_length - conditions.text.shape[1]
        text = F.pad(conditions.text.to(dtype), (0, 0, 0, missing))
        speakers = None
        if conditions.audio.shape[1] > 1:
            masks, counts = conditions.speaker_masks, conditions.num_speakers
            speakers = describe_speakers(masks, counts, grid[1:])
        head_dim = self.transformer.config.attention_head_dim
        return Context(
            modulation=modulation,
            rotation=grid_rotation(grid, head_dim, modulation.device),
            text=embedder.text_embedder(text),
            image=embedder.image_embedder(conditions.image.to(dtype)),
            audio=self.audio_proj(conditions.audio.to(dtype)),
            speakers=speakers,
        )

    def blocks(self) -> Sequence[nn.Module]:
        """List the blocks in order."""
        return list(self.transformer.blocks)

    def parts(self) -> Mapping[str, Sequence[str]]:
        """Name the linear layers: attention (self, text and image), ffn, audio."""
        projector = [f"audio_proj.{name}" for name in AUDIO_PROJECTOR]
        return {
            "attention": self._in_blocks(*SELF_ATTENTION, *CROSS_ATTENTION, *IMAGE_ATTENTION),
            "ffn": self._in_blocks(*FFN),
            "audio": projector + self._in_blocks(*AUDIO_ATTENTION),
        }

    def trainable_parts(self) -> Mapping[str, Sequence[str]]:
        """Name whole modules: audio is what InfiniteTalk added to Wan and trained."""
        return {
            "audio": ["audio_proj", *self._in_blocks("norm_x", "audio_cross_attn")],
            "attention": self._in_blocks("attn1", "attn2"),
            "ffn": self._in_blocks("ffn"),
        }

    def checkpoint_activations(self, every: int) -> None:
        """Recompute every n-th block in the backward pass; 0 keeps all activations."""
        for number, block in enumerate(self.transformer.blocks):
            block.recomputes = every > 0 and number % every == 0

    def _in_blocks(self, *names: str) -> list[str]:
        numbers = range(len(self.transformer.blocks))
        return [f"transformer.blocks.{number}.{name}" for number in numbers for name in names]


def self_attention(
    attention: WanAttention, x: Tensor, context: Context
) -> tuple[Tensor, Positions | None]:
    """Attend to all video tokens; the same queries and keys place the tokens near speakers."""
    query = split_heads(normalize(attention.norm_q, attention.to_q(x)), attention.heads)
    key = split_heads(normalize(attention.norm_k, attention.to_k(x)), attention.heads)
    value = split_heads(attention.to_v(x), attention.heads)
    query, key = rotate(query, context.rotation), rotate(key, context.rotation)
    positions = None
    if context.speakers is not None:
        positions = speaker_positions(query, key, context.speakers)
    return attention.to_out[0](attend(query, key, value)), positions


def cross_attention(attention: WanAttention, x: Tensor, text: Tensor, image: Tensor) -> Tensor:
    """Attend to text and to image tokens with one query, and sum before the output projection."""
    heads = attention.heads
    query = split_heads(normalize(attention.norm_q, attention.to_q(x)), heads)
    text_key = split_heads(normalize(attention.norm_k, attention.to_k(text)), heads)
    read = attend(query, text_key, split_heads(attention.to_v(text), heads))
    to_key, to_value = cast(nn.Module, attention.add_k_proj), cast(nn.Module, attention.add_v_proj)
    image_key = split_heads(normalize(attention.norm_added_k, to_key(image)), heads)
    seen = attend(query, image_key, split_heads(to_value(image), heads))
    projected: Tensor = attention.to_out[0](read + seen)
    return projected


def normalize(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Divide by the root mean square in float32, round to the input's dtype, then scale."""
    return (F.rms_norm(x.float(), x.shape[-1:], eps=norm.eps).to(x.dtype) * norm.weight).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift in float32. [B, N, D]"""
    return (x.float() * (1 + scale) + shift).to(x.dtype)


def add_gated(x: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    """Add in float32. [B, N, D]"""
    return (x.float() + change.float() * gate).to(x.dtype)


def embed_time(embedder: WanTimeTextImageEmbedding, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Embed the noise level, all in float32 whatever the dtype of the weights.

    Returns:
        Embedding for the head [B, D] and modulation for the blocks [B, 6, D].
    """
    first, second = embedder.time_embedder.linear_1, embedder.time_embedder.linear_2
    angles = (1000 * sigma.float()).double()[:, None] * frequencies(first.in_features, sigma.device)
    sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    time = linear_float32(second, F.silu(linear_float32(first, sinusoid)))
    modulation = linear_float32(embedder.time_proj, F.silu(time))
    return time, modulation.reshape(len(sigma), 6, -1)


def predict(net: WanTransformer3DModel, x: Tensor, time: Tensor) -> Tensor:
    """Turn video tokens [B, N, D] into patches of velocity [B, N, 4 * C], in float32."""
    shift, scale = (net.scale_shift_table.float() + time[:, None]).chunk(2, dim=1)
    return linear_float32(net.proj_out, net.norm_out(x).float() * (1 + scale) + shift)


def linear_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a layer in float32, outside of autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def unpatchify(patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Lay out patches of 2x2 positions, channels last in each, as a video [B, C, F, H, W]."""
    cells = patches.reshape(len(patches), *grid, 2, 2, -1)  # [B, F, h, w, 2, 2, C]
    return cells.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
