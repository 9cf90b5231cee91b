"""Kinds of low-rank adapters as PEFT builds them; what they add to a weight [out, in]."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from torch import Tensor

from kit.models import deltas


class Size(NamedTuple):
    """How large the factors of a layer are; their product is scaled by alpha / rank."""

    rank: int
    alpha: float


Sizes = Mapping[str, Size]
"""Of the factors, by layer."""


@dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Attributes:
        tensors: names that a layer's tensors may have in a file, below the layer's.
        configure: (sizes by layer, dropout, factor) -> PEFT's configuration.
        scaled: the tensors of which a layer has one; multiplying it multiplies the whole change.
        has_dropout: whether inputs of the factors can be dropped in training.
    """

    tensors: tuple[str, ...]
    scaled: tuple[str, ...]
    configure: Callable[[Sizes, float, int], PeftConfig]
    has_dropout: bool = False


def _lora(sizes: Sizes, dropout: float, factor: int, *, decomposed: bool) -> PeftConfig:
    first, ranks, alphas = _patterns(sizes)
    return LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,  # type: ignore[arg-type]  # any number will do
        rank_pattern=ranks,
        alpha_pattern=alphas,
        lora_dropout=dropout,
        target_modules=sorted(sizes),
        bias="none",
        use_dora=decomposed,
    )


def _loha(sizes: Sizes, dropout: float, factor: int) -> PeftConfig:
    first, ranks, alphas = _patterns(sizes)
    return LoHaConfig(
        r=first.rank,
        alpha=first.alpha,  # type: ignore[arg-type]
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=sorted(sizes),
    )


def _lokr(sizes: Sizes, dropout: float, factor: int) -> PeftConfig:
    first, ranks, alphas = _patterns(sizes)
    return LoKrConfig(
        r=first.rank,
        alpha=first.alpha,  # type: ignore[arg-type]
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=sorted(sizes),
        decompose_factor=factor,
    )


def _patterns(sizes: Sizes) -> tuple[Size, dict[str, Any], dict[str, Any]]:
    """Give a size that some layers have, and ranks and alphas of the others.

    PEFT tries each pattern on each layer, so that there is one for all layers of a size.
    """
    first, *others = dict.fromkeys(sizes.values())
    patterns = {
        size: "|".join(re.escape(layer) for layer, own in sizes.items() if own == size)
        for size in others
    }
    ranks = {pattern: size.rank for size, pattern in patterns.items()}
    return first, ranks, {pattern: size.alpha for size, pattern in patterns.items()}


MAGNITUDE = "lora_magnitude_vector"
"""Name of the magnitudes of a layer's outputs in files."""

ROLES = {
    "lora_A.weight": "lora_down",
    "lora_B.weight": "lora_up",
    MAGNITUDE: "magnitude",
    **{name: name for name in (*deltas.LOHA, *deltas.LOKR)},
}
"""What a layer's tensors are to it, by our names of them."""

_LORA = ("lora_A.weight", "lora_B.weight")

KINDS = {
    "lora": Kind(_LORA, _LORA[1:], partial(_lora, decomposed=False), has_dropout=True),
    "dora": Kind((*_LORA, MAGNITUDE), _LORA[1:], partial(_lora, decomposed=True), has_dropout=True),
    "loha": Kind(deltas.LOHA, deltas.LOHA[:1], _loha),
    "lokr": Kind(deltas.LOKR, deltas.LOKR[:2], _lokr),
}
"""Low-rank product (Hu et al. 2021); its direction alone, with a magnitude for each output (Liu et
al. 2024); element-wise product of two low-rank products (Hyeon-Woo et al. 2021); Kronecker product
(Yeh et al. 2023)."""

ALPHA = "alpha"
"""Name of a layer's scale in files, beside its tensors: a scalar, to be divided by the rank."""


def by_layer(names: Mapping[str, Any], kind: str) -> dict[str, dict[str, str]]:
    """Sort the names of an adapter's tensors by layer and by their names below it.

    Whole parameters, which replace those of the base, are in none.
    """
    layers: dict[str, dict[str, str]] = {}
    for name in names:
        for tensor in (*KINDS[kind].tensors, ALPHA):
            if name.endswith(f".{tensor}"):
                layers.setdefault(name.removesuffix(f".{tensor}"), {})[tensor] = name
    return layers


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """Tell the rank of a layer's tensors; None where nothing is factored, and nothing scaled."""
    return deltas.rank_of(_shapes(tensors))


def shape_of(tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """Give the shape of the weight that a layer's tensors change; None if they do not fit."""
    shapes = _shapes(tensors)
    magnitude = shapes.pop("magnitude", None)
    made = deltas.shape_of(shapes)
    return made if made and magnitude in (None, made[:1]) else None


def roles(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name a layer's tensors by what they are to it."""
    return {ROLES[name]: tensor for name, tensor in tensors.items() if name in ROLES}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {role: tuple(tensor.shape) for role, tensor in roles(tensors).items()}
