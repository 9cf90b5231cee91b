"""From noise to latents: the levels to visit and one step between two of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from kit.flow import shift_sigma

FIRST_TIMESTEP, LAST_TIMESTEP = 1000.0, 1.0
"""Ends of InfiniteTalk's timestep ladder, before the shift; the zero behind it is added."""


def sigma_schedule(steps: int, shift: float) -> Tensor:
    """List the noise levels from 1 down to 0. [steps + 1]

    Args:
        steps: denoiser evaluations per branch, at least 1.
        shift: see `flow.shift_sigma`.

    Source: InfiniteTalk: linspace(1000, 1, steps), shifted, then 0.
    """
    levels = torch.linspace(FIRST_TIMESTEP, LAST_TIMESTEP, steps, dtype=torch.float64) / 1000
    return torch.cat([shift_sigma(levels, shift), levels.new_zeros(1)]).float()


def euler_step(noisy: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """Follow the velocity in a straight line from one level to the next lower one."""
    return noisy - velocity * (sigma - next_sigma)


Solver = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

SOLVERS: dict[str, Solver] = {"euler": euler_step}
