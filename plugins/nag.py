"""Normalised attention guidance: a negative text that works without guidance branches.

Step-distilled networks are asked once a step, with text scale 1, so that a negative text says
nothing to them. Here it acts inside of attention to the text: what the caption gives is moved away
from what the negative text gives, as far as its norm allows. One more attention in each block is
all that it costs.

    sampling: {text_scale: 1}
    plugins: {nag: {negative: blurry hands, scale: 11}}

Source: Chen et al. 2025, arXiv 2505.21179: z' = s z - (s - 1) z_neg, shortened to tau times the L1
norm of z, then z + alpha (z' - z); the numbers are those in use for Wan.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kit.models.attention import KeysValues
from kit.models.inside import Layer
from kit.sampling.plugin import At, Attend, Gate, Plugin, Run, Setup

WITHOUT_CAPTION = ("no_text", "none")
"""Branches that see the sampler's negative text: there is nothing to lead away from."""


class AttentionGuidance(Plugin):
    """Guides the attention to the text in all rows that see the caption.

    Args:
        negative: what to lead away from; if empty, the sampler's negative text. Another one is
            encoded before the first chunk, for which the text encoder is read again.
        scale: how far to go; 1 is off.
        tau: how many times as long as without guidance the result may be.
        alpha: share of the guided attention in the result; 0 is off.
        start: where it begins.
        end: where it ends.
        unit: of these two, shares of the steps or noise levels.
    """

    def __init__(
        self,
        *,
        negative: str = "",
        scale: Annotated[float, Field(ge=1)] = 11.0,
        tau: Annotated[float, Field(ge=1)] = 2.5,
        alpha: Annotated[float, Field(ge=0, le=1)] = 0.25,
        start: Annotated[float, Field(ge=0, le=1)] = 0.0,
        end: Annotated[float, Field(ge=0, le=1)] = 1.0,
        unit: Literal["step", "sigma"] = "step",
    ) -> None:
        self.negative = negative
        self.scale = scale
        self.tau = tau
        self.alpha = alpha
        self.gate = Gate(start, end, unit)

    def problems(self, setup: Setup) -> list[str]:
        """Refuse a window without steps."""
        return self.gate.problems(setup)

    def open(self, run: Run) -> None:
        """Encode the negative text, unless it is the sampler's."""
        self._states = run.encoded.null_text  # [1, L, D]
        if self.negative:
            self._states = run.encoders.encode_text([self.negative])[0][None]
            run.encoders.release("text")

    def is_active(self, at: At) -> bool:
        """Open between `start` and `end`."""
        return self.scale > 1 and self.alpha > 0 and self.gate.is_open(at)

    def attention(
        self, attend: Attend, layer: Layer, query: Tensor, seen: KeysValues, at: At
    ) -> Tensor:
        """Attend to the negative text as well."""
        mixed = attend(query, seen)
        rows = [row for row, name in enumerate(at.branches) if name not in WITHOUT_CAPTION]
        if layer.kind != "text" or not rows:
            return mixed
        assert layer.read is not None
        if "states" not in at.shared:
            # One object for the chunk, so that its keys and values are remembered.
            at.shared["states"] = self._states.to(query.device)
        key, value, bias = layer.read(at.shared["states"])
        key, value = (x.expand(len(rows), -1, -1, -1) for x in (key, value))
        index = torch.tensor(rows, device=query.device)
        negative = attend(query[index], KeysValues(key, value, bias))
        return mixed.index_copy(0, index, self._guide(mixed[index], negative))

    def _guide(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Move attention away from the negative. [B, N, D]"""
        z = positive.float()
        guided = self.scale * z - (self.scale - 1) * negative.float()
        limit = self.tau * _norm(z) / _norm(guided).clamp(min=torch.finfo(z.dtype).tiny)
        return torch.lerp(z, limit.clamp(max=1) * guided, self.alpha).to(positive.dtype)


def _norm(z: Tensor) -> Tensor:
    return z.abs().sum(-1, keepdim=True)


plugin = AttentionGuidance
