"""Several processes that share one network: each block is put together only while it works.

FSDP2 of torch (`fully_shard`) through Lightning's strategy.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from kit.models.base import Denoiser
from kit.training.module import Fitting


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes; checkpoints are one file of what trains."""

    def __init__(self) -> None:
        # Lightning's own choice would give all processes of a machine the same data.
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Make the mesh of all processes of all machines."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Collect what trains; frozen weights are never gathered."""
        assert self.model is not None
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        return get_model_state_dict(self.model, options=options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load what trains, by whatever number of processes it was saved.

        Lightning's own takes the numbers of an unsharded optimiser's parameters for those of all
        parameters, and leaves out without a word what is missing.
        """
        saved: dict[str, Any] = torch.load(
            checkpoint_path, weights_only=True, map_location="cpu", mmap=True
        )
        assert isinstance(self.lightning_module, Fitting)
        assert self.model is not None
        state = saved.pop("state_dict")
        self.lightning_module.require_trained(state)
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self.model, state, options=options)
        for optimizer, numbered in zip(self.optimizers, saved["optimizer_states"], strict=True):
            named = by_name(numbered, optimizer, self.model)
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return saved


def by_name(numbered: dict[str, Any], optimizer: Optimizer, network: nn.Module) -> dict[str, Any]:
    """Name the parameters in an optimiser's saved state, which stand there in order."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    own = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [number for group in numbered["param_groups"] for number in group["params"]]
    name_of = {number: names[id(p)] for number, p in zip(saved, own, strict=True)}
    groups = [
        {**group, "params": [name_of[number] for number in group["params"]]}
        for group in numbered["param_groups"]
    ]
    state = {name_of[number]: values for number, values in numbered["state"].items()}
    return {"state": state, "param_groups": groups}


def distribute(denoiser: Denoiser, mesh: DeviceMesh, *, replicate_frozen: bool = False) -> None:
    """Distribute a denoiser's parameters, block by block.

    Args:
        denoiser: with its adapter; frozen weights may still be on the meta device.
        mesh: of the processes.
        replicate_frozen: every process holds all frozen weights, which those of 4 or 8 bits need.
    """
    kept = {p for p in denoiser.parameters() if replicate_frozen and not p.requires_grad}
    for module in (*denoiser.blocks(), denoiser):
        fully_shard(module, mesh=mesh, ignored_params=kept or None)
