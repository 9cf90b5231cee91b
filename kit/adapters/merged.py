"""Weights with an adapter merged into them, as files that load in the place of the base's own.

Every writer takes parameters one by one and holds no more than one file's worth of them.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from kit.adapters.files import write_tensors
from kit.atomic import write_text
from kit.models.keys import is_audio

SHARD_BYTES = 5_000_000_000
"""Of one file; what the public checkpoints have."""

TRUNK = "transformer."

Parameters = Iterable[tuple[str, Tensor]]
"""Our names and values."""

Rename = Callable[[str], str]


def write_audio(parameters: Parameters, file: Path, public_name: Rename) -> Path:
    """Write audio modules as InfiniteTalk publishes them, which ComfyUI takes as a model patch."""
    tensors = {public_name(name): value for name, value in parameters if is_audio(name)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, tensors, {"format": "pt"})
    return file


def write_diffusers(parameters: Parameters, out: Path, public_name: Rename) -> list[Path]:
    """Write the denoiser's part of a base folder in diffusers' layout."""
    audio: dict[str, Tensor] = {}
    trunk = ((n.removeprefix(TRUNK), t) for n, t in _without_audio(parameters, audio))
    files = write_shards(trunk, out / "transformer")
    return [*files, write_audio(audio.items(), out / "audio" / "model.safetensors", public_name)]


def write_wan(parameters: Parameters, out: Path, public_name: Rename) -> list[Path]:
    """Write the denoiser as Wan2.1 and InfiniteTalk publish it."""
    audio: dict[str, Tensor] = {}
    trunk = ((public_name(n), t) for n, t in _without_audio(parameters, audio))
    files = write_shards(trunk, out)
    return [*files, write_audio(audio.items(), out / "infinitetalk.safetensors", public_name)]


LAYOUTS = {"base": write_diffusers, "wan": write_wan}
"""Name to writer of a whole denoiser."""


def _without_audio(
    parameters: Parameters, audio: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Pass the trunk on, and lay the audio modules aside."""
    for name, value in parameters:
        if is_audio(name):
            audio[name] = value
        else:
            yield name, value


def write_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, limit: int = SHARD_BYTES
) -> list[Path]:
    """Write tensors to files of a limited size, with the index that diffusers and others read.

    Args:
        tensors: names and values.
        folder: for `diffusion_pytorch_model*.safetensors`.
        limit: bytes of a file, unless a single tensor has more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[list[str]] = []
    total = 0
    _remove_parts(folder)  # of a run that was killed
    try:
        for number, shard in enumerate(_shards(tensors, limit)):
            write_tensors(folder / _part(number), shard, {"format": "pt"})
            parts.append(list(shard))
            total += sum(tensor.nbytes for tensor in shard.values())
    except BaseException:
        _remove_parts(folder)
        raise
    for older in folder.glob("diffusion_pytorch_model*"):
        older.unlink()
    if len(parts) == 1:
        return [(folder / _part(0)).rename(folder / "diffusion_pytorch_model.safetensors")]
    return _name_shards(folder, parts, total)


def _part(number: int) -> str:
    return f"unnamed-{number}.safetensors"


def _remove_parts(folder: Path) -> None:
    for part in folder.glob("unnamed-*"):
        part.unlink()


def _name_shards(folder: Path, parts: list[list[str]], total: int) -> list[Path]:
    """Name files by their number and count, and write which tensor is where."""
    weight_map: dict[str, str] = {}
    files = []
    for number, names in enumerate(parts):
        name = f"diffusion_pytorch_model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        files.append((folder / _part(number)).rename(folder / name))
        weight_map |= dict.fromkeys(names, name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    facts = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(index, json.dumps(facts, indent=2) + "\n")
    return [*files, index]


def _shards(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Gather tensors until the next one would be too much."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def cast(parameters: Parameters, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Bring parameters to a dtype; None leaves each in its own."""
    for name, value in parameters:
        yield name, value if dtype is None else value.to(dtype)
