"""CFG-Zero*: negative predictions of fitting length, and a first step that stays where it is.

Guidance leads away from what is predicted without text or speech. Where that is longer or shorter
than what is predicted with them, guidance would change the length of the velocity and not only its
direction; so each negative is scaled to come as near to the full prediction as it can. At the very
first level a velocity is known so badly that it is better not to move.

    plugins: {cfg_zero: {zero_steps: 1}}

Source: Fan et al. 2025, arXiv 2503.18886, which knows one negative. Of more, each has a scale of
its own; where text and audio scales are equal, the result is the paper's for the last of them.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kit.batch import Conditions
from kit.guidance import combine
from kit.sampling.plugin import Ask, At, Plugin, Setup

TINY = 1e-8
"""Keeps the scale of a velocity finite that is zero."""


class CfgZero(Plugin):
    """Combines branches as plain guidance does, their negatives scaled.

    Args:
        zero_steps: first steps that stay where they are; they ask nothing of the denoiser. The
            paper takes 4 % of all steps.
    """

    def __init__(self, *, zero_steps: Annotated[int, Field(ge=0)] = 1) -> None:
        self.zero_steps = zero_steps

    def problems(self, setup: Setup) -> list[str]:
        """Refuse other guidance, and to stay where it is for good."""
        found, steps = [], setup.sampling["steps"]
        if setup.sampling["guidance"] != "plain":
            name = setup.sampling["guidance"]
            found.append(f"takes the place of sampling.guidance: {name}; take plain")
        if self.zero_steps >= steps:
            found.append(f"zero_steps: {self.zero_steps} of {steps} steps leave none to move")
        return found

    def predict(
        self, ask: Ask, noisy: Tensor, sigma: Tensor, conditions: Conditions, at: At
    ) -> Tensor:
        """Stay where it is in the first steps."""
        if at.step < self.zero_steps:
            return torch.zeros_like(noisy)
        return ask(noisy, sigma, conditions)

    def combine(
        self, velocities: Mapping[str, Tensor], text_scale: float, audio_scale: float, at: At
    ) -> Tensor:
        """Lead from scaled negatives to the full prediction."""
        full = velocities["full"]
        fitted = {name: _project(full, negative) for name, negative in velocities.items()}
        return combine({**fitted, "full": full}, text_scale, audio_scale)


def _project(velocity: Tensor, onto: Tensor) -> Tensor:
    return (velocity * onto).sum() / (onto.square().sum() + TINY) * onto


plugin = CfgZero
