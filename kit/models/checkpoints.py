"""Weights: streamed from safetensors files into a network without memory, or drawn from a seed."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kit.draws import draw_normal
from kit.errors import InputError
from kit.models.keys import UNUSED_SUFFIX, our_name

FLOAT32_PARTS = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3", "norm_x"}
"""Parts that stay float32 in a bfloat16 network. Source: diffusers 0.42, and ours for norm_x."""

MAX_LISTED = 10


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and its shape."""

    file: Path
    key: str
    shape: tuple[int, ...]


def weight_files(path: Path) -> list[Path]:
    """List the safetensors files of a file or folder; empty if there are none.

    An index (`*.safetensors.index.json`) decides which files of a folder count.
    """
    if path.is_file():
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        weight_map: dict[str, str] = json.loads(indices[0].read_text())["weight_map"]
        return [path / name for name in sorted(set(weight_map.values()))]
    return sorted(path.glob("*.safetensors"))


def locate_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Find each tensor by our name; later files win, unknown names stay as they are.

    Only the files' headers are read.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        with safe_open(file, "pt") as reader:
            for key in reader.keys():
                if not key.endswith(UNUSED_SUFFIX):
                    shape = tuple(reader.get_slice(key).get_shape())
                    found[our_name(key) or key] = StoredTensor(file, key, shape)
    return found


def mismatches(model: nn.Module, stored: Mapping[str, StoredTensor]) -> list[str]:
    """Say in words which tensors are missing, unknown or of another shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    other_shape = [
        f"{name} is {list(stored[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != shape
    ]
    findings = {
        "missing": [name for name in wanted if name not in stored],
        "unknown": [tensor.key for name, tensor in stored.items() if name not in wanted],
        "differently shaped": other_shape,
    }
    return [
        f"{what} tensors ({len(names)}): {_shorten(names)}"
        for what, names in findings.items()
        if names
    ]


def load_weights(
    model: nn.Module,
    stored: Mapping[str, StoredTensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Read a network's parameters one by one, so that only one is ever held twice.

    Raises:
        InputError: a tensor is missing, unknown or has another shape; all are counted.
    """
    findings = mismatches(model, stored)
    if findings:
        files = ", ".join(sorted({str(tensor.file) for tensor in stored.values()})) or "no file"
        raise InputError(f"the weights in {files} do not fit:\n" + "\n".join(findings))
    for file in sorted({tensor.file for tensor in stored.values()}):
        with safe_open(file, "pt", device=str(device)) as reader:
            for name, tensor in stored.items():
                if tensor.file == file:
                    value = reader.get_tensor(tensor.key)
                    _assign(model, name, value.to(dtype_of(name, dtype)))


def draw_weights(model: nn.Module, seed: int, dtype: torch.dtype) -> None:
    """Give each parameter numbers that depend on the seed and its name alone.

    Nothing is zero: a part that is left out, or in the wrong place, changes the output.
    """
    for name, parameter in model.named_parameters():
        value = _draw_parameter(name, tuple(parameter.shape), seed)
        parameter.data = value.to(parameter.device, dtype_of(name, dtype))


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Choose a parameter's dtype: float32 for parts that are computed so, else the one given."""
    return torch.float32 if FLOAT32_PARTS.intersection(name.split(".")) else dtype


def _draw_parameter(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    noise = draw_normal(shape, seed, name)
    is_vector = math.prod(shape) == max(shape)
    if name.endswith("bias"):
        return 0.02 * noise
    if is_vector:
        return 1 + 0.1 * noise
    fan_in = shape[-1] if name.endswith("scale_shift_table") else math.prod(shape[1:])
    return noise / math.sqrt(fan_in)


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))


def _shorten(names: list[str]) -> str:
    rest = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")
