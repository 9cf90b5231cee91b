"""What plans of all commands need to know: sizes of a base, rates and memory of this machine."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from kit.errors import InputError
from kit.models.audio import AudioSizes
from kit.models.base import Base, Denoiser
from kit.models.repositories import is_remote
from kit.models.wan import Wan
from kit.planning.batches import CLIP_TOKENS, Widths
from kit.planning.network import Holding
from kit.recipe import Recipe

GB = 1e9

PUBLIC_14B = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
    "cross_attn_norm": True,
}
"""Sizes of Wan2.1-I2V-14B, for plans where it is not there. Source: its config.json."""

MATRIX_SIDE = 2048
RATE_SECONDS = 0.5


@runtime_checkable
class Outlined(Protocol):
    """Encoders that can be built without memory."""

    def outline(self) -> dict[str, nn.Module]:
        """Build them, by part."""


@dataclass(frozen=True)
class Outline:
    """A base without its weights.

    Attributes:
        network: builds its denoiser on the meta device.
        widths: of what the encoders give.
        encoders: builds them without memory, by part; none where their sizes are unknown.
        notes: what was assumed.
    """

    network: Callable[[], Denoiser]
    widths: Widths
    encoders: Callable[[], Mapping[str, nn.Module]]
    notes: tuple[str, ...]


def outline(recipe: Recipe, base: Base) -> Outline:
    """Find the sizes of a recipe's base; those of the public one where it is named, but not here.

    Raises:
        InputError: its sizes cannot be told.
    """
    path, notes, network = recipe.values["base"]["path"], list[str](), base.empty_denoiser
    try:
        if is_remote(path):
            raise InputError(f"base.path: {path} is on the hub")
        network()
        transformer, audio = _configurations(base)
    except InputError as error:
        if "14B" not in path:
            raise
        network, transformer, audio = _public_denoiser, PUBLIC_14B, {}
        notes.append(f"planned with the sizes of Wan2.1-I2V-14B and no encoders, because {error}")
    encoders = _encoders(base) if network != _public_denoiser else dict
    return Outline(network, _widths(transformer, audio, encoders), encoders, tuple(notes))


def holding_of(recipe: Recipe) -> Holding:
    """Tell how a recipe's base holds its denoiser."""
    section = recipe.values["base"]
    return Holding(getattr(torch, section["dtype"]), section["quantise"], section["full_blocks"])


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating point operations a second of matrix products on this machine."""
    square = torch.ones(MATRIX_SIDE, MATRIX_SIDE, device=device, dtype=dtype)
    _finished(square @ square)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < RATE_SECONDS:
        _finished(square @ square)
        count += 1
    return 2 * count * MATRIX_SIDE**3 / (time.perf_counter() - started)


def memory_here(device: torch.device, num_processes: int) -> float | None:
    """Tell the bytes that each process has on this machine; None where it has no such device."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / num_processes
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).total_memory


def gigabytes(count: float) -> str:
    """Say a number of bytes."""
    if count >= 10 * GB:
        return f"{count / GB:.1f} GB"
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:.2g} MB"


def duration(seconds: float) -> str:
    """Say a time."""
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def rows(values: Mapping[str, object]) -> list[str]:
    """Lay out names and values in two columns."""
    width = max((len(name) for name in values), default=0)
    return [f"  {name:{width}}  {value}" for name, value in values.items()]


def _finished(product: torch.Tensor) -> None:
    """Wait for a product: a GPU works on while Python does."""
    product[0, 0].item()


def _public_denoiser() -> Denoiser:
    with torch.device("meta"):
        return Wan(PUBLIC_14B, audio=AudioSizes())


def _configurations(base: Base) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    files = base.configurations("base")
    return files["transformer/config.json"], files["audio/config.json"]


def _encoders(base: Base) -> Callable[[], Mapping[str, nn.Module]]:
    if base.problems():
        return dict
    encoders = base.load_encoders(torch.device("cpu"))
    return encoders.outline if isinstance(encoders, Outlined) else dict


def _widths(
    transformer: Mapping[str, Any],
    audio: Mapping[str, Any],
    encoders: Callable[[], Mapping[str, nn.Module]],
) -> Widths:
    speech = AudioSizes(**audio)
    image = encoders().get("image_encoder")
    tokens = CLIP_TOKENS
    if image is not None:
        sizes: Any = image.config
        tokens = (sizes.image_size // sizes.patch_size) ** 2 + 1
    return Widths(
        channels=transformer["out_channels"],
        text=transformer["text_dim"],
        image=transformer["image_dim"],
        image_tokens=tokens,
        speech_layers=speech.num_layers,
        speech=speech.audio_dim,
    )
