"""Where to compute."""

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
