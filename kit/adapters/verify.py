"""Proof that an exported adapter does in another program what it was trained to do."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.adapters.consumers import CONSUMERS, UNSUPPORTED, Forward, Loaded
from kit.adapters.export import is_trunk
from kit.adapters.files import HEADER
from kit.draws import draw_normal
from kit.errors import InputError, did_you_mean
from kit.models.checkpoints import parameter_shapes
from kit.models.deltas import decompose
from kit.models.lora_files import Change, LoraFile, Shapes, adapter_file, match_lora
from kit.models.tensor_files import Read, open_tensors, read_header, shorten

NUM_INPUTS = 4
"""Inputs that are drawn for each layer."""

MAX_ROUNDINGS = 2
"""Error that rounding explains, in units of the last place of the exported numbers."""


@dataclass(frozen=True)
class Verification:
    """How a consumer reads an exported file.

    Attributes:
        file: that was read.
        consumer: name of its format.
        matched: layers that it changes, by our names.
        missing: layers that the adapter changes and it does not.
        unknown: keys that it has no use for.
        elsewhere: parameters that the adapter changes and no such file holds: audio layers, and
            parts that trained fully.
        error: largest error of a layer's output, relative to the change that the adapter makes.
        worst: the layer of this error.
        tolerance: error that rounding explains.
        refusal: what the consumer said if it did not read the file at all.
    """

    file: Path
    consumer: str
    matched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    error: float = 0.0
    worst: str = ""
    tolerance: float = 0.0
    refusal: str = ""

    def problems(self) -> list[str]:
        """Say what is wrong; nothing if the consumer does what was trained."""
        if self.refusal:
            return [f"{self.file}: {self.consumer} does not read it: {self.refusal}"]
        found = []
        if self.missing:
            found.append(f"{len(self.missing)} layers do not change: {shorten(self.missing)}")
        if self.unknown:
            found.append(f"{len(self.unknown)} keys have no use: {shorten(self.unknown)}")
        if not self.error <= self.tolerance:
            found.append(f"{self.worst} is {self.error:.2g} off, more than {self.tolerance:.2g}")
        return [f"{self.file}: {self.consumer}: {line}" for line in found]

    def summary(self) -> str:
        """Say in a line how well it is read."""
        return (
            f"{self.file} as {self.consumer} reads it: {len(self.matched)} layers matched, "
            f"{len(self.missing)} missing, {len(self.unknown)} keys unknown; "
            f"largest error {self.error:.2g} of the change"
        )


def verify(exported: Path, consumer: str, adapter: Path, denoiser: nn.Module) -> Verification:
    """Read an exported file as its consumer does, and compare layer by layer what it does.

    Layers have drawn weights and inputs: no base is needed, and one layer is held at a time.

    Args:
        exported: file, or folder of PEFT.
        consumer: name of the format, from `CONSUMERS`.
        adapter: file of this kit that it came from.
        denoiser: of the adapter's base, without memory.

    Raises:
        InputError: no such format, one that cannot hold this kind, or a file cannot be read.
    """
    if consumer not in CONSUMERS:
        raise InputError(f"verify: unknown format '{consumer}'{did_you_mean(consumer, CONSUMERS)}")
    reason = UNSUPPORTED.get((_kind(adapter), consumer))
    if reason is not None:
        raise InputError(f"verify: {reason}")
    shapes = parameter_shapes(denoiser)
    match = match_lora(LoraFile(str(adapter)), shapes)
    if match.problems():
        raise InputError(f"verify: {match.problems()[0]}")
    trained = {n: changes[0] for n, changes in match.changes.items() if _is_factored(n, changes)}
    try:
        # What programs warn of shows in what they do.
        with warnings.catch_warnings(action="ignore"):
            loaded = CONSUMERS[consumer](exported, denoiser)
        errors = _errors(loaded, trained, shapes, adapter)
    except InputError:
        raise
    # Other programs fail in any way at files that they do not understand.
    except Exception as error:
        return Verification(exported, consumer, refusal=str(error) or type(error).__name__)
    worst = max(errors, key=errors.__getitem__, default="")
    return Verification(
        exported,
        consumer,
        matched=tuple(errors),
        missing=tuple(sorted({name.removesuffix(".weight") for name in trained} - errors.keys())),
        unknown=loaded.unknown,
        elsewhere=tuple(sorted(match.changes.keys() - trained.keys())),
        error=errors.get(worst, 0.0),
        worst=worst,
        tolerance=MAX_ROUNDINGS * _last_place(exported),
    )


def _kind(adapter: Path) -> str:
    header = read_header(adapter).metadata.get(HEADER)
    if header is None:
        raise InputError(f"verify: {adapter} was not written by this kit")
    return str(json.loads(header)["kind"])


def _is_factored(name: str, changes: Sequence[Change]) -> bool:
    """Tell whether factors change a parameter of Wan's trunk."""
    return is_trunk(name) and "whole" not in changes[0].keys


def _last_place(exported: Path) -> float:
    """Give the distance from one to the next number, in the roughest dtype of a file."""
    dtypes = {entry.dtype for entry in read_header(adapter_file(exported)).tensors.values()}
    return max(torch.finfo(getattr(torch, dtype)).eps for dtype in dtypes)


def _errors(
    loaded: Loaded, trained: Mapping[str, Change], shapes: Shapes, adapter: Path
) -> dict[str, float]:
    """Compare the layers that both change."""
    with open_tensors(adapter, torch.device("cpu")) as read:
        return {
            layer: _error(forward, trained[name], shapes[name], read)
            for layer, forward in loaded.layers.items()
            if (name := f"{layer}.weight") in trained
        }


def _error(forward: Forward, change: Change, shape: tuple[int, ...], read: Read) -> float:
    """Compare outputs, relative to the change that the adapter makes."""
    outputs, inputs = shape
    weight, x = _draw("weight", outputs, inputs), _draw("x", NUM_INPUTS, inputs)
    if "magnitude" in change.keys:
        # Training starts from the magnitudes of the base, and does not go far from them.
        weight = decompose(weight, read(change.keys["magnitude"]).double())
    before, expected = F.linear(x, weight), F.linear(x, change.add_to(weight, read))
    wrong, effect = (forward(weight, x) - expected).norm(), (expected - before).norm()
    return float((wrong / effect).nan_to_num(math.inf)) if wrong != 0 else 0.0


@lru_cache(maxsize=8)
def _draw(name: str, rows: int, columns: int) -> Tensor:
    """Draw numbers in float64, in rows of about length one. [rows, columns]"""
    return draw_normal((rows, columns), "verify", name).double() / math.sqrt(columns)
