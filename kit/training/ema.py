"""An exponential moving average of what trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from kit.models.hollow import share_of, whole
from kit.training.module import Fitting


class AdapterEMA(Callback):
    """Averages the trained parameters over the steps; frozen weights are neither copied nor saved.

    Args:
        decay: share of the average that stays at each step, 0 to 1; 0 follows the weights.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the weights, unless a checkpoint has brought an average."""
        self._last_step = trainer.global_step
        for name, parameter in _trained(pl_module).items():
            start = parameter.detach()
            if name in self.average:
                start = share_of(self.average[name], parameter, parameter.device)
            self.average[name] = start.to(torch.float32, copy=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *batch: object
    ) -> None:
        """Move the average after each optimiser step."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        for name, parameter in _trained(pl_module).items():
            self.average[name].lerp_(parameter.detach().float(), 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """Give the average to the checkpoint; all processes ask at the same time."""
        return {"average": {name: whole(value) for name, value in self.average.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the average from a checkpoint."""
        self.average = dict(state_dict["average"])

    @contextmanager
    def applied(self, module: Fitting) -> Iterator[None]:
        """Let the module work with the averaged weights for a while."""
        trained = module.trained()
        before = {name: parameter.detach().clone() for name, parameter in trained.items()}
        try:
            _assign(trained, self.average)
            yield
        finally:
            _assign(trained, before)


def _trained(module: LightningModule) -> dict[str, torch.nn.Parameter]:
    assert isinstance(module, Fitting)
    return module.trained()


@torch.no_grad()
def _assign(parameters: dict[str, torch.nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
