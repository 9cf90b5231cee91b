"""Linear layers of a frozen base in four or eight bits: room for its adapter.

A layer is exchanged while it has no memory, and its weight is quantised as soon as it is read.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn

from kit.models.base import Denoiser
from kit.models.float8 import FLOAT8, Float8Linear

QUANTISED_PARTS = ("attention", "ffn")
"""Parts of a denoiser whose layers bear it. Embeddings, modulation, norms and head are in no part,
and the audio parts stay as they are, since lips hang on them."""

OUTLIERS = 6.0
"""Features of the input beyond this are multiplied unrounded. Source: Dettmers et al. 2022."""

BLOCK = 64
"""Weights that share a factor in four bits. On a CPU bitsandbytes 0.50 takes wrong factors where a
row ends inside of a block; the rows of all public Wan models do not."""


@dataclass(frozen=True)
class Form:
    """How a linear layer is held.

    Attributes:
        layer: (dense layer, dtype to compute in) -> the layer to take its place.
        flag: attribute of a network by which PEFT knows that it has such layers; None if it need
            not know.
        block: weights of a row that share a factor; rows hold a multiple of it.
        adapters: kinds of adapters that train on such layers. PEFT 0.21 takes the size of packed
            weights for that of the layer in the others, and loses the factors of `int8` and `fp8`
            in dora.
        is_packed: whether the numbers are integers, of which each process needs all.
    """

    layer: Callable[[nn.Linear, torch.dtype], nn.Linear]
    flag: str | None
    block: int
    adapters: tuple[str, ...]
    is_packed: bool = True


def _four_bits(dense: nn.Linear, dtype: torch.dtype, *, is_double: bool) -> nn.Linear:
    layer = Linear4bit(  # type: ignore[no-untyped-call]
        dense.in_features,
        dense.out_features,
        compute_dtype=dtype,
        compress_statistics=is_double,
        quant_type="nf4",
        device="meta",
    )
    # It would pack the weights for inference, and they could not be trained through any more.
    layer.support_avx512bf16_for_cpu = False
    return layer


def _eight_bits(dense: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    return Linear8bitLt(
        dense.in_features,
        dense.out_features,
        has_fp16_weights=False,
        threshold=OUTLIERS,
        device="meta",
    )


def _float8(dense: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    return Float8Linear(dense.in_features, dense.out_features, dtype)


_FOUR_BITS = partial(Form, flag="is_loaded_in_4bit", block=BLOCK, adapters=("lora", "dora"))

FORMS: Mapping[str, Form] = {
    "nf4": _FOUR_BITS(partial(_four_bits, is_double=False)),
    "nf4_double": _FOUR_BITS(partial(_four_bits, is_double=True)),
    "int8": Form(_eight_bits, flag="is_loaded_in_8bit", block=1, adapters=("lora",)),
    "fp8": Form(_float8, None, block=1, adapters=("lora", "loha", "lokr"), is_packed=False),
}
"""Normal float of 4 bits with a factor for 64 weights, the factors quantised as well or not
(Dettmers et al. 2023); integers of 8 bits with a factor for each row, to which float16 inputs are
rounded as well (Dettmers et al. 2022; in training on a CPU inputs stay as they are): these by
bitsandbytes. Floats of 8 bits with a factor for each row, inputs as they are."""


def quantisation_problems(denoiser: Denoiser, form: str, full_blocks: Sequence[int]) -> list[str]:
    """Say why a denoiser cannot be held in this form, in words.

    Args:
        denoiser: with or without memory.
        form: key of `FORMS`.
        full_blocks: numbers of blocks to keep; negative ones count from the end.
    """
    count = len(denoiser.blocks())
    wrong = [number for number in full_blocks if not -count <= number < count]
    if wrong:
        return [f"base.full_blocks: no block {wrong[0]}; valid: {-count} to {count - 1}"]
    layers = _layers(denoiser, full_blocks)
    if not layers:
        return [f"base.full_blocks: these are all {count} blocks, and nothing is quantised"]
    block = FORMS[form].block
    odd = [name for name, layer in layers.items() if layer.in_features % block]
    return [
        f"base.quantise: {form} needs rows of a multiple of {block} weights, and "
        f"{layers[name].in_features} are in those of {name}"
        for name in odd[:1]
    ]


def exchange_layers(
    denoiser: Denoiser, form: str, full_blocks: Sequence[int], dtype: torch.dtype
) -> None:
    """Exchange linear layers of attention and FFN; `assign_quantised` gives them weights.

    Args:
        denoiser: on the meta device; names and shapes of its parameters stay.
        form: key of `FORMS`.
        full_blocks: numbers of blocks to keep; negative ones count from the end.
        dtype: to compute in.
    """
    # It tells for each product that the input is rounded to float16 on its way to eight bits.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for name, dense in _layers(denoiser, full_blocks).items():
        layer = FORMS[form].layer(dense, dtype)
        layer.bias = dense.bias
        denoiser.set_submodule(name, layer)
    flag = FORMS[form].flag
    if flag is not None:
        setattr(denoiser, flag, True)


def is_quantised(network: nn.Module) -> bool:
    """Tell whether any layer of a network is held in few bits."""
    return any(p.dtype == FLOAT8 or not p.is_floating_point() for p in network.parameters())


def assign_quantised(model: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter its value, quantised if it is the weight of an exchanged layer."""
    empty = model.get_parameter(name)
    parent, _, leaf = name.rpartition(".")
    layer = model.get_submodule(parent)
    if isinstance(layer, Float8Linear) and leaf == "weight":
        layer.fill(value)
        return
    if isinstance(empty, Params4bit):
        weight: nn.Parameter = _to_four_bits(value, empty.compress_statistics)
    elif isinstance(empty, Int8Params):
        weight = _to_eight_bits(value)
    else:
        weight = nn.Parameter(value, requires_grad=False)
    setattr(layer, leaf, weight)


def _to_four_bits(value: Tensor, is_double: bool) -> Params4bit:
    numbers, state = quantize_4bit(value, compress_statistics=is_double, quant_type="nf4")
    return Params4bit(
        numbers,
        quant_state=state,
        compress_statistics=is_double,
        quant_type="nf4",
        bnb_quantized=True,
    )


def _to_eight_bits(value: Tensor) -> Int8Params:
    # Moving it to a device, as is usual, quantises nothing that is on a GPU already.
    numbers, factors, _ = int8_vectorwise_quant(value.half())
    return Int8Params(numbers, requires_grad=False, CB=numbers, SCB=factors)


def _layers(denoiser: Denoiser, full_blocks: Sequence[int]) -> dict[str, nn.Linear]:
    """Find the layers to quantise, by name."""
    blocks, parts = denoiser.blocks(), denoiser.parts()
    kept = {module for number in full_blocks for module in blocks[number].modules()}
    names = (name for part in QUANTISED_PARTS for name in parts[part])
    layers = {name: cast(nn.Linear, denoiser.get_submodule(name)) for name in names}
    return {name: layer for name, layer in layers.items() if layer not in kept}
