"""Where to compute."""

import torch


def choose_device(wanted: str) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into a device; `auto` takes a GPU if there is one."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)
