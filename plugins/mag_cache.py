"""MagCache: skip passes while what the blocks add should have kept its magnitude.

What the blocks add grows or shrinks from step to step in nearly the same way for every video. That
ratio is measured once for a base and a number of steps; what a row of skipped passes misses is
estimated from it.

Without `ratios`, nothing is skipped: they are measured and told at the end of each chunk, as a
line for the recipe:

    plugins: {mag_cache: {}}
    plugins: {mag_cache: {ratios: [1.0, 1.013, 0.994]}}

Source: Ma et al. 2025, arXiv 2506.09045, and diffusers' `MagCacheConfig`. They publish ratios of
other networks only, none of InfiniteTalk.
"""

import logging
from collections.abc import Sequence
from statistics import mean
from typing import Annotated, NamedTuple

from pydantic import Field
from torch import Tensor

from kit.models.inside import Entry, Update
from kit.sampling.caching import (
    magnitude_ratio,
    may_skip,
    never_skips,
    run_or_reuse,
    tell_skipped,
)
from kit.sampling.plugin import At, Plugin, Setup

log = logging.getLogger(__name__)


class Drift(NamedTuple):
    """What a row of skipped passes should have changed.

    Attributes:
        magnitude: product of the ratios since the last computed pass.
        error: sum of what it was away from 1.
        steps: passes in the row.
    """

    magnitude: float = 1.0
    error: float = 0.0
    steps: int = 0

    def after(self, ratio: float) -> "Drift":
        """Add a pass."""
        magnitude = self.magnitude * ratio
        return Drift(magnitude, self.error + abs(1 - magnitude), self.steps + 1)


class MagCache(Plugin):
    """Sums up the error of skipped passes, branch by branch.

    Args:
        ratios: magnitude over that of the step before, of each step; of another number of steps,
            the nearest are taken. None: they are measured.
        threshold: sum of errors at which a pass is computed; 0 skips nothing.
        max_skip_steps: steps that may be skipped in a row.
        first_steps: steps at the beginning that are always computed; a fifth, as published.
        last_steps: the same at the end.
    """

    def __init__(
        self,
        *,
        ratios: Sequence[Annotated[float, Field(gt=0)]] = (),
        threshold: Annotated[float, Field(ge=0)] = 0.06,
        max_skip_steps: Annotated[int, Field(ge=1)] = 3,
        first_steps: Annotated[int, Field(ge=0)] = 8,
        last_steps: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        self.ratios = ratios
        self.threshold = threshold
        self.max_skip_steps = max_skip_steps
        self.kept_steps = (first_steps, last_steps)

    def problems(self, setup: Setup) -> list[str]:
        """Refuse to skip nothing, unless it is to measure."""
        return never_skips(setup, *self.kept_steps) if self.ratios else []

    def blocks(self, blocks: Sequence[Update], x: Tensor, entry: Entry, at: At) -> Tensor:
        """Run the blocks where errors have summed up."""
        before = at.memory.get("residual")
        result = run_or_reuse(blocks, x, at, reuse=before is not None and self._is_near(at))
        if not self.ratios:
            ratio = 1.0 if before is None else magnitude_ratio(at.memory["residual"], before)
            at.shared.setdefault("ratios", {}).setdefault(at.step, []).append(ratio)
        return result

    def pixels(self, pixels: Tensor, at: At) -> Tensor:
        """Tell how many passes were skipped, or the ratios."""
        if self.ratios:
            tell_skipped(at)
        else:
            found = at.shared.get("ratios", {})
            told = [round(mean(found.get(step, [1.0])), 5) for step in range(at.num_steps)]
            log.info("chunk %d: mag_cache: {ratios: %s}", at.chunk.index + 1, told)
        return pixels

    def _is_near(self, at: At) -> bool:
        if not self.ratios or not may_skip(at, *self.kept_steps):
            return False
        before: Drift = at.memory.get("drift", Drift())
        drift = before.after(nearest(self.ratios, at.step, at.num_steps))
        is_near = drift.error < self.threshold and drift.steps <= self.max_skip_steps
        at.memory["drift"] = drift if is_near else Drift()
        return is_near


def nearest(ratios: Sequence[float], step: int, num_steps: int) -> float:
    """Give the ratio of a step, out of a row that may be for another number of steps."""
    return ratios[round(step * (len(ratios) - 1) / max(num_steps - 1, 1))]


plugin = MagCache
