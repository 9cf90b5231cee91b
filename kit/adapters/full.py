"""No adapter at all: every parameter of a denoiser trains, for small bases of our own."""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kit.models.base import Denoiser
from kit.models.hollow import in_float32

_OUTPUTS = ("to_out.0", "ffn.net.2", "audio_cross_attn.proj")
_LAST = "proj_out"


class Full:
    """Trains the whole denoiser, in float32.

    Args:
        start: factor on the drawn weights of what blocks add to their input; the network's last
            layer starts at zero. 1 leaves all weights as they are, to train a trained base on.

    Source: residual branches that start small and a zero last layer are usual for diffusion
    transformers (Peebles and Xie 2022, section 3.2).
    """

    kind = "lora"  # of no factors at all
    parts = ()
    train_fully = ("all",)

    def __init__(self, *, start: Annotated[float, Field(ge=0, le=1)] = 1.0) -> None:
        self.start = start

    def problems(self, denoiser: Denoiser) -> list[str]:
        """List nothing: every denoiser can train fully."""
        return []

    def start_values(self, denoiser: Denoiser) -> Mapping[str, Tensor]:
        """Name nothing that takes the place of the base's parameters."""
        return {}

    @torch.no_grad()
    def inject(self, denoiser: Denoiser, seed: int) -> None:
        """Let every parameter train."""
        for parameter in denoiser.parameters():
            parameter.data = in_float32(parameter.data)
        denoiser.requires_grad_(True)
        if self.start == 1:
            return
        for name, module in denoiser.named_modules():
            if isinstance(module, torch.nn.Linear) and name.endswith((*_OUTPUTS, _LAST)):
                factor = 0.0 if name.endswith(_LAST) else self.start
                module.weight.mul_(factor)
                assert module.bias is not None
                module.bias.zero_()
