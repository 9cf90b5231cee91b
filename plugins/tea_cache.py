"""TeaCache: skip the passes of steps in which the noise level's embedding changes little.

How much the noise level's modulation of the blocks changes from step to step, put through a
polynomial, tells how much what the blocks add will change. Changes are summed up until they reach
the threshold; then a pass is computed and the sum begins anew. Levels are known beforehand, so it
is the same steps in all branches, chunks and videos.

    plugins: {tea_cache: {coefficients: 720p}}

A polynomial belongs to the network that it was fitted on. The public ones are those of the 14B
network; `python benchmarks/studio/caches.py` fits one on the studio base.

Source: Liu et al. 2024, arXiv 2411.19108; coefficients, first steps and threshold are those of the
released InfiniteTalk, whose passes are decided upon alike (`tests/test_cache_plugins.py`). With a
text scale of 1 it mixes its branches up; these here never do.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
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

PUBLIC = {
    "480p": (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
    "720p": (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
}
PUBLIC_BLOCKS = 40


class TeaCache(Plugin):
    """Adds up expected changes, branch by branch.

    Args:
        coefficients: of the polynomial, highest power first; or the public ones, by the size of
            the video.
        threshold: sum of changes at which a pass is computed; 0 skips nothing.
        first_steps: steps at the beginning that are always computed.
        last_steps: the same at the end.
    """

    def __init__(
        self,
        *,
        coefficients: Literal["480p", "720p"]
        | Annotated[Sequence[float], Field(min_length=1)] = "480p",
        threshold: Annotated[float, Field(ge=0)] = 0.2,
        first_steps: Annotated[int, Field(ge=0)] = 5,
        last_steps: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        given = PUBLIC[coefficients] if isinstance(coefficients, str) else coefficients
        self.coefficients = tuple(given)
        self.threshold = threshold
        self.kept_steps = (first_steps, last_steps)

    def problems(self, setup: Setup) -> list[str]:
        """Refuse the public coefficients for another network, and to skip nothing."""
        found, count = never_skips(setup, *self.kept_steps), len(setup.denoiser.blocks())
        if self.coefficients in PUBLIC.values() and count != PUBLIC_BLOCKS:
            found.append(
                f"coefficients: the public ones are for a network of {PUBLIC_BLOCKS} blocks; "
                f"this one has {count}; give a list"
            )
        return found

    def blocks(self, blocks: Sequence[Update], x: Tensor, entry: Entry, at: At) -> Tensor:
        """Run the blocks where changes have summed up."""
        return run_or_reuse(blocks, x, at, reuse=self._is_near(entry.modulation, at))

    def pixels(self, pixels: Tensor, at: At) -> Tensor:
        """Tell how many passes were skipped."""
        tell_skipped(at)
        return pixels

    def _is_near(self, modulation: Tensor, at: At) -> bool:
        before, total = at.memory.get("modulation"), math.inf
        if before is not None and may_skip(at, *self.kept_steps):
            change = relative_change(modulation, before)
            total = at.memory["total"] + float(np.polyval(self.coefficients, change))
        # The polynomial may be below 0, and a threshold of 0 must skip nothing.
        is_near = total < self.threshold and self.threshold > 0
        at.memory.update(modulation=modulation, total=total if is_near else 0.0)
        return is_near


plugin = TeaCache
