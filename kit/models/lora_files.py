"""LoRA files of the public: which parameters they change, in all dialects, and by how much.

A pair of factors adds strength * alpha / rank * up @ down to a weight; differences (`diff`,
`diff_b`, `diff_m`) add strength * difference to a weight, a bias or a modulation.
Sources: kohya, diffusers, peft, ComfyUI, LightX2V, musubi-tuner.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kit.errors import InputError
from kit.models.keys import public_name
from kit.models.tensor_files import Header, Read, read_header, same_shape, shorten
from kit.recipe import ExistingFile

Shapes = Mapping[str, tuple[int, ...]]

ROLES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
    ".diff": "weight",
    ".diff_b": "bias",
    ".diff_m": "modulation",
}
"""Ends of keys, and what the tensor is to the module named before it."""

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "lora_unet__",
    "lora_unet_",
    "",
)
"""What programs put before the names of modules."""

REFUSED = {
    ".dora_scale": "DoRA, which also scales the weights themselves",
    ".lora_mid.weight": "factors in three parts",
}
"""Ends of keys that change what the factors beside them mean."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file as a recipe names it.

    Attributes:
        file: safetensors in any dialect of LoRA.
        strength: factor on all that it changes.
        unmatched: whether tensors without a place in the denoiser are an error, or left out
            and reported. A file of which nothing has a place is always an error.
    """

    file: ExistingFile
    strength: float = 1.0
    unmatched: Literal["error", "skip"] = "error"


@dataclass(frozen=True)
class Change:
    """What one file adds to one parameter: a product of factors, or a difference.

    Attributes:
        file: holds the tensors.
        strength: factor on the whole.
        keys: of the tensors, by role.
        alpha: of files that state it once for all factors; None for the rank.
    """

    file: Path
    strength: float
    keys: Mapping[str, str]
    alpha: float | None

    def add_to(self, value: Tensor, read: Read) -> Tensor:
        """Add the change in float32."""
        base = value.float()
        if "up" not in self.keys:
            (key,) = self.keys.values()
            return base.add(read(key).float().reshape(base.shape), alpha=self.strength)
        down = read(self.keys["down"]).float().flatten(1)
        up = read(self.keys["up"]).float().flatten(1)
        alpha = float(read(self.keys["alpha"])) if "alpha" in self.keys else self.alpha
        scale = self.strength * (1 if alpha is None else alpha / len(down))
        return torch.addmm(base.flatten(1), up, down, alpha=scale).reshape(base.shape)


@dataclass(frozen=True)
class Match:
    """What of one LoRA file has a place in a denoiser.

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
            return [f"'{self.lora.file}': nothing in it has a place in this denoiser"]
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
        return shorten([f"{key} ({reason})" for key, reason in self.unmatched.items()])


def is_lora(header: Header) -> bool:
    """Tell whether a file is a LoRA, by its keys."""
    return any(_role_of(key) not in (None, "alpha") for key in header.tensors)


def describe_lora(header: Header) -> str:
    """Say how large a LoRA file is, and for which of Wan's models it was made."""
    ranks = {entry.shape[0] for key, entry in header.tensors.items() if _role_of(key) == "down"}
    rank = " to ".join(str(rank) for rank in sorted({min(ranks), max(ranks)})) if ranks else "no"
    layers = {module for module, _ in _parts(header)}
    has_image = any("k_img" in key or "add_k_proj" in key for key in header.tensors)
    made_for = "with image layers" if has_image else "without image layers, as for text-to-video"
    return f"{len(header.tensors):,} tensors for {len(layers):,} layers, rank {rank}, {made_for}"


def match_lora(lora: LoraFile, shapes: Shapes) -> Match:
    """Find the place of each tensor of a LoRA file.

    Args:
        lora: the file and what to do with it.
        shapes: of the denoiser's parameters, by our names.

    Raises:
        InputError: the file cannot be read, or holds another kind of adapter.
    """
    file = Path(lora.file)
    header = read_header(file)
    _refuse_others(file, header)
    unknown = [key for key in header.tensors if _role_of(key) is None]
    unmatched = dict.fromkeys(unknown, "not understood as part of a LoRA")
    places, alpha = _places(shapes), _alpha(header)
    changes: dict[str, list[Change]] = {}
    for module, keys in _parts(header):
        name = _parameter(module, keys, places)
        reason = _misfit(keys, header, shapes.get(name))
        if reason is None:
            changes.setdefault(name, []).append(Change(file, lora.strength, keys, alpha))
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


def _role_of(key: str) -> str | None:
    return next((role for end, role in ROLES.items() if key.endswith(end)), None)


def _parts(header: Header) -> Iterator[tuple[str, dict[str, str]]]:
    """Give the tensors that belong together: factors with their alpha, or one difference."""
    factors: dict[str, dict[str, str]] = {}
    for key in header.tensors:
        role = _role_of(key)
        if role is None:
            continue
        module = key.removesuffix(next(end for end in ROLES if key.endswith(end)))
        module = module.removeprefix(next(p for p in PREFIXES if module.startswith(p)))
        if role in ("down", "up", "alpha"):
            factors.setdefault(module, {})[role] = key
        else:
            yield module, {role: key}
    yield from factors.items()


def _places(shapes: Shapes) -> dict[str, str]:
    """List our modules and lone parameters by what files call them, without dots.

    Some programs write underscores for dots, so that all names are compared so.
    """
    places = {}
    for name in shapes:
        ours = name.removesuffix(".weight").removesuffix(".bias")
        for theirs in (public_name(ours), ours.removeprefix("transformer."), f"multitalk_{ours}"):
            if theirs is not None:
                places[theirs.replace(".", "_")] = ours
    return places


def _parameter(module: str, keys: Mapping[str, str], places: Mapping[str, str]) -> str:
    """Name the parameter that tensors change; an unknown name if there is none."""
    if "modulation" in keys:
        return places.get(f"{module}.modulation".replace(".", "_"), "")
    place = places.get(module.replace(".", "_"), "")
    return f"{place}.bias" if "bias" in keys else f"{place}.weight"


def _misfit(keys: Mapping[str, str], header: Header, wanted: tuple[int, ...] | None) -> str | None:
    """Say why tensors cannot change a parameter of the wanted shape; None if they can."""
    if wanted is None:
        return "no such layer"
    found = {role: header.tensors[key].shape for role, key in keys.items() if role != "alpha"}
    if not found.keys() & {"up", "down"}:
        shapes = [list(shape) for shape in found.values() if not same_shape(shape, wanted)]
        if not found:
            return "alpha without factors"
        return f"is {shapes[0]}, not {list(wanted)}" if shapes else None
    if len(found) < 2:
        return "a factor without the other"
    (rank, *inputs), (outputs, width, *rest) = found["down"], found["up"]
    made = (outputs, math.prod(inputs))
    if rank == width and math.prod(rest) == 1 and made == (wanted[0], math.prod(wanted[1:])):
        return None
    return f"factors {list(found['down'])} and {list(found['up'])} do not make {list(wanted)}"


def _alpha(header: Header) -> float | None:
    """Read what peft and diffusers state in the header for all factors."""
    settings = json.loads(header.metadata.get("lora_adapter_metadata", "{}"))
    found = [settings.get(key) for key in ("transformer.lora_alpha", "lora_alpha")]
    return next((float(alpha) for alpha in found if alpha is not None), None)


def _refuse_others(file: Path, header: Header) -> None:
    for end, what in REFUSED.items():
        if any(key.endswith(end) for key in header.tensors):
            raise InputError(f"'{file}' holds {what}; only plain LoRA can be merged")
