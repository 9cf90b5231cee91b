"""Where to compute, and whether there is room for it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def choose_device(wanted: str) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into a device; `auto` takes a GPU if there is one."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


@contextmanager
def visiting(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a network on a device for a while, and on the CPU again afterwards."""
    network.to(device)
    try:
        yield
    finally:
        network.to("cpu")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that a device or the host has no memory left."""
    is_told_by_torch = isinstance(error, RuntimeError) and any(
        words in str(error) for words in _NO_MEMORY
    )
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or is_told_by_torch


_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Words of torch's other errors: the driver's, the CPU allocator's, and the matrix library's."""
