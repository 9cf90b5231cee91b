"""Optimisers and the course of their learning rate."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from kit.models.keys import is_audio
from kit.training.muon import Muon

Course = Literal["constant", "cosine"]
Rate = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Protocol):
    """The recipe's `optimizer` section."""

    @property
    def is_elementwise(self) -> bool:
        """Whether a part of a tensor can be updated without the rest."""

    def optimizer(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimiser of these parameters."""

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
        """Make the course of the learning rate over a run of so many steps."""


class AdamW:
    """AdamW, of torch or with 8-bit moving averages of bitsandbytes.

    Args:
        lr: learning rate after warm-up.
        audio_lr: learning rate of the audio parts; `lr` if absent.
        betas: decay of the moving averages.
        weight_decay: pulled towards zero per step and unit of lr.
        warmup_steps: steps in which the rate rises from zero.
        course: of the rate after warm-up; `cosine` falls to `final_share` of it.
        final_share: 0 to 1.
        state_bits: bits of a moving average; 8 saves memory when much trains.

    Source: lr 1e-4 for factors is usual for Wan; 2e-5 was MultiTalk's for whole audio modules.
    """

    def __init__(
        self,
        *,
        lr: Rate = 1e-4,
        audio_lr: Rate | None = None,
        betas: Annotated[Sequence[Beta], Field(min_length=2, max_length=2)] = (0.9, 0.999),
        weight_decay: Annotated[float, Field(ge=0)] = 0.01,
        warmup_steps: Annotated[int, Field(ge=0)] = 100,
        course: Course = "constant",
        final_share: Annotated[float, Field(ge=0, le=1)] = 0.1,
        state_bits: Literal[32, 8] = 32,
    ) -> None:
        self.lr = lr
        self.audio_lr = lr if audio_lr is None else audio_lr
        self.betas = (betas[0], betas[1])
        self.weight_decay = weight_decay
        self.course = RateCourse(warmup_steps, course, final_share)
        self.state_bits = state_bits

    @property
    def is_elementwise(self) -> bool:
        """Moving averages of 8 bits share factors within blocks."""
        return self.state_bits == 32

    def optimizer(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimiser of these parameters."""
        optimizer = torch.optim.AdamW if self.state_bits == 32 else _adamw_8bit()
        return optimizer(self.groups(parameters), betas=self.betas, weight_decay=self.weight_decay)

    def groups(self, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, object]]:
        """Split parameters by learning rate."""
        audio = [p for name, p in parameters.items() if is_audio(name)]
        trunk = [p for name, p in parameters.items() if not is_audio(name)]
        pairs = ((trunk, self.lr), (audio, self.audio_lr))
        return [{"params": params, "lr": lr} for params, lr in pairs if params]

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
        """Make the course of the learning rate over a run of so many steps."""
        return LambdaLR(optimizer, lambda step: self.course.share(step, steps))


class MuonSettings:
    """Muon for matrices and convolutions, Adam for vectors: fast for whole small networks.

    Args:
        lr: of matrices after warm-up.
        vector_lr: of vectors.
        betas: decay of Adam's moving averages.
        weight_decay: pulled towards zero per step and unit of lr.
        warmup_steps: steps in which the rate rises from zero.
        course: of the rate after warm-up; `cosine` falls to `final_share` of it.
        final_share: 0 to 1.
    """

    def __init__(
        self,
        *,
        lr: Rate = 0.05,
        vector_lr: Rate = 5e-3,
        betas: Annotated[Sequence[Beta], Field(min_length=2, max_length=2)] = (0.9, 0.98),
        weight_decay: Annotated[float, Field(ge=0)] = 0.0,
        warmup_steps: Annotated[int, Field(ge=0)] = 50,
        course: Course = "cosine",
        final_share: Annotated[float, Field(ge=0, le=1)] = 0.03,
    ) -> None:
        self.lr = lr
        self.vector_lr = vector_lr
        self.betas = (betas[0], betas[1])
        self.weight_decay = weight_decay
        self.course = RateCourse(warmup_steps, course, final_share)

    @property
    def is_elementwise(self) -> bool:
        """Whole matrices are made orthogonal."""
        return False

    def optimizer(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimiser of these parameters."""
        return Muon(parameters.values(), self.lr, self.vector_lr, self.betas, self.weight_decay)

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
        """Make the course of the learning rate over a run of so many steps."""
        return LambdaLR(optimizer, lambda step: self.course.share(step, steps))


@dataclass(frozen=True)
class RateCourse:
    """How the learning rate changes over a run.

    Attributes:
        warmup_steps: steps in which the rate rises from zero.
        course: `constant`, or `cosine` down to `final_share`.
        final_share: 0 to 1.
    """

    warmup_steps: int
    course: Course
    final_share: float

    def share(self, step: int, steps: int) -> float:
        """Give the share of the learning rate at a step of so many, 0 to 1."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.course == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(steps - self.warmup_steps, 1)
        falling = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        return self.final_share + (1 - self.final_share) * falling


def _adamw_8bit() -> Callable[..., torch.optim.Optimizer]:
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit
