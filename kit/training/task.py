"""What the loop trains: a network, and how a batch becomes losses."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from kit.batch import Batch
from kit.models.base import Denoiser
from kit.objectives.base import Objective
from kit.training.dropout import ConditionDropout


class Task(ABC):
    """Owns what trains, so that the loop never learns what is trained."""

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The network; what of it requires gradients trains."""

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Compute the losses of a batch, scalars by name."""

    @abstractmethod
    def names(self, batch: Any) -> tuple[list[str], list[list[int]]]:
        """Name the samples of a batch, and the (epoch, index) of each."""


class DenoiserTask(Task):
    """Fine-tunes a denoiser: drop conditions, then ask the objective.

    Args:
        denoiser: with its adapter.
        objective: turns a batch into losses.
        dropout: drops conditions before the objective sees them.
        seed: of the run; with (epoch, index) it decides all random choices.
    """

    def __init__(
        self, denoiser: Denoiser, objective: Objective, dropout: ConditionDropout, seed: int
    ) -> None:
        self.denoiser = denoiser
        self.objective = objective
        self.dropout = dropout
        self.seed = seed

    @property
    def network(self) -> nn.Module:
        """The denoiser."""
        return self.denoiser

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the objective's losses."""
        return self.objective.losses(self.denoiser, self.dropout.drop(batch, self.seed), self.seed)

    def names(self, batch: Batch) -> tuple[list[str], list[list[int]]]:
        """Name the samples of a batch."""
        return list(batch.keys), batch.draws.tolist()


def total(losses: dict[str, Tensor]) -> Tensor:
    """Add losses up."""
    return torch.stack(list(losses.values())).sum()
