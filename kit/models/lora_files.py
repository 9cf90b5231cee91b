"""Adapter files of the public, and our own: which parameters they change, and by how much.

Factors of all kinds change a weight by strength * alpha / rank * their product, with a magnitude
as `kit.models.deltas` says; differences (`diff`, `diff_b`, `diff_m`) add strength * difference to
a weight, a bias or a modulation; whole tensors replace a parameter.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator
from torch import Tensor

from kit.errors import InputError
from kit.models import deltas
from kit.models.lora_keys import LONE, group_keys, parameter_of, places_of, role_of
from kit.models.tensor_files import Header, Read, read_header, same_shape, shorten
from kit.recipe import ExistingFile

Shapes = Mapping[str, tuple[int, ...]]

OWN_HEADER = "charakit"
"""In the header of adapter files of this kit; there, whole tensors have our names."""

PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_CONFIG = "adapter_config.json"


def adapter_file(path: str | Path) -> Path:
    """Find the file of an adapter: in a folder that PEFT saved; others stand for themselves."""
    found = [Path(path) / name for name in PEFT_WEIGHTS if (Path(path) / name).is_file()]
    return found[0] if found else Path(path)


def _name_file(path: object) -> object:
    """Name the file in a folder that PEFT saved, before it is asked for."""
    return str(adapter_file(path)) if isinstance(path, str) else path


AdapterFile = Annotated[ExistingFile, BeforeValidator(_name_file)]
"""A file, or a folder that PEFT saved, that must be there when the recipe is read."""


@dataclass(frozen=True)
class LoraFile:
    """An adapter file as a recipe names it.

    Attributes:
        file: safetensors of LoRA, DoRA, LoHa or LoKr in any dialect, an adapter of this kit among
            them; or a folder that PEFT saved.
        strength: factor on all that it changes.
        unmatched: whether tensors without a place in the denoiser are an error, or left out
            and reported. A file of which nothing has a place is always an error.
    """

    file: AdapterFile
    strength: float = 1.0
    unmatched: Literal["error", "skip"] = "error"


@dataclass(frozen=True)
class Change:
    """What one file does to one parameter, by factors or by a lone tensor.

    Attributes:
        file: holds the tensors.
        strength: factor on the whole.
        keys: of the tensors, by role.
        scale: of the product of factors, if no alpha stands beside them.
    """

    file: Path
    strength: float
    keys: Mapping[str, str]
    scale: float = 1.0

    def add_to(self, value: Tensor, read: Read) -> Tensor:
        """Change a parameter, in float32 at least."""
        base = value if value.dtype == torch.float64 else value.float()
        tensors = {role: read(key).to(base.dtype) for role, key in self.keys.items()}
        if "whole" in tensors:
            return base.lerp(tensors["whole"].reshape(base.shape), self.strength)
        if tensors.keys() <= LONE.keys():
            (difference,) = tensors.values()
            return base.add(difference.reshape(base.shape), alpha=self.strength)
        alpha, magnitude = tensors.pop("alpha", None), tensors.pop("magnitude", None)
        scale = self.scale if alpha is None else deltas.scale_of(tensors, float(alpha))
        return deltas.adapt(base, tensors, scale=scale, magnitude=magnitude, strength=self.strength)


@dataclass(frozen=True)
class Match:
    """What of one adapter file has a place in a denoiser.

    Attributes:
        lora: the file.
        changes: by our names of parameters.
        num_tensors: in the file.
        unmatched: keys without a place, and why.
    """

    lora: LoraFile
    changes: Mapping[str, Sequence[Change]]
    num_tensors: int
    unmatched: Mapping[str, str]

    def problems(self) -> list[str]:
        """Say what of the file is an error by its policy."""
        if not self.changes:
            why = f"nothing in it has a place in this denoiser: {self._listed()}"
            return [f"'{self.lora.file}': {why}"]
        if not self.unmatched or self.lora.unmatched == "skip":
            return []
        return [
            f"'{self.lora.file}': {len(self.unmatched)} of its {self.num_tensors} tensors have no "
            f"place in this denoiser ('unmatched: skip' leaves them out): {self._listed()}"
        ]

    def summary(self) -> str:
        """Say how much of the file is used."""
        used = self.num_tensors - len(self.unmatched)
        line = (
            f"{self.lora.file}: {used} of {self.num_tensors} tensors change "
            f"{len(self.changes)} parameters, with strength {self.lora.strength:g}"
        )
        return f"{line}; left out: {self._listed()}" if self.unmatched else line

    def _listed(self) -> str:
        by_reason: dict[str, list[str]] = {}
        for key, reason in self.unmatched.items():
            by_reason.setdefault(reason, []).append(key)
        return "; ".join(f"{shorten(keys)} ({reason})" for reason, keys in by_reason.items())


def is_lora(header: Header) -> bool:
    """Tell whether a file is an adapter, by its keys."""
    return any(role_of(key) not in (None, "alpha") for key in header.tensors)


def describe_lora(header: Header) -> str:
    """Say how large an adapter file is, and for which of Wan's models it was made."""
    layers = list(group_keys(header.tensors))
    factors = [shapes for _, keys in layers if (shapes := _factors(keys, header))]
    ranks = [rank for shapes in factors if (rank := deltas.rank_of(shapes)) is not None]
    kinds = dict.fromkeys(deltas.kind_of(shapes) or "incomplete factors" for shapes in factors)
    size = " to ".join(str(rank) for rank in sorted({min(ranks), max(ranks)})) if ranks else "no"
    has_image = any("k_img" in key or "add_k_proj" in key for key in header.tensors)
    made_for = "with image layers" if has_image else "without image layers, as for text-to-video"
    num_layers = len({layer for layer, _ in layers})
    said = [f"{num_layers:,} layers", *kinds, f"rank {size}", made_for]
    return f"{len(header.tensors):,} tensors for {', '.join(said)}"


