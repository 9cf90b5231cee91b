"""What adapters of each kind do to a weight: their formulas, on tensors.

A weight has its outputs first; what else it has are its inputs, kernels of convolutions included.
Factors have the names and shapes of kohya, LyCORIS and PEFT, which agree.
"""

from collections.abc import Callable, Collection, Mapping
from itertools import product as pairs

import torch
from torch import Tensor
from torch.linalg import vector_norm

Factors = Mapping[str, Tensor]
"""The factors of one layer by name, without its alpha and magnitude."""

LORA = ("lora_down", "lora_up")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")

FACTORS = (*LORA, *LOHA, *LOKR)

_WHOLE_OR_NOT = ((LOKR[:1], LOKR[1:3]), (LOKR[3:4], LOKR[4:]))

COMPLETE = {
    frozenset(LORA): "LoRA",
    frozenset(LOHA): "LoHa",
    **{frozenset(one + other): "LoKr" for one, other in pairs(*_WHOLE_OR_NOT)},
}
"""Which factors make a product together, and the kind of adapters that have them."""


def low_rank(factors: Factors) -> Tensor:
    """Multiply two thin matrices. Source: Hu et al. 2021, section 4.1."""
    return factors["lora_up"] @ factors["lora_down"]


def hadamard(factors: Factors) -> Tensor:
    """Multiply two low-rank products, number by number. Source: Hyeon-Woo et al. 2021."""
    return _matrix(factors, "hada_w1") * _matrix(factors, "hada_w2")


def kronecker(factors: Factors) -> Tensor:
    """Put one matrix in the place of each number of another. Source: Yeh et al. 2023."""
    return torch.kron(_matrix(factors, "lokr_w1"), _matrix(factors, "lokr_w2"))


PRODUCTS: dict[str, Callable[[Factors], Tensor]] = {
    "LoRA": low_rank,
    "LoHa": hadamard,
    "LoKr": kronecker,
}


def kind_of(names: Collection[str]) -> str | None:
    """Name the kind of adapter that has exactly these factors."""
    return COMPLETE.get(frozenset(names))


def rank_of(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Tell by which rank the alpha of a layer is divided.

    None if both factors of a Kronecker product are whole: such layers have no rank, and readers
    ignore their alpha. Sources: ComfyUI, LyCORIS, musubi-tuner.
    """
    inner = ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    return next((shapes[name][0] for name in inner if name in shapes), None)


def scale_of(factors: Factors, alpha: float) -> float:
    """Divide the alpha of a layer by its rank; 1 if it has none."""
    rank = rank_of({name: tuple(factor.shape) for name, factor in factors.items()})
    return 1.0 if rank is None else alpha / rank


def shape_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Give the shape of a product from those of its factors; None if they do not go together."""
    if kind_of(shapes) is None:
        return None
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        return tuple(product(empty).shape)
    except (RuntimeError, IndexError):
        return None


def product(factors: Factors) -> Tensor:
    """Multiply out a complete set of factors. [outputs, inputs]"""
    kind = kind_of(factors)
    assert kind is not None, f"no complete set: {sorted(factors)}"
    return PRODUCTS[kind]({name: factor.flatten(1) for name, factor in factors.items()})


def adapt(
    weight: Tensor,
    factors: Factors,
    *,
    scale: float,
    magnitude: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Change a weight as an adapter asks for.

    Args:
        weight: of the base.
        factors: of the adapter.
        scale: of their product: alpha / rank.
        magnitude: of the weight's outputs or inputs, of adapters that state it; see `decompose`.
        strength: factor on the whole change, from the weight as it was. Source: ComfyUI.
    """
    delta = product(factors).reshape(weight.shape)
    if magnitude is None:
        return weight.add(delta, alpha=strength * scale)
    return weight.lerp(decompose(weight.add(delta, alpha=scale), magnitude), strength)


def decompose(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Keep a weight's direction and set its magnitude (DoRA).

    Args:
        weight: of the base, with the product of factors added.
        magnitude: of each output, or of what it has axes for; the norm is over all axes along
            which it does not vary. [outputs], [outputs, 1] or [1, inputs]

    Source: Liu et al. 2024, equation 5; LyCORIS for magnitudes with axes.
    """
    if magnitude.ndim == 1:
        magnitude = magnitude.reshape(-1, *(1,) * (weight.ndim - 1))
    axes = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
    norm: Tensor = vector_norm(weight, dim=axes, keepdim=True)
    return weight * (magnitude / norm)


def _matrix(factors: Factors, name: str) -> Tensor:
    whole = factors.get(name)
    return factors[f"{name}_a"] @ factors[f"{name}_b"] if whole is None else whole
