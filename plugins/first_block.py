"""First-block cache: skip the other blocks where the first one adds nearly what it added before.

The first block sees everything that a pass is asked, noise, text and speech, and costs little. If
what it adds changes by less than the threshold since the last computed pass, what the others added
then is added again.

    plugins: {first_block: {threshold: 0.1}}

Source: ParaAttention (github.com/chengzeyi/ParaAttention) and diffusers' `FirstBlockCacheConfig`.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from kit.models.inside import Entry, Update
from kit.sampling.caching import (
    may_skip,
    never_skips,
    relative_change,
    run_or_reuse,
    tell_skipped,
)
from kit.sampling.plugin import At, Plugin, Setup


class FirstBlockCache(Plugin):
    """Compares what the first block adds, branch by branch, or rows of a pass together.

    Args:
        threshold: relative change from which on all blocks are computed; 0 skips nothing.
        first_steps: steps at the beginning that are always computed.
        last_steps: the same at the end.
    """

    def __init__(
        self,
        *,
        threshold: Annotated[float, Field(ge=0)] = 0.05,
        first_steps: Annotated[int, Field(ge=0)] = 0,
        last_steps: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        self.threshold = threshold
        self.kept_steps = (first_steps, last_steps)

    def problems(self, setup: Setup) -> list[str]:
        """Refuse to skip nothing."""
        return never_skips(setup, *self.kept_steps)

    def blocks(self, blocks: Sequence[Update], x: Tensor, entry: Entry, at: At) -> Tensor:
        """Run the first block, and the others if it adds something else than before."""
        first, *others = blocks
        seen = first(x)
        added, before = seen - x, at.memory.get("added")
        is_near = (
            before is not None
            and may_skip(at, *self.kept_steps)
            and relative_change(added, before) < self.threshold
        )
        if not is_near:
            at.memory["added"] = added
        return run_or_reuse(others, seen, at, reuse=is_near)

    def pixels(self, pixels: Tensor, at: At) -> Tensor:
        """Tell how many passes were skipped."""
        tell_skipped(at)
        return pixels


plugin = FirstBlockCache
