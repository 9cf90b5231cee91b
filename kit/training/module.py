"""The LightningModule: a task's network, its optimiser, and a checkpoint of what trains."""

from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from kit.adapters.lora import trained_parameters
from kit.draws import seed_of
from kit.errors import InputError
from kit.training.optim import OptimizerSettings
from kit.training.task import Task, total


class LossNotFinite(RuntimeError):
    """A loss became NaN or infinite.

    Attributes:
        report: step, samples and losses, plain values.
    """

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__(
            f"step {report['step']}: the loss is {report['losses']} for {report['keys']}"
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
        self._require_finite(losses, keys, draws)
        values = {name: value.detach() for name, value in losses.items()}
        return {"loss": total(losses), "losses": values, "samples": len(keys)}

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

    def _require_finite(
        self, losses: dict[str, Tensor], keys: list[str], draws: list[list[int]]
    ) -> None:
        if all(torch.isfinite(value) for value in losses.values()):
            return
        raise LossNotFinite(
            {
                "step": self.trainer.global_step,
                "losses": {name: value.item() for name, value in losses.items()},
                "keys": keys,
                "draws": draws,
                "seed": self.seed,
            }
        )
