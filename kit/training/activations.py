"""What the backward pass needs, kept in the memory of the host until then."""

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks


def activations_on_host() -> saved_tensors_hooks:
    """Keep on the CPU what operations save as long as the context lasts; weights stay.

    Of blocks that are recomputed, these are the inputs alone.
    """
    host = save_on_cpu(pin_memory=torch.cuda.is_available())

    def pack(tensor: Tensor) -> object:
        return tensor if is_weight(tensor) else host.pack_hook(tensor)

    def unpack(packed: object) -> Tensor:
        tensor: Tensor = packed if isinstance(packed, Tensor) else host.unpack_hook(packed)
        return tensor

    return saved_tensors_hooks(pack, unpack)


def is_weight(tensor: Tensor) -> bool:
    """Tell whether a tensor is a parameter or a view of one, which has no memory of its own."""
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
