"""Skip layer guidance: away from what the network predicts without some of its blocks.

Without a few blocks in the middle, a network makes the same thing with poorer structure: limbs and
faces that do not hold together. Going away from that prediction improves structure. Each step in
which this is done asks the denoiser for one more branch.

    plugins: {skip_layers: {layers: [9], scale: 2.8, end: 0.2}}

Source: Stability AI's Stable Diffusion 3.5, whose numbers are the defaults; it leaves out blocks 7
to 9 of 24. Front ends for Wan leave out block 9 of 40.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kit.batch import Conditions
from kit.models.inside import Entry, Update
from kit.sampling.plugin import At, Gate, Plugin, Setup

BRANCH = "skipped"


class SkipLayerGuidance(Plugin):
    """Adds scale * (full - skipped) to the velocity.

    Args:
        layers: blocks to leave out, from 0.
        scale: how far to go; 0 is off.
        start: where it begins.
        end: where it ends.
        unit: of these two, shares of the steps or noise levels.
    """

    def __init__(
        self,
        *,
        layers: Annotated[Sequence[Annotated[int, Field(ge=0)]], Field(min_length=1)],
        scale: Annotated[float, Field(ge=0)] = 2.8,
        start: Annotated[float, Field(ge=0, le=1)] = 0.01,
        end: Annotated[float, Field(ge=0, le=1)] = 0.2,
        unit: Literal["step", "sigma"] = "step",
    ) -> None:
        self.layers = tuple(layers)
        self.scale = scale
        self.gate = Gate(start, end, unit)

    def problems(self, setup: Setup) -> list[str]:
        """Refuse blocks that the base does not have."""
        count = len(setup.denoiser.blocks())
        return self.gate.problems(setup) + [
            f"layers: {layer} is no block of this base; valid: 0 to {count - 1}"
            for layer in self.layers
            if layer >= count
        ]

    def is_active(self, at: At) -> bool:
        """Open between `start` and `end`."""
        return self.scale > 0 and self.gate.is_open(at)

    def branches(self, branches: dict[str, Conditions], at: At) -> dict[str, Conditions]:
        """Ask for everything a second time."""
        return {**branches, BRANCH: branches["full"]}

    def block(self, update: Update, number: int, x: Tensor, entry: Entry, at: At) -> Tensor:
        """Leave the blocks out, in the rows of this branch."""
        if number not in self.layers or BRANCH not in at.branches:
            return update(x)
        if at.branches == (BRANCH,):
            return x
        is_left_out = torch.tensor([name == BRANCH for name in at.branches], device=x.device)
        return torch.where(is_left_out[:, None, None], x, update(x))

    def velocity(self, velocity: Tensor, velocities: Mapping[str, Tensor], at: At) -> Tensor:
        """Go away from what was predicted without them."""
        return velocity + self.scale * (velocities["full"] - velocities[BRANCH])


plugin = SkipLayerGuidance
