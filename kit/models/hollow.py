"""Parameters that have a size but no memory, until each process reads its share of them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

META = torch.device("meta")


def hollow_out(network: nn.Module) -> None:
    """Give parameters on the meta device one number for all: PEFT puts factors only on real ones.

    Unlike those on the meta device, they let factors beside them be drawn on the CPU.
    """
    for name, parameter in list(network.named_parameters()):
        _replace(network, name, torch.zeros((), dtype=parameter.dtype).expand(parameter.shape))


def is_hollow(parameter: Tensor) -> bool:
    """Tell whether all numbers of a parameter are one and the same in memory."""
    return parameter.numel() > 1 and not any(parameter.stride())


def in_float32(value: Tensor) -> Tensor:
    """Turn numbers into float32; those without memory stay without."""
    return torch.zeros(()).expand(value.shape) if is_hollow(value) else value.float()


def to_meta(network: nn.Module) -> None:
    """Bring hollow parameters back to the meta device; whoever shards wants no strides of zero."""
    for name, parameter in list(network.named_parameters()):
        if is_hollow(parameter):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=META)
            _replace(network, name, empty, requires_grad=parameter.requires_grad)


def fill(
    network: nn.Module,
    values: Iterable[tuple[str, Tensor]],
    names: Mapping[str, str],
    device: torch.device,
) -> None:
    """Give parameters on the meta device their values, each process only its share.

    Args:
        network: whose parameters may be sharded.
        values: all of them, one by one, in any order; only one is held as a whole.
        names: name of a value to that of the parameter.
        device: of the shares.
    """
    parameters, state = dict(network.named_parameters()), {}
    for name, value in values:
        parameter = parameters[names[name]]
        if parameter.is_meta:
            state[names[name]] = share_of(value.to(parameter.dtype), parameter, device)
    network.load_state_dict(state, strict=False, assign=True)
    empty = [name for name, parameter in network.named_parameters() if parameter.is_meta]
    assert not empty, f"no values for {empty[:3]}"


def share_of(value: Tensor, like: Tensor, device: torch.device) -> Tensor:
    """Take the share of a whole tensor that this process holds of a parameter.

    Args:
        value: the whole tensor, equal in all processes.
        like: the parameter; one that is not sharded is held as a whole.
        device: of the share.
    """
    if not isinstance(like, DTensor):
        return value.to(device)
    mesh: DeviceMesh = like.device_mesh
    shape, offset = compute_local_shape_and_global_offset(like.shape, mesh, like.placements)
    place = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    # A copy, because a view would keep the whole tensor in memory.
    local = value[place].to(device, copy=True)
    return DTensor.from_local(
        local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def whole(value: Tensor) -> Tensor:
    """Put a sharded tensor together; all processes must ask for it at the same time."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _replace(network: nn.Module, name: str, value: Tensor, *, requires_grad: bool = False) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=requires_grad))
