"""Adaptive projected guidance: large scales without glaring colours.

Guidance goes along the differences that text and speech make. The part of a difference that is
parallel to the prediction only makes the picture glaring, so that it is left out; the rest is
limited, and pushed away from the differences of earlier steps.

    plugins: {apg: {on: clean, threshold: 100, eta: 0.2}}

Source: Sadat et al. 2024, arXiv 2410.02416, who project estimates of the clean latents;
InfiniteTalk projects velocities.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from kit.batch import Conditions
from kit.guidance import Projection, combine_projected
from kit.sampling.plugin import Ask, At, Plugin, Setup


class ProjectedGuidance(Plugin):
    """Combines branches by projection; with its defaults, it is `sampling.guidance: projected`.

    Args:
        momentum: share of the earlier differences that is added; negative pushes away from them.
        threshold: largest norm of a difference over all latents of a chunk.
        eta: share of the parallel part that is kept; 1 keeps all of it.
        on: what is projected, `velocity` or the estimate of `clean` latents.
    """

    def __init__(
        self,
        *,
        momentum: Annotated[float, Field(gt=-1, lt=1)] = -0.75,
        threshold: Annotated[float, Field(gt=0)] = 55.0,
        eta: Annotated[float, Field(ge=0, le=1)] = 0.0,
        on: Literal["velocity", "clean"] = "velocity",
    ) -> None:
        self.momentum = momentum
        self.threshold = threshold
        self.eta = eta
        self.on = on

    def problems(self, setup: Setup) -> list[str]:
        """Refuse to project twice."""
        if setup.sampling["guidance"] == "plain":
            return []
        return [f"takes the place of sampling.guidance: {setup.sampling['guidance']}; take plain"]

    def predict(
        self, ask: Ask, noisy: Tensor, sigma: Tensor, conditions: Conditions, at: At
    ) -> Tensor:
        """Keep the noisy latents, which estimates of clean ones are made from."""
        at.shared["noisy"] = noisy[:1]
        return ask(noisy, sigma, conditions)

    def combine(
        self, velocities: Mapping[str, Tensor], text_scale: float, audio_scale: float, at: At
    ) -> Tensor:
        """Combine velocities, or the estimates clean = noisy - sigma * velocity."""
        if "project" not in at.shared:
            at.shared["project"] = Projection(self.momentum, self.threshold, self.eta)
        project = at.shared["project"]
        if self.on == "velocity":
            return combine_projected(velocities, text_scale, audio_scale, project)
        noisy: Tensor = at.shared["noisy"]
        clean = {name: noisy - at.sigma * velocity for name, velocity in velocities.items()}
        return (noisy - combine_projected(clean, text_scale, audio_scale, project)) / at.sigma


plugin = ProjectedGuidance
