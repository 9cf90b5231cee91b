"""Options with which each shipped plugin does something on the tiny base in a few steps."""

import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kit.draws import draw_normal

OPTIONS: dict[str, dict[str, Any]] = {
    "first_block": {"threshold": 10.0, "first_steps": 1},
    "mag_cache": {"ratios": [1.0, 1.01], "first_steps": 1},
    "skip_layers": {"layers": [1], "start": 0.0, "end": 1.0},
    "tea_cache": {"coefficients": [1.0, 0.0], "threshold": 10.0, "first_steps": 1},
    "uni3c": {"weights": "controller.safetensors", "camera": "orbit", "depth": "depth.safetensors"},
}


def give_options(name: str, folder: Path) -> dict[str, Any]:
    """Give a plugin's options; the files that they name are drawn into a folder."""
    if name != "uni3c":
        return OPTIONS.get(name, {})
    files = {"weights": _draw_controller(), "depth": {"depth": torch.full((32, 48), 3.0)}}
    options = dict(OPTIONS[name])
    for option, tensors in files.items():
        path = folder / options[option]
        save_file(tensors, path, {"num_heads": "2"})
        options[option] = str(path)
    return options


def _draw_controller() -> dict[str, torch.Tensor]:
    uni3c: Any = importlib.import_module("kit.plugins.uni3c.controller")
    sizes = uni3c.Sizes(
        in_channels=36,
        guide_channels=7,
        guide_dim=8,
        base_dim=48,
        time_dim=48,
        dim=16,
        ffn_dim=24,
        num_heads=2,
        num_layers=2,
    )
    state = uni3c.Controller(sizes).state_dict()
    return {key: 0.2 * draw_normal(tuple(value.shape), key) for key, value in state.items()}
