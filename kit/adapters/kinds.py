"""Kinds of low-rank adapters as PEFT builds them; what they add to a weight [out, in]."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


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
        rank: of the factors, from their shapes; None where nothing is factored, and nothing scaled.
        shape: of the weight that they change; None if they do not go together.
        has_dropout: whether inputs of the factors can be dropped in training.
    """

    tensors: tuple[str, ...]
    scaled: tuple[str, ...]
    configure: Callable[[Sizes, float, int], PeftConfig]
    rank: Callable[[Shapes], int | None]
    shape: Callable[[Shapes], Shape | None]
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


def _lora_rank(shapes: Shapes) -> int:
    return shapes["lora_A.weight"][0]


def _loha_rank(shapes: Shapes) -> int:
    return shapes["hada_w1_b"][0]


def _lokr_rank(shapes: Shapes) -> int | None:
    inner = shapes.get("lokr_w2_b") or shapes.get("lokr_w1_b")
    return inner[0] if inner else None


def _lora_shape(shapes: Shapes) -> Shape | None:
    down, up = shapes.get("lora_A.weight", ()), shapes.get("lora_B.weight", ())
    made = _product(up, down)
    magnitude = shapes.get("lora_magnitude_vector", made and made[:1])
    return made if made and magnitude == made[:1] else None


def _loha_shape(shapes: Shapes) -> Shape | None:
    one, other = (
        _product(shapes.get(f"hada_{w}_a", ()), shapes.get(f"hada_{w}_b", ())) for w in ("w1", "w2")
    )
    return one if one == other else None


def _lokr_shape(shapes: Shapes) -> Shape | None:
    one, other = (
        shapes.get(f"lokr_{w}")
        or _product(shapes.get(f"lokr_{w}_a", ()), shapes.get(f"lokr_{w}_b", ()))
        for w in ("w1", "w2")
    )
    return (one[0] * other[0], one[1] * other[1]) if one and other else None


def _product(left: Shape, right: Shape) -> Shape | None:
    """Give the shape of a matrix product; None if there is none."""
    if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
        return None
    return left[0], right[1]


MAGNITUDE = "lora_magnitude_vector"
"""Name of the magnitudes of a layer's outputs in files."""

_LORA = ("lora_A.weight", "lora_B.weight")
_DORA = (*_LORA, MAGNITUDE)
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")

KINDS = {
    "lora": Kind(
        _LORA, _LORA[1:2], partial(_lora, decomposed=False), _lora_rank, _lora_shape, True
    ),
    "dora": Kind(_DORA, _LORA[1:2], partial(_lora, decomposed=True), _lora_rank, _lora_shape, True),
    "loha": Kind(_LOHA, _LOHA[:1], _loha, _loha_rank, _loha_shape),
    "lokr": Kind(_LOKR, _LOKR[:2], _lokr, _lokr_rank, _lokr_shape),
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
