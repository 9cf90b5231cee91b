"""The processes of a run that torchrun started, and a base distributed over them."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kit.adapters.files import load_adapter
from kit.adapters.lora import adapter_key, apply_adapter
from kit.devices import choose_device
from kit.models.base import Base, Denoiser
from kit.models.hollow import fill, to_meta
from kit.models.split import Processes
from kit.sampling.pipeline import Offload
from kit.training.sharding import distribute


class Place(NamedTuple):
    """Which of the processes this one is, and where it computes."""

    rank: int
    world: int
    device: torch.device

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.world > 1:
            distributed.barrier()


def num_processes() -> int:
    """Count the processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def joined(wanted_device: str) -> Iterator[Place]:
    """Let processes that torchrun started know each other for a while; one alone is one of one.

    Args:
        wanted_device: `auto`, `cpu` or `cuda`.
    """
    device, world = choose_device(wanted_device), num_processes()
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Place(distributed.get_rank() if world > 1 else 0, world, device)
    finally:
        leave()


def leave() -> None:
    """Forget the other processes, if this one knows any."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def share_frames(denoiser: Denoiser, num_processes: int) -> None:
    """Let so many neighbouring processes share the latent frames of each video."""
    if num_processes > 1:
        make: Callable[[int], tuple[ProcessGroup, object]] = distributed.new_subgroups
        group, _ = make(num_processes)
        denoiser.processes = Processes(group, distributed.get_rank(group), num_processes)


def distribute_base(
    base: Base,
    denoiser: Denoiser,
    start: Mapping[str, Tensor],
    mesh: DeviceMesh,
    device: torch.device,
    *,
    is_offloaded: bool = False,
) -> None:
    """Distribute a denoiser; each process reads its share of what has no memory yet.

    Args:
        base: whose weights are read.
        denoiser: with its adapter.
        start: what takes the place of some of the base's weights.
        mesh: of the processes.
        device: of this one.
        is_offloaded: each has its share on the CPU; see `distribute`.
    """
    to_meta(denoiser)
    has_memory = not any(parameter.is_meta for parameter in denoiser.parameters())
    distribute(denoiser, mesh, is_offloaded=is_offloaded)
    if not has_memory:
        names = {adapter_key(name): name for name, _ in denoiser.named_parameters()}
        values = ((name, start.get(name, value)) for name, value in base.parameters())
        fill(denoiser, values, names, torch.device("cpu") if is_offloaded else device)


def load_for_sampling(
    base: Base,
    adapter: str | None,
    place: Place,
    *,
    is_quantised: bool = False,
    is_sharded: bool = False,
    offload: Offload = "none",
) -> Denoiser:
    """Load a denoiser for the processes that make a video together.

    Args:
        base: whose denoiser.
        adapter: file of a trained one, if there is one.
        place: of this process.
        is_quantised: the base's weights are in few bits, and none can be read share by share.
        is_sharded: each process holds a share of the weights.
        offload: which of them are on the CPU; `blocks` shards them too.
    """
    tensors, kind = dict[str, Tensor](), "lora"
    if adapter is not None:
        tensors, info = load_adapter(Path(adapter))
        kind = info.kind
    is_offloaded = offload == "blocks"
    is_distributed = is_sharded or is_offloaded
    if is_distributed and not is_quantised:
        denoiser = base.hollow_denoiser()
    else:
        denoiser = base.load_denoiser(place.device if offload == "none" else torch.device("cpu"))
    if tensors:
        apply_adapter(denoiser, tensors, kind)
    if is_distributed:
        denoiser.requires_grad_(False)
        mesh = _mesh(place)
        distribute_base(base, denoiser, tensors, mesh, place.device, is_offloaded=is_offloaded)
    share_frames(denoiser, place.world)
    return denoiser.eval()


def _mesh(place: Place) -> DeviceMesh:
    """Make the mesh of all processes; one alone has to know itself."""
    if not distributed.is_initialized():
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group(store=store, rank=0, world_size=1)
    return init_device_mesh(place.device.type, (place.world,))
