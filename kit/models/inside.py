"""What may be changed inside a forward pass of a denoiser: controls, caches and extra attention.

B is the batch, N the number of video tokens, D the width, h the heads of d channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from kit.models.attention import KeysValues, attend

Update = Callable[[Tensor], Tensor]
"""Video tokens to video tokens. [B, N, D]"""


class Entry(NamedTuple):
    """What is known when the blocks are about to run.

    Attributes:
        noisy: noisy latents and the mask of the reference, as the network reads them.
            [B, C + 4, F, H, W]
        time: embedding of the noise level, before it is projected for the blocks. [B, D]
        modulation: that projection; float32. [B, 6, D]
        grid: frames, rows and columns of video tokens.
        num_blocks: blocks of the network.
    """

    noisy: Tensor
    time: Tensor
    modulation: Tensor
    grid: tuple[int, int, int]
    num_blocks: int


Kind = Literal["self", "text", "image", "audio"]
"""What an attention layer attends to."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One attention layer.

    Attributes:
        kind: what is attended to.
        block: number of its block, from 0.
        num_blocks: blocks of the network.
        read: projects other states of the same kind, before their embedding, to keys and values;
            only of `text`, as [B, L, D'].
    """

    kind: Kind
    block: int
    num_blocks: int
    read: Callable[[Tensor], KeysValues] | None = None

    def __eq__(self, other: object) -> bool:
        """Refuse to be compared with a text, which would be False and go unnoticed."""
        if isinstance(other, str):
            raise TypeError(f"a layer is no text; compare its kind: layer.kind == '{other}'")
        return self is other


class Inside(Protocol):
    """Looks on at a forward pass, and may change it."""

    def enter(self, x: Tensor, rotation: Tensor, entry: Entry) -> tuple[Tensor, Tensor]:
        """Give the video tokens [B, N, D] and how they turn, complex [N, 1, d / 2]."""

    def run(self, blocks: Sequence[Update], x: Tensor) -> Tensor:
        """Run the blocks one behind another. [B, N, D]"""

    def attend(self, layer: Layer, query: Tensor, seen: KeysValues) -> Tensor:
        """Attend; see `kit.models.attention.attend`. [B, N, h, d] to [B, N, h * d]"""


class Untouched:
    """Changes nothing."""

    def enter(self, x: Tensor, rotation: Tensor, entry: Entry) -> tuple[Tensor, Tensor]:
        """Leave the tokens as they are."""
        return x, rotation

    def run(self, blocks: Sequence[Update], x: Tensor) -> Tensor:
        """Run every block."""
        return run_all(blocks, x)

    def attend(self, layer: Layer, query: Tensor, seen: KeysValues) -> Tensor:
        """Attend as the network does."""
        return attend(query, seen)


def run_all(blocks: Sequence[Update], x: Tensor) -> Tensor:
    """Run blocks one behind another. [B, N, D]"""
    for block in blocks:
        x = block(x)
    return x


UNTOUCHED = Untouched()
