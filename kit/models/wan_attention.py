"""Attention in a block of Wan: to all video tokens, to text and to the reference frame.

D is the width of the network, N the number of video tokens, n of them in one latent frame.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from kit.models.attention import KeysValues, rotate, split_heads
from kit.models.audio import Speakers, speaker_positions
from kit.models.inside import Inside, Kind, Layer
from kit.models.memory import Once
from kit.models.split import Split
from kit.models.tokens import normalize


class Text(NamedTuple):
    """What the text says.

    Attributes:
        tokens: the last two may stand for all padding. [B, L, D]
        bias: added to the scores of the tokens; None if each stands for itself. [1, 1, 1, L]
    """

    tokens: Tensor
    bias: Tensor | None


class Context(NamedTuple):
    """What every block gets beside the video tokens.

    Attributes:
        modulation: shift, scale and gate of self-attention, then of the FFN; float32. [B, 6, D]
        rotation: how the video tokens turn.
        text: text tokens.
        image: tokens of the reference frame. [B, K, D]
        audio: audio tokens. [B, S, F, K', D']
        speakers: None if every sample has a single speaker.
        once: computes keys and values, which depend on nothing but the tokens above.
        block: number of the block.
        num_blocks: blocks of the network.
        split: which frames are this process's; None if all are.
        inside: may change what is attended to.
        embed_text: gives text tokens of other states, for `inside`.
    """

    modulation: Tensor
    rotation: Tensor
    text: Text
    image: Tensor
    audio: Tensor
    speakers: Speakers | None
    once: Once
    block: int
    num_blocks: int
    split: Split | None
    inside: Inside
    embed_text: Callable[[Tensor], Text]

    def attend(
        self, kind: Kind, read: Callable[[Tensor], KeysValues] | None = None
    ) -> Callable[[Tensor, KeysValues], Tensor]:
        """Give the attention of one kind of layer in this block."""
        return partial(self.inside.attend, Layer(kind, self.block, self.num_blocks, read))


def divide(split: Split, x: Tensor, context: Context) -> tuple[Tensor, Context]:
    """Leave to this process its frames: their tokens, how they turn, and what they hear."""
    mine = context._replace(
        rotation=split.of_tokens(context.rotation, dim=0),
        audio=context.once(split.processes.of_frames, context.audio, 2),
        split=split,
    )
    return split.of_tokens(x, dim=1), mine


def self_attention(
    attention: WanAttention, x: Tensor, context: Context
) -> tuple[Tensor, Tensor | None]:
    """Attend to all video tokens; the same queries and keys place the tokens near speakers."""
    seen, positions = look_around(attention, x, context)
    return attention.to_out[0](seen), positions


def look_around(
    attention: WanAttention, x: Tensor, context: Context
) -> tuple[Tensor, Tensor | None]:
    """Do all of self-attention but the output projection, which then needs no queries and keys."""
    heads, turn = attention.heads, context.rotation
    query, key = (
        rotate(split_heads(normalize(norm, project(x)), heads), turn).to(x.dtype)
        for project, norm in (
            (attention.to_q, attention.norm_q),
            (attention.to_k, attention.norm_k),
        )
    )
    value = split_heads(attention.to_v(x), heads)
    seen, positions = KeysValues(key, value), None
    if context.split is not None:
        seen = context.split.join_keys_values(seen)
    if context.speakers is not None:
        positions = speaker_positions(query, seen.key, context.speakers, context.split)
    return context.attend("self")(query, seen), positions


def cross_attention(
    attention: WanAttention, x: Tensor, text: KeysValues, image: KeysValues, context: Context
) -> Tensor:
    """Attend to text and to image tokens with one query, and sum before the output projection."""
    query = split_heads(normalize(attention.norm_q, attention.to_q(x)), attention.heads)
    attend_text = context.attend("text", partial(read_text, attention, context))
    mixed = attend_text(query, text) + context.attend("image")(query, image)
    projected: Tensor = attention.to_out[0](mixed)
    return projected


def read_text(attention: WanAttention, context: Context, text: Tensor) -> KeysValues:
    """Find what can be read in other text, such as one to lead away from. [B, L, D']"""
    return context.once(text_keys_values, attention, context.embed_text(text))


def text_keys_values(attention: WanAttention, text: Text) -> KeysValues:
    """Find what can be read in the text."""
    key = split_heads(normalize(attention.norm_k, attention.to_k(text.tokens)), attention.heads)
    return KeysValues(key, split_heads(attention.to_v(text.tokens), attention.heads), text.bias)


def image_keys_values(attention: WanAttention, image: Tensor) -> KeysValues:
    """Find what can be seen in the reference frame."""
    to_key, to_value = cast(nn.Module, attention.add_k_proj), cast(nn.Module, attention.add_v_proj)
    key = split_heads(normalize(attention.norm_added_k, to_key(image)), attention.heads)
    return KeysValues(key, split_heads(to_value(image), attention.heads))
