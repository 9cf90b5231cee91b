"""Flow matching with clean context frames: the loss that Wan and InfiniteTalk were trained with."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kit.batch import Batch
from kit.draws import draw_normal, generator
from kit.flow import add_noise, context_frames, hold_context, shift_sigma, velocity_target
from kit.guidance import drop_text
from kit.models.switch import bare
from kit.objectives.base import Objective


class FlowMatching(Objective):
    """Mean squared error of the velocity, outside the frames that are given clean.

    Args:
        sigma: how levels are drawn before the shift: `uniform`, or `logit_normal`, the sigmoid of
            a normal number.
        shift: moves the levels towards noise; 1 leaves them.
        logit_mean: mean of the normal number.
        logit_std: its standard deviation.
        keep_base: weight of a second loss, which keeps the velocity without text what it was
            without the adapter; 0 leaves it out. It takes two more evaluations, one with gradients.

    Source:
        InfiniteTalk; logit-normal levels: Esser et al. 2024, section 3.1. The second loss is the
        prior preservation of DreamBooth (Ruiz et al. 2023) with the base as its own teacher.
    """

    def __init__(
        self,
        *,
        sigma: Literal["uniform", "logit_normal"] = "uniform",
        shift: Annotated[float, Field(gt=0)] = 7.0,
        logit_mean: float = 0.0,
        logit_std: Annotated[float, Field(gt=0)] = 1.0,
        keep_base: Annotated[float, Field(ge=0)] = 0.0,
    ) -> None:
        self.sigma = sigma
        self.shift = shift
        self.logit_mean = logit_mean
        self.logit_std = logit_std
        self.keep_base = keep_base

    def losses(self, denoiser: nn.Module, batch: Batch, seed: int) -> dict[str, Tensor]:
        """Compute the loss named `velocity`, and `base` where the base is to be kept."""
        sigma = self.draw_sigma(batch, seed)  # [B]
        noise = draw_noise(batch, seed)  # [B, C, F, H, W]
        noisy = noisy_latents(batch, noise, sigma)
        velocity = denoiser(noisy, sigma, batch.conditions)
        target = velocity_target(batch.latents, noise)
        losses = {"velocity": loss_outside_context(velocity, target, batch.num_context)}
        if self.keep_base:
            asked = noisy, sigma, drop_text(batch.conditions, batch.null_text)
            with torch.no_grad(), bare(denoiser):
                kept = denoiser(*asked)
            moved = loss_outside_context(denoiser(*asked), kept, batch.num_context)
            losses["base"] = self.keep_base * moved
        return losses

    def draw_sigma(self, batch: Batch, seed: int) -> Tensor:
        """Draw each sample's noise level, 0 to 1. [B]"""
        drawn = torch.stack([self._level(seed, *draw) for draw in batch.draws.tolist()])
        return shift_sigma(drawn, self.shift).to(batch.latents.device)

    def _level(self, seed: int, epoch: int, index: int) -> Tensor:
        random = generator(seed, epoch, index, "sigma")
        if self.sigma == "uniform":
            return torch.rand((), generator=random)
        return torch.sigmoid(self.logit_mean + self.logit_std * torch.randn((), generator=random))


def draw_noise(batch: Batch, seed: int) -> Tensor:
    """Draw each sample's noise, shaped as the latents. [B, C, F, H, W]"""
    shape = tuple(batch.latents.shape[1:])
    noise = [draw_normal(shape, seed, *draw, "noise") for draw in batch.draws.tolist()]
    return torch.stack(noise).to(batch.latents)


def noisy_latents(batch: Batch, noise: Tensor, sigma: Tensor) -> Tensor:
    """Make what the denoiser sees: noisy latents behind clean context. [B, C, F, H, W]"""
    noisy = add_noise(batch.latents, noise, sigma)
    return hold_context(noisy, batch.latents, batch.num_context)


def loss_outside_context(velocity: Tensor, target: Tensor, num_context: Tensor) -> Tensor:
    """Average the squared error over the frames that are not given, each sample counting alike.

    Args:
        velocity: prediction. [B, C, F, H, W]
        target: noise - latents. [B, C, F, H, W]
        num_context: given leading frames, fewer than F. [B]
    """
    learned = ~context_frames(num_context, target.shape[2])  # [B, F]
    error = (velocity.float() - target.float()).square().mean(dim=(1, 3, 4))  # [B, F]
    return ((error * learned).sum(dim=1) / learned.sum(dim=1)).mean()
