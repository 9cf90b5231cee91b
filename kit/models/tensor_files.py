"""Files of tensors: what lies in them, and reading it piece by piece.

safetensors, and files by `torch.save` that hold nothing but tensors.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from kit.errors import InputError

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

MAX_LISTED = 10

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Names of dtypes: those of safetensors to those of torch."""

Read = Callable[[str], Tensor]
"""Reads a tensor of an open file by its key."""


class Entry(NamedTuple):
    """Shape and dtype of a stored tensor; the dtype as torch calls it."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        tensors: by key, in the order of the file.
        metadata: free text by key.
    """

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]


def weight_files(path: Path, pattern: str = "*.safetensors") -> list[Path]:
    """List the files of weights that a path stands for; empty if there are none.

    A file stands for itself. In a folder, an index (`*.index.json`) decides which files count.

    Raises:
        InputError: the index cannot be read.
    """
    if path.is_file():
        return [path]
    indices = sorted(path.glob(f"{pattern}.index.json"))
    return indexed_files(indices[0]) if indices else sorted(path.glob(pattern))


def indexed_files(index: Path) -> list[Path]:
    """List the files of an index, each once, whether they are there or not.

    Raises:
        InputError: it is no index.
    """
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [index.parent / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"'{index}' is no index of weight files: {error!r}") from error


def read_header(file: Path) -> Header:
    """Say what a file holds; no tensor is read.

    Raises:
        InputError: it is no file of tensors, or is damaged.
    """
    source = _open(file, torch.device("cpu"))
    if isinstance(source, dict):
        return Header({key: _describe(value) for key, value in source.items()}, {})
    with source as reader:
        slices = {key: reader.get_slice(key) for key in reader.offset_keys()}
        entries = {
            key: Entry(tuple(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype()))
            for key, part in slices.items()
        }
        return Header(entries, reader.metadata() or {})


@contextmanager
def open_tensors(file: Path, device: torch.device) -> Iterator[Read]:
    """Open a file for reading its tensors one by one, onto a device.

    Each has memory of its own. Pages of a file by `torch.save` count as memory while it is open.

    Raises:
        InputError: it is no file of tensors, or is damaged.
    """
    source = _open(file, device)
    if isinstance(source, dict):
        yield lambda key: source[key].to(device, copy=True)
    else:
        with source as reader:
            yield reader.get_tensor


def same_shape(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Tell whether shapes are equal but for axes of length one in front."""
    longer = max(len(one), len(other))
    return (1,) * (longer - len(one)) + one == (1,) * (longer - len(other)) + other


def shorten(names: Sequence[str]) -> str:
    """List a few names, and count the rest."""
    rest = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _open(file: Path, device: torch.device) -> dict[str, Tensor] | safe_open:
    if not file.is_file():
        raise InputError(f"there is no file '{file}'")
    if file.suffix not in SUFFIXES:
        raise InputError(f"'{file}' is no file of weights; valid: {', '.join(SUFFIXES)}")
    try:
        if file.suffix in TORCH_SUFFIXES:
            return _load_torch(file)
        # Mapped files count as memory twice, and must be smaller than the machine's.
        return safe_open(file, "pt", device=str(device), backend="pread")
    except InputError:
        raise
    # Reading what is no pickle fails in any way.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"'{file}' cannot be read; is it cut or damaged? {reason}") from error


def _load_torch(file: Path) -> dict[str, Tensor]:
    # Files older than torch 1.6 are no archives, and cannot be mapped.
    is_archive = zipfile.is_zipfile(file)
    content = torch.load(file, map_location="cpu", mmap=is_archive, weights_only=True)
    if not isinstance(content, dict):
        raise InputError(f"'{file}' holds a {type(content).__name__}, no tensors by name")
    content = content.get("state_dict", content)
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def _describe(tensor: Tensor) -> Entry:
    return Entry(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
