"""The recipe's `trainer` section: how long, how precise, how often saved."""

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from pydantic import Field

from kit.devices import choose_device
from kit.training.checkpoints import AtomicCheckpoints, SaveCheckpoints
from kit.training.curves import Curves
from kit.training.ema import AdapterEMA
from kit.training.progress import Progress
from kit.training.sharding import ShardedStrategy
from kit.training.stop import GracefulStop

Count = Annotated[int, Field(ge=1)]


class Training:
    """Length and precision of a run, and what it leaves on the way.

    Args:
        max_steps: optimiser steps.
        precision: of the computation; what trains is always float32.
        accumulate: batches in a step.
        clip_norm: longest gradient; 0 does not clip.
        checkpoint_blocks: recompute every n-th block in the backward pass, to save memory; 0 none.
        ema_decay: of the average that becomes the adapter; 0 takes the last weights.
        save_every: steps between two checkpoints.
        keep_checkpoints: newest ones to keep.
        log_every: steps between two entries in TensorBoard.
        device: `auto` takes a GPU if there is one.
        devices: processes on each machine, each with a GPU or on the CPU, which share the network
            block by block; `auto` takes all GPUs. Under torchrun its number counts.
        nodes: machines, started by torchrun or SLURM.
        shard: distribute the network even if there is only one process.
        offload: `weights` keeps the network, its gradients and the optimiser's averages in the
            memory of the CPU, and has on the GPU the block that works.
        activations: `host` keeps what the backward pass needs in the memory of the CPU until then;
            with `checkpoint_blocks: 1` that is the input of each block.
        split_frames: neighbouring processes that share each video, its latent frames among them, so
            that longer or larger windows fit.
    """

    def __init__(
        self,
        *,
        max_steps: Count = 2000,
        precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed",
        accumulate: Count = 1,
        clip_norm: Annotated[float, Field(ge=0)] = 1.0,
        checkpoint_blocks: Annotated[int, Field(ge=0)] = 1,
        ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99,
        save_every: Count = 250,
        keep_checkpoints: Count = 2,
        log_every: Count = 10,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        devices: Count | Literal["auto"] = 1,
        nodes: Count = 1,
        shard: bool = False,
        offload: Literal["none", "weights"] = "none",
        activations: Literal["device", "host"] = "device",
        split_frames: Count = 1,
    ) -> None:
        self.max_steps = max_steps
        self.precision = precision
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.checkpoint_blocks = checkpoint_blocks
        self.ema_decay = ema_decay
        self.save_every = save_every
        self.keep_checkpoints = keep_checkpoints
        self.log_every = log_every
        self.device = device
        self.devices = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or _count(devices)
        self.nodes = int(os.environ.get("GROUP_WORLD_SIZE", 0)) or nodes
        self.is_offloaded = offload == "weights"
        self.is_sharded = shard or self.is_offloaded or self.world > 1
        self.has_activations_on_host = activations == "host"
        self.split_frames = split_frames

    @property
    def world(self) -> int:
        """Count the processes."""
        return self.devices * self.nodes

    @property
    def batches_per_step(self) -> int:
        """Count the batches of all processes in an optimiser step."""
        return self.accumulate * self.world // self.split_frames

    @property
    def uses_gpu(self) -> bool:
        """Whether the network works on a GPU."""
        return choose_device(self.device).type == "cuda"

    @property
    def num_batches(self) -> int:
        """Count the batches that one process uses in the whole run."""
        return self.max_steps * self.accumulate

    def trainer(self, folder: Path, ema: AdapterEMA, more: Sequence[Callback]) -> Trainer:
        """Make Lightning's trainer for a run's folder.

        Args:
            folder: receives checkpoints, curves and TensorBoard files.
            ema: the average of what trains.
            more: callbacks that come behind the average and before the checkpoints.
        """
        _quieten()
        return Trainer(
            accelerator="gpu" if self.uses_gpu else "cpu",
            devices=self.devices,
            num_nodes=self.nodes,
            strategy=self._strategy() if self.is_sharded else "auto",
            max_steps=self.max_steps,
            max_epochs=1,
            precision=self.precision,
            accumulate_grad_batches=self.accumulate,
            gradient_clip_val=self.clip_norm or None,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            logger=TensorBoardLogger(folder, name="", version="tensorboard"),
            log_every_n_steps=self.log_every,
            plugins=[AtomicCheckpoints()],
            callbacks=[
                ema,
                GracefulStop(),
                Curves(folder, self.log_every, self.split_frames),
                Progress(),
                *more,
                SaveCheckpoints(folder / "checkpoints", self.save_every, self.keep_checkpoints),
            ],
        )

    def _strategy(self) -> ShardedStrategy:
        # Shares on the CPU are added up there.
        backend = "cpu:gloo,cuda:nccl" if self.is_offloaded and self.uses_gpu else None
        return ShardedStrategy(is_offloaded=self.is_offloaded, backend=backend)


def _count(devices: int | Literal["auto"]) -> int:
    return max(torch.cuda.device_count(), 1) if devices == "auto" else devices


def _quieten() -> None:
    """Silence what Lightning says about choices that are the recipe's."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*training batches.*logging interval.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
    ):
        warnings.filterwarnings("ignore", message=message)
