"""Controllers from files: the release's own, and those that others renamed."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from kit.errors import InputError
from kit.models.tensor_files import open_tensors, read_header, shorten

from .controller import Controller, Sizes

HEAD_DIM = 64
"""Channels of a head in the released controller; no tensor tells them."""

NUM_HEADS = "num_heads"
"""Where a safetensors file may say in its header how many heads its controller has."""

SPELLINGS = (
    (r"^(controlnet_blocks|proj_in|proj_out)\.", r"controlnet.\1."),
    (r"\.self_attn\.([qkv])\.", r".self_attn.to_\1."),
    (r"\.self_attn\.o\.", ".self_attn.to_out.0."),
)
"""Others drop the prefix, or name attention as Wan2.1 does: what to put in place of what."""

Shapes = Mapping[str, tuple[int, ...]]


def load_controller(
    file: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_heads: int | None = None,
) -> Controller:
    """Load a frozen controller; all sizes but the number of heads follow from its tensors.

    Args:
        file: safetensors, or a file by torch.save that holds tensors alone.
        device: where to put it.
        dtype: of its parameters.
        num_heads: if absent, what the file's header says; else heads of 64 channels.

    Raises:
        InputError: a tensor is missing, unknown or has another shape, or it is no file of tensors.
    """
    controller, keys = open_controller(file, num_heads)
    with open_tensors(file, device) as read:
        state = {name: read(key).to(dtype) for name, key in keys.items()}
    controller.load_state_dict(state, assign=True)
    return controller.requires_grad_(False).eval()


def open_controller(
    file: Path, num_heads: int | None = None
) -> tuple[Controller, Mapping[str, str]]:
    """Build the controller that a file holds, without reading any tensor.

    Returns:
        It, without memory; and the file's keys by the names of its parameters.

    Raises:
        InputError: as `load_controller`.
    """
    header = read_header(file)
    keys = {released_name(key): key for key in header.tensors}
    shapes = {name: header.tensors[key].shape for name, key in keys.items()}
    told = header.metadata.get(NUM_HEADS, "")
    try:
        sizes = read_sizes(shapes, num_heads or (int(told) if told.isdecimal() else None))
    except InputError as error:
        raise InputError(f"'{file}' is no controller of Uni3C: {error}") from error
    controller = empty_controller(sizes)
    require_match(file, shapes, controller)
    return controller, keys


def released_name(key: str) -> str:
    """Translate the name of a parameter to the release's."""
    for pattern, replacement in SPELLINGS:
        key = re.sub(pattern, replacement, key)
    return key


def read_sizes(shapes: Shapes, num_heads: int | None = None) -> Sizes:
    """Read off the sizes of a controller.

    Args:
        shapes: by the release's names.
        num_heads: if absent, heads have 64 channels.

    Raises:
        InputError: a tensor that tells sizes is missing, or heads do not divide the width.
    """
    block = "controlnet.controlnet_blocks.0"
    try:
        base_dim, in_channels, *_ = shapes["controlnet_patch_embedding.weight"]
        guide_dim, guide_channels, *_ = shapes["controlnet_mask_embedding.mask_proj.0.weight"]
        ffn_dim, dim = shapes[f"{block}.ffn.0.weight"]
        time_dim = shapes[f"{block}.norm1.linear.weight"][1]
    except KeyError as error:
        raise InputError(f"it has no {error.args[0]}") from error
    except (ValueError, IndexError) as error:
        raise InputError("a tensor that tells its sizes has too few axes") from error
    heads = max(dim // HEAD_DIM, 1) if num_heads is None else num_heads
    if heads < 1 or dim % heads or dim // heads % 2:
        raise InputError(f"{heads} heads cannot share {dim} channels by even numbers")
    numbers = (re.match(r"controlnet\.controlnet_blocks\.(\d+)\.", name) for name in shapes)
    return Sizes(
        in_channels=in_channels,
        guide_channels=guide_channels,
        guide_dim=guide_dim,
        base_dim=base_dim,
        time_dim=time_dim,
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=heads,
        num_layers=1 + max(int(number[1]) for number in numbers if number),
    )


def empty_controller(sizes: Sizes) -> Controller:
    """Build a controller without memory, for names and shapes."""
    with torch.device("meta"):
        return Controller(sizes)


def require_match(file: Path, shapes: Shapes, controller: Controller) -> None:
    """Compare a file's tensors with what a controller of its sizes has.

    Raises:
        InputError: lists what is missing, unknown, or of another shape.
    """
    expected = {name: tuple(value.shape) for name, value in controller.state_dict().items()}
    wrong = [
        f"{name} {shapes[name]}, not {expected[name]}"
        for name in sorted(expected.keys() & shapes.keys())
        if shapes[name] != expected[name]
    ]
    findings = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unknown": sorted(shapes.keys() - expected.keys()),
        "of another shape": wrong,
    }
    lines = [f"{what}: {shorten(names)}" for what, names in findings.items() if names]
    if lines:
        raise InputError("\n".join([f"'{file}' is no whole controller of Uni3C", *lines]))
