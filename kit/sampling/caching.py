"""What caches share: in some passes they add what blocks added before, and do not ask them again.

What blocks add to the video tokens, their *residual*, changes little between two steps. A cache
says in which passes that of an earlier step will do.

The rules are our own code, though diffusers has hooks for two of them. Its MagCache counts steps
itself, so it loses its place where a cache forgets in the middle of a chunk; and what either keeps
lies in reference cycles, still there while the decoder needs the memory. That the rules are the
same is tested.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from kit.models.inside import Update, run_all
from kit.sampling.plugin import At, Setup

log = logging.getLogger(__name__)


def run_or_reuse(blocks: Sequence[Update], x: Tensor, at: At, *, reuse: bool) -> Tensor:
    """Run blocks and keep their residual, or add the one that was kept; count both. [B, N, D]"""
    at.shared.setdefault("reused", []).append(reuse)
    if reuse:
        reused: Tensor = x + at.memory["residual"]
        return reused
    result = run_all(blocks, x)
    at.memory["residual"] = result - x
    return result


def tell_skipped(at: At) -> None:
    """Log how many passes of a chunk were skipped."""
    reused = at.shared.get("reused", [])
    log.info("chunk %d: %d of %d passes skipped", at.chunk.index + 1, sum(reused), len(reused))


def may_skip(at: At, first_steps: int, last_steps: int) -> bool:
    """Say whether a step is none of those that are always computed."""
    return first_steps <= at.step < at.num_steps - last_steps


def never_skips(setup: Setup, first_steps: int, last_steps: int) -> list[str]:
    """Say, in words, if all steps are among those that are always computed."""
    steps = setup.sampling["steps"]
    if first_steps + last_steps < steps:
        return []
    kept = f"{first_steps} first and {last_steps} last"
    return [f"first_steps, last_steps: {kept} of {steps} steps leave none to skip"]


def relative_change(now: Tensor, before: Tensor) -> float:
    """Measure the mean absolute change over the mean absolute value before; 0 to 0 is no number."""
    change, size = (x.abs().mean(dtype=torch.float32) for x in (now - before, before))
    return float(change / size)


def magnitude_ratio(now: Tensor, before: Tensor) -> float:
    """Average, over the tokens, how many times longer they are than before. [B, N, D]"""
    lengths, old = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in (now, before))
    return float((lengths / old.clamp_min(1e-8)).mean())
