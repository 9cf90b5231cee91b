"""The LightningModule: a task's network, its optimiser, and a checkpoint of what trains."""

import math
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.optim import Optimizer

from kit.adapters.lora import trained_parameters
from kit.draws import seed_of
from kit.errors import InputError
from kit.training.optim import OptimizerSettings
from kit.training.task import Task, total


class LossNotFinite(RuntimeError):
    """A loss or gradient became NaN or infinite.

    Attributes:
        report: step, samples and losses, plain values.
    """

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__(
            f"step {report['step']}: {report['losses']} for {', '.join(report['keys'])}"
        )
        self.report = report


class Fitting(LightningModule):
    """Trains what a task opened of its network.

    A checkpoint holds only what trains. All random choices are functions of (seed, epoch, sample),
    so nothing about randomness is saved.

    Args:
        task: owns the network and turns batches into losses.
        optimizer: makes the optimiser and the course of its rate.
        seed: of the run.
        recipe: the resolved recipe, plain values; kept in checkpoints.
    """

    # Frozen weights are not in checkpoints; `on_load_checkpoint` is strict about all others.
    strict_loading = False

    def __init__(
        self, task: Task, optimizer: OptimizerSettings, seed: int, recipe: dict[str, Any]
    ) -> None:
        super().__init__()
        self.network = task.network
        self.task = task
        self.optimizer = optimizer
        self.seed = seed
        self.recipe = recipe
        self.grad_norm = 0.0
        self._last: tuple[list[str], list[list[int]]] = ([], [])

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Name the parameters that train, as an adapter file names them."""
        return trained_parameters(self.network)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Make the optimiser of what trains; its rate changes with every step."""
        optimizer = self.optimizer.optimizer(self.trained())
        schedule = self.optimizer.schedule(optimizer, self.trainer.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Ask the task for losses and add them up."""
        keys, draws = self.task.names(batch)
        # Dropout inside the network draws from torch's own generator.
        torch.manual_seed(seed_of(self.seed, *sum(draws, []), "network"))
        losses = self.task.losses(batch)
        self._last = keys, draws
        self._require_finite({name: value.item() for name, value in losses.items()})
        values = {name: value.detach() for name, value in losses.items()}
        return {"loss": total(losses), "losses": values, "samples": len(keys)}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Measure the gradient before it is clipped; one that is no number must not be stepped."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        self._require_finite({"grad_norm": self.grad_norm})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen weights out and put the recipe in."""
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: t for n, t in state.items() if n in trained}
        checkpoint["recipe"] = self.recipe

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that holds other tensors than those that train."""
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        differing = sorted(trained ^ set(checkpoint["state_dict"]))
        if differing:
            raise InputError(
                f"checkpoint: {len(differing)} trained tensors differ from this recipe's, "
                f"such as {differing[0]}"
            )

    def _require_finite(self, values: dict[str, float]) -> None:
        if all(math.isfinite(value) for value in values.values()):
            return
        keys, draws = self._last
        raise LossNotFinite(
            {
                "step": self.trainer.global_step,
                "losses": values,
                "keys": keys,
                "draws": draws,
                "seed": self.seed,
            }
        )
