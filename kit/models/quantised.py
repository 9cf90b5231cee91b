"""Weights stored in eight bits: which numbers belong together, and how they become weights again.

Three forms are known, all of them `weight = numbers * factor` with one factor for a tensor or for
each of its rows; plain casts to float8 need no factor. Sources: ComfyUI (`scaled_fp8` files and
their successor), LightX2V, optimum-quanto 0.2.6.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kit.errors import InputError
from kit.models.tensor_files import Entry, Header, open_tensors


@dataclass(frozen=True)
class Form:
    """How a program names the two tensors of a quantised layer.

    Attributes:
        numbers: end of the key of the eight-bit numbers.
        factor: end of the key of their factor.
    """

    numbers: str
    factor: str


FORMS = {
    "scaled, as ComfyUI once wrote": Form(".weight", ".scale_weight"),
    "scaled, as ComfyUI and LightX2V write": Form(".weight", ".weight_scale"),
    "by quanto": Form(".weight._data", ".weight._scale"),
}
"""Known forms, by what `kit check` calls them."""

UNUSED = {
    "*scaled_fp8": "tells that a file is quantised, which its factors tell too",
    "*.scale_input": "for computing in eight bits",
    "*.input_scale": "for computing in eight bits",
    "*.output_scale": "for computing in eight bits",
    "*.comfy_quant": "names the form of a layer, which is checked",
}
"""Keys beside quantised weights that reading does not need, and why."""

READABLE = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
"""ComfyUI's names of formats that are numbers times a factor."""

_SETTING = ".comfy_quant"
_SETTINGS = "_quantization_metadata"


@dataclass(frozen=True)
class Weight:
    """A tensor as a network knows it: numbers, and for some a factor.

    Attributes:
        numbers: key in the file.
        factor: key in the file; None for a tensor that is stored as it is.
        entry: shape and dtype of the numbers.
    """

    numbers: str
    factor: str | None
    entry: Entry


def pair_factors(entries: Mapping[str, Entry]) -> dict[str, Weight]:
    """Bring the numbers of each quantised layer together with their factor.

    Returns:
        All tensors but factors, by the key that they would have without quantisation.

    Raises:
        InputError: a factor is neither one for all rows nor one for each row.
    """
    paired: dict[str, Weight] = {}
    factors = set()
    for key, entry in entries.items():
        name, factor = _factor_of(key, entries)
        if factor is not None:
            _require_rows(factor, entries[factor].shape, entry.shape)
            factors.add(factor)
        paired[name] = Weight(key, factor, entry)
    return {name: weight for name, weight in paired.items() if name not in factors}


def form_of(factor: str) -> str:
    """Name the form of a layer by the key of its factor."""
    return next(name for name, form in FORMS.items() if factor.endswith(form.factor))


def require_known_forms(file: Path, header: Header) -> None:
    """Refuse a file whose layers are quantised in a form that is no multiplication.

    Raises:
        InputError: names the first such format, or the description of the formats is damaged.
    """
    try:
        names = {_name_of(setting) for setting in _settings(file, header)}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"'{file}': its layers' formats cannot be read: {error!r}") from error
    for name in sorted(names.difference(READABLE)):
        raise InputError(
            f"'{file}' is quantised as {name}; valid: {', '.join(READABLE)}, plain float8, none"
        )


def dequantise(numbers: Tensor, factor: Tensor) -> Tensor:
    """Multiply numbers [N, ...] by their factor, of one entry or N, in float32."""
    rows = factor.float().reshape(-1, *[1] * (numbers.ndim - 1))
    return numbers.float() * rows


def _factor_of(key: str, entries: Mapping[str, Entry]) -> tuple[str, str | None]:
    """Give the key without quantisation, and the key of the factor if there is one."""
    for form in FORMS.values():
        layer = key.removesuffix(form.numbers)
        if layer != key and layer + form.factor in entries:
            return f"{layer}.weight", layer + form.factor
    return key, None


def _require_rows(key: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> None:
    count, rows = math.prod(shape), weight[0] if weight else 1
    if count != 1 and (count != rows or shape[0] != rows):
        raise InputError(f"{key} is {list(shape)}; valid: one factor, or one for each of {rows}")


def _settings(file: Path, header: Header) -> list[dict[str, Any]]:
    found = list(json.loads(header.metadata.get(_SETTINGS, "{}")).get("layers", {}).values())
    keys = [key for key in header.tensors if key.endswith(_SETTING)]
    if keys:
        with open_tensors(file, torch.device("cpu")) as read:
            found += [json.loads(read(key).numpy().tobytes()) for key in keys]
    return found


def _name_of(setting: dict[str, Any]) -> str:
    name: str = setting["format"]
    return f"{name} with rotation" if setting.get("convrot") else name
