"""Wan2.1 image-to-video with the audio parts of InfiniteTalk: diffusers' network, our forward.

D is the width of the network, N the number of video tokens, n of them in one latent frame.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanTimeTextImageEmbedding,
    WanTransformer3DModel,
    WanTransformerBlock,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kit.batch import Conditions
from kit.models.attention import (
    frequencies,
    grid_rotation,
    padding_bias,
)
from kit.models.audio import (
    AudioCrossAttention,
    AudioProjector,
    AudioSizes,
    Speakers,
    describe_speakers,
)
from kit.models.base import Denoiser
from kit.models.cpu import fast_again, fast_products
from kit.models.inside import UNTOUCHED, Entry, Inside
from kit.models.memory import Memory, Once, afresh
from kit.models.split import divide_frames
from kit.models.tokens import (
    add_gated,
    by_pieces,
    linear_float32,
    modulate,
    unpatchify,
)
from kit.models.wan_attention import (
    Context,
    Text,
    cross_attention,
    divide,
    image_keys_values,
    self_attention,
    text_keys_values,
)

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
            contexts = partial(fast_again, x.device)
            updated: Tensor = checkpoint(
                self._update, x, context, use_reentrant=False, context_fn=contexts
            )
            return updated
        return self._update(x, context)

    def _update(self, x: Tensor, context: Context) -> Tensor:
        modulation = self.scale_shift_table.float() + context.modulation
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.chunk(6, dim=1)
        text = context.once(text_keys_values, self.attn2, context.text)
        image = context.once(image_keys_values, self.attn2, context.image)
        heard = context.once(self.audio_cross_attn.keys_values, context.audio, context.speakers)

        def read(some: Tensor) -> Tensor:
            return some + cross_attention(self.attn2, self.norm2(some), text, image, context)

        def think(some: Tensor) -> Tensor:
            changed = self.ffn(modulate(self.norm3, some, ffn_shift, ffn_scale))
            return add_gated(some, changed, ffn_gate)

        seen, positions = self_attention(self.attn1, modulate(self.norm1, x, shift, scale), context)
        x = by_pieces(read, add_gated(x, seen, gate))
        x = x + self.audio_cross_attn(self.norm_x(x), heard, positions, context.attend("audio"))
        return by_pieces(think, x)


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

    def forward(
        self,
        noisy: Tensor,
        sigma: Tensor,
        conditions: Conditions,
        inside: Inside = UNTOUCHED,
        once: Once = afresh,
    ) -> Tensor:
        """Predict the velocity; see `Denoiser.forward`.

        Args:
            noisy: as there.
            sigma: as there.
            conditions: as there.
            inside: as there.
            once: computes what depends on nothing but them.
        """
        with fast_products(noisy.device):
            return self._predict(noisy, sigma, conditions, inside, once)

    def remembering(self) -> "partial[Tensor]":
        """Give this network with a memory of what it computed from the same conditions.

        It keeps the keys and values of all blocks: for the public weights in bfloat16 and 21 latent
        frames 0.4 GB for caption, negative text and reference frame, and 0.6 GB for each speaker
        and for silence.
        """
        return partial(self, once=Memory())

    def _predict(
        self, noisy: Tensor, sigma: Tensor, conditions: Conditions, inside: Inside, once: Once
    ) -> Tensor:
        net = self.transformer
        num_frames, height, width = noisy.shape[2:]
        mask = conditions.reference_mask[..., None, None].expand(-1, -1, -1, height, width)
        marked = torch.cat([noisy, mask], dim=1)  # [B, 20, F, H, W]
        channels = torch.cat([marked, conditions.reference], dim=1).to(self._dtype)
        x = net.patch_embedding(channels).flatten(2).transpose(1, 2)  # [B, N, D]
        time, modulation = embed_time(net.condition_embedder, sigma)
        grid = (num_frames, height // 2, width // 2)
        rotation = grid_rotation(grid, net.config.attention_head_dim, modulation.device)
        entry = Entry(marked, time, modulation, grid, len(net.blocks))
        x, rotation = inside.enter(x, rotation, entry)
        context = self._context(conditions, modulation, rotation, inside, once)
        split = divide_frames(self.processes, grid)
        if split is not None:
            x, context = divide(split, x, context)
        blocks = [
            partial(block, context=context._replace(block=number))
            for number, block in enumerate(net.blocks)
        ]
        x = inside.run(blocks, x)
        if split is not None:
            x = split.join(x)
        return unpatchify(predict(net, x, time), grid)

    def _context(
        self,
        conditions: Conditions,
        modulation: Tensor,
        rotation: Tensor,
        inside: Inside,
        once: Once,
    ) -> Context:
        masks, counts = conditions.speaker_masks, conditions.num_speakers
        return Context(
            modulation=modulation,
            rotation=rotation,
            text=once(self._embed_text, conditions.text),
            image=once(self._embed_image, conditions.image),
            audio=once(self._embed_audio, conditions.audio, counts),
            speakers=once(self._find_speakers, masks, counts),
            once=once,
            block=0,
            num_blocks=len(self.transformer.blocks),
            split=None,
            inside=inside,
            embed_text=partial(once, self._embed_text),
        )

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.transformer.patch_embedding.weight.dtype
        return dtype

    def _embed_text(self, text: Tensor) -> Text:
        """Embed text, padded with zero rows; many are one and the same, so that two will do."""
        length, bias = text.shape[1], None
        missing = self.text_length - length
        if missing > 2:
            bias = padding_bias(length + 2, missing, text.device)
            missing = 2
        padded = F.pad(text.to(self._dtype), (0, 0, 0, missing))
        return Text(self.transformer.condition_embedder.text_embedder(padded), bias)

    def _embed_image(self, image: Tensor) -> Tensor:
        tokens: Tensor = self.transformer.condition_embedder.image_embedder(image.to(self._dtype))
        return tokens

    def _embed_audio(self, audio: Tensor, num_speakers: Tensor) -> Tensor:
        tokens: Tensor = self.audio_proj(_without_empty(audio, num_speakers).to(self._dtype))
        return tokens

    def _find_speakers(self, masks: Tensor, num_speakers: Tensor) -> Speakers | None:
        masks = _without_empty(masks, num_speakers)
        if masks.shape[1] == 1:
            return None
        return describe_speakers(masks, num_speakers, (masks.shape[2] // 2, masks.shape[3] // 2))

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


def _without_empty(slots: Tensor, num_speakers: Tensor) -> Tensor:
    """Leave out slots that no sample uses: a single speaker needs no places. [B, S, ...]"""
    return slots[:, : int(num_speakers.max())] if slots.shape[1] > 1 else slots


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
