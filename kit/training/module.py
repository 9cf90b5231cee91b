"""The LightningModule: a task's network, its optimiser, and a checkpoint of what trains."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from kit.adapters.lora import trained_parameters
from kit.draws import seed_of
from kit.errors import InputError
from kit.models.hollow import whole
from kit.training.activations import activations_on_host
from kit.training.optim import OptimizerSettings
from kit.training.task import Task, total

Shard = Callable[[DeviceMesh], None]
"""Distributes a network over the processes of a mesh and reads its weights."""


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
        shard: distributes the network over the processes of a mesh and reads its weights; None if
            it is whole already.
        has_activations_on_host: keep there what the backward pass needs.
    """

    # Frozen weights are not in checkpoints; `on_load_checkpoint` is strict about all others.
    strict_loading = False

    def __init__(
        self,
        task: Task,
        optimizer: OptimizerSettings,
        seed: int,
        recipe: dict[str, Any],
        shard: Shard | None = None,
        *,
        has_activations_on_host: bool = False,
    ) -> None:
        super().__init__()
        self.network = task.network
        self.task = task
        self.optimizer = optimizer
        self.seed = seed
        self.recipe = recipe
        self.shard = shard
        self.has_activations_on_host = has_activations_on_host
        self.grad_norm = 0.0
        self._last: tuple[list[str], list[list[int]]] = ([], [])

    def configure_model(self) -> None:
        """Distribute the network, now that the processes know each other."""
        if self.shard is not None:
            assert self.device_mesh is not None
            self.shard(self.device_mesh["data_parallel"])
            self.shard = None

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
        with activations_on_host() if self.has_activations_on_host else nullcontext():
            losses = self.task.losses(batch)
        self._last = keys, draws
        self._require_finite({name: value.item() for name, value in losses.items()})
        values = {name: value.detach() for name, value in losses.items()}
        return {"loss": total(losses), "losses": values, "samples": len(keys)}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Measure the gradient before it is clipped; one that is no number must not be stepped."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.grad_norm = float(whole(torch.nn.utils.get_total_norm(gradients)))
        self._require_finite({"grad_norm": self.grad_norm})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen weights out and put the recipe in."""
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: t for n, t in state.items() if n in trained}
        checkpoint["recipe"] = self.recipe

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other tensors; count batches as this number of processes does."""
        if "state_dict" in checkpoint:  # else it was checked, and loaded, by the strategy
            self.require_trained(checkpoint["state_dict"])
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (batches["total"], batches["current"]):
            counts.update(dict.fromkeys(("ready", "started", "processed", "completed"), done))

    def require_trained(self, state: Mapping[str, Any]) -> None:
        """Refuse tensors that are not those that train.

        Raises:
            InputError: names one that differs.
        """
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        differing = sorted(trained ^ set(state))
        if differing:
            raise InputError(
                f"checkpoint: {len(differing)} trained tensors differ from this recipe's, "
                f"such as {differing[0]}"
            )

    def _require_finite(self, values: dict[str, float]) -> None:
        is_finite = all(math.isfinite(value) for value in values.values())
        # Others wait for this process, and must stop with it.
        if self.trainer.strategy.reduce_boolean_decision(is_finite, all=True):
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
