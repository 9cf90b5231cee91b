"""Several processes that share one network: each block is put together only while it works.

FSDP2 of torch (`fully_shard`) through Lightning's strategy.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.optim import Optimizer

from kit.models.base import Denoiser
from kit.models.hollow import share_of, whole
from kit.training.module import Fitting


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes; checkpoints are one file of what trains.

    Args:
        is_offloaded: each process has its share on the CPU; see `distribute`.
        backend: of the processes; that of the device if absent.
    """

    def __init__(self, *, is_offloaded: bool = False, backend: str | None = None) -> None:
        # Lightning's own choice would give all processes of a machine the same data.
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
        )
        self.is_offloaded = is_offloaded

    def setup_environment(self) -> None:
        """Make the mesh of all processes of all machines."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def model_to_device(self) -> None:
        """Leave an offloaded network where it is; what is not shared out is on the device."""
        if not self.is_offloaded:
            super().model_to_device()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Collect what trains in the first process; frozen weights are never gathered."""
        gathered = ((name, whole(parameter).detach()) for name, parameter in self._trained())
        return {name: value.cpu() for name, value in gathered if self.is_global_zero}

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
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(share_of(state[name], parameter, parameter.device))
        options = StateDictOptions(full_state_dict=True)
        for optimizer, numbered in zip(self.optimizers, saved["optimizer_states"], strict=True):
            named = by_name(numbered, optimizer, self.model)
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return saved

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        assert self.lightning_module is not None
        return [(n, p) for n, p in self.lightning_module.named_parameters() if p.requires_grad]


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


def distribute(denoiser: Denoiser, mesh: DeviceMesh, *, is_offloaded: bool = False) -> None:
    """Distribute a denoiser's parameters, block by block.

    Weights packed into integers cannot be cut; every process has all of them.

    Args:
        denoiser: with its adapter; frozen weights may still be on the meta device.
        mesh: of the processes.
        is_offloaded: shares, gradients and what the optimiser keeps are on the CPU; a block is on
            the device only while it works. Several processes fetch one block while another works.
    """
    packed = {p for p in denoiser.parameters() if not p.is_floating_point()}
    policy = OffloadPolicy()
    if is_offloaded:
        policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for module in (*denoiser.blocks(), denoiser):
        fully_shard(
            module,
            mesh=mesh,
            # Else what is in no block stays together behind a preview, which has no backward pass,
            # and the next step works with the averages that the preview was made with.
            reshard_after_forward=True,
            offload_policy=policy,
            ignored_params=packed or None,
        )