def match_lora(lora: LoraFile, shapes: Shapes) -> Match:
    """Find the place of each tensor of an adapter file.

    Args:
        lora: the file and what to do with it.
        shapes: of the denoiser's parameters, by our names.

    Raises:
        InputError: the file cannot be read.
    """
    file = adapter_file(lora.file)
    header = read_header(file)
    settings, places = _settings(file, header), places_of(shapes)
    groups = list(_groups(header, shapes))
    understood = {key for _, keys in groups for key in keys.values()}
    unknown = [key for key in header.tensors if key not in understood]
    unmatched = dict.fromkeys(unknown, "not understood as part of an adapter")
    changes: dict[str, list[Change]] = {}
    for layer, keys in groups:
        name = parameter_of(layer, keys, places)
        reason = _misfit(keys, header, shapes.get(name))
        if reason is None:
            rank = deltas.rank_of(_factors(keys, header))
            scale = _stated_scale(settings, layer, rank)
            changes.setdefault(name, []).append(Change(file, lora.strength, keys, scale))
        else:
            unmatched |= dict.fromkeys(keys.values(), reason)
    return Match(lora, changes, len(header.tensors), unmatched)


def merge_changes(matches: Sequence[Match]) -> dict[str, list[Change]]:
    """Bring the changes of several files together, in their order."""
    merged: dict[str, list[Change]] = {}
    for match in matches:
        for name, changes in match.changes.items():
            merged.setdefault(name, []).extend(changes)
    return merged


def _groups(header: Header, shapes: Shapes) -> Iterator[tuple[str, dict[str, str]]]:
    """Give the tensors that belong together, with their layer; whole ones of ours too."""
    whole = [key for key in header.tensors if OWN_HEADER in header.metadata and key in shapes]
    yield from ((key.removeprefix("transformer."), {"whole": key}) for key in whole)
    yield from group_keys([key for key in header.tensors if key not in whole])


def _factors(keys: Mapping[str, str], header: Header) -> dict[str, tuple[int, ...]]:
    """Give the shapes of factors by name."""
    return {role: header.tensors[key].shape for role, key in keys.items() if role in deltas.FACTORS}


def _misfit(keys: Mapping[str, str], header: Header, wanted: tuple[int, ...] | None) -> str | None:
    """Say why tensors cannot change a parameter of the wanted shape; None if they can."""
    if wanted is None:
        return "no such layer"
    found = {role: header.tensors[key].shape for role, key in keys.items() if role != "alpha"}
    if not found:
        return "alpha without factors"
    if found.keys() <= LONE.keys():
        wrong = [list(shape) for shape in found.values() if not same_shape(shape, wanted)]
        return f"is {wrong[0]}, not {list(wanted)}" if wrong else None
    magnitude = found.pop("magnitude", None)
    if deltas.kind_of(found) is None or any(0 in shape for shape in found.values()):
        return "no complete set of factors"
    listed = " and ".join(str(list(shape)) for shape in found.values())
    if deltas.shape_of(found) != (wanted[0], math.prod(wanted[1:])):
        return f"factors {listed} do not make {list(wanted)}"
    if magnitude is not None and not _is_magnitude(magnitude, wanted):
        return f"magnitude {list(magnitude)} is none of {list(wanted)}"
    return None


def _is_magnitude(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Tell whether numbers can be the magnitudes of a weight's outputs or inputs."""
    ones = (1,) * (len(wanted) - 1)
    return shape in ((wanted[0],), (wanted[0], *ones), (1, *wanted[1:2], *ones[1:]))


def _settings(file: Path, header: Header) -> dict[str, Any]:
    """Read what peft and diffusers state for all factors, beside the file or in its header."""
    beside = file.with_name(PEFT_CONFIG)
    is_from_peft = file.name in PEFT_WEIGHTS and beside.is_file()
    try:
        if is_from_peft:
            return dict(json.loads(beside.read_text()))
        stated = json.loads(header.metadata.get("lora_adapter_metadata", "{}"))
        return {key.removeprefix("transformer."): value for key, value in stated.items()}
    except (ValueError, TypeError, AttributeError) as error:
        place = beside if is_from_peft else f"{file}: lora_adapter_metadata"
        raise InputError(f"'{place}' is no configuration of an adapter: {error}") from error


def _stated_scale(settings: Mapping[str, Any], layer: str, rank: int | None) -> float:
    """Find the scale that settings state for a layer; 1 if they state none.

    Source: peft, whose patterns are regular expressions for the ends of layers' names.
    """
    alpha = settings.get("lora_alpha", settings.get("alpha"))
    if alpha is None:
        return 1.0
    alpha = _by_pattern(settings.get("alpha_pattern"), layer, alpha)
    # Kronecker products of whole factors do not show the rank that scales them.
    size = rank or _by_pattern(settings.get("rank_pattern"), layer, settings.get("r", 1))
    return float(alpha / (math.sqrt(size) if settings.get("use_rslora") else size))


def _by_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    found = (p for p in patterns or {} if re.match(rf"(.*\.)?({p})$", layer))
    return next(((patterns or {})[pattern] for pattern in found), default)
