"""The adapter file of this kit: trained tensors, and in its header how they came about."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kit.atomic import atomic_write
from kit.errors import InputError

HEADER = "charakit"


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter file says of itself.

    Attributes:
        name: of the run that trained it.
        base: type of the base model, a name from the table of bases.
        kind: of its factors, a name from `KINDS`; how large they are stands in the tensors.
        parts: parts of the denoiser with factors.
        train_fully: parts that trained without factors.
        steps: optimiser steps so far.
        recipe: the resolved recipe, as YAML.
    """

    name: str
    base: str
    kind: str
    parts: tuple[str, ...]
    train_fully: tuple[str, ...]
    steps: int
    recipe: str


def write_adapter(path: Path, tensors: Mapping[str, Tensor], info: AdapterInfo) -> None:
    """Write an adapter file; a file of that name is replaced only by a complete one."""
    write_tensors(path, tensors, {"format": "pt", HEADER: json.dumps(asdict(info))})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file; a file of that name is replaced only by a complete one."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as partial:
        save_file(contiguous, partial, metadata=header)


def load_adapter(path: Path) -> tuple[dict[str, Tensor], AdapterInfo]:
    """Read an adapter file.

    Raises:
        InputError: the file is missing, unreadable, or not an adapter of this kit.
    """
    info = load_info(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, info  # noqa: SIM118


def load_info(path: Path) -> AdapterInfo:
    """Read what an adapter file says of itself.

    Raises:
        InputError: the file is missing, unreadable, or not an adapter of this kit.
    """
    if not path.is_file():
        raise InputError(f"adapter: no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
    except SafetensorError as error:
        raise InputError(f"adapter: {path} cannot be read: {error}") from error
    if header is None:
        raise InputError(f"adapter: {path} was not written by this kit")
    try:
        values = json.loads(header)
        lists = {name: tuple(values[name]) for name in ("parts", "train_fully")}
        return AdapterInfo(**{**values, **lists})
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"adapter: the header of {path} is of another version: {error}") from error
