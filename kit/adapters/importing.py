"""Adapter files of any program as content of our own, to go on training from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kit.adapters.kinds import ALPHA, KINDS, MAGNITUDE, ROLES
from kit.errors import InputError
from kit.models import deltas
from kit.models.lora_files import Change, LoraFile, Shapes, match_lora
from kit.models.tensor_files import Read, open_tensors

NAMES = {role: name for name, role in ROLES.items()}
"""Our names of a layer's tensors by their role."""


@dataclass(frozen=True)
class Found:
    """What a file holds, before its numbers are read.

    Attributes:
        kind: of its factors; None if it has none.
        factors: by our name of the layer.
        whole: values of whole parameters, by our names.
    """

    kind: str | None
    factors: Mapping[str, Change]
    whole: Mapping[str, Change]

    def read(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """Read all numbers as content of an adapter file of ours."""
        tensors: dict[str, Tensor] = {}
        changes = [*self.factors.values(), *self.whole.values()]
        if not changes:
            return tensors
        with open_tensors(changes[0].file, device or torch.device("cpu")) as read:
            for name, change in self.whole.items():
                tensors[name] = read(change.keys["whole"])
            for layer, change in self.factors.items():
                tensors |= {f"{layer}.{own}": t for own, t in _tensors(change, read).items()}
        return tensors


def find(file: Path, shapes: Shapes) -> Found:
    """Find out what an adapter file holds for a denoiser.

    Args:
        file: in any dialect of LoRA, DoRA, LoHa or LoKr, ours among them.
        shapes: of the denoiser's parameters, by our names.

    Raises:
        InputError: something in it has no place, or cannot be trained on.
    """
    match = match_lora(LoraFile(str(file)), shapes)
    problems = match.problems()
    if problems:
        raise InputError(problems[0])
    factors: dict[str, Change] = {}
    whole: dict[str, Change] = {}
    for name, (change, *others) in match.changes.items():
        if others or not _can_train(change):
            raise InputError(f"'{file}': {name}: such a change can only be merged, by base.loras")
        if "whole" in change.keys:
            whole[name] = change
        else:
            factors[name.removesuffix(".weight")] = change
    kinds = sorted({_kind(change) for change in factors.values()})
    if len(kinds) > 1:
        raise InputError(f"'{file}' mixes {' and '.join(kinds)}, which can only be merged")
    return Found(kinds[0] if kinds else None, factors, whole)


def _can_train(change: Change) -> bool:
    return "whole" in change.keys or set(change.keys) <= {*NAMES, "alpha"}


def _kind(change: Change) -> str:
    factors = [role for role in change.keys if role in deltas.FACTORS]
    return "dora" if "magnitude" in change.keys else str(deltas.kind_of(factors)).lower()


def _tensors(change: Change, read: Read) -> dict[str, Tensor]:
    """Name a layer's tensors as we do, with its effective alpha."""
    tensors = {NAMES[role]: read(key).float() for role, key in change.keys.items() if role in NAMES}
    if MAGNITUDE in tensors:
        tensors[MAGNITUDE] = tensors[MAGNITUDE].flatten()
    rank = deltas.rank_of({role: tuple(read(key).shape) for role, key in change.keys.items()})
    if rank is None:
        # No reader of ours could tell the rank that its alpha belongs to.
        scaled = next(name for name in KINDS["lokr"].scaled if name in tensors)
        own = 1.0 if "alpha" in change.keys else change.scale
        return tensors | {scaled: tensors[scaled] * own, ALPHA: torch.tensor(1.0)}
    stated = change.keys.get("alpha")
    alpha = change.scale * rank if stated is None else float(read(stated))
    return tensors | {ALPHA: torch.tensor(alpha)}
