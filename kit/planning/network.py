"""A denoiser as a run will hold it: dtypes, adapter and packed weights, without any numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Int8Params, Params4bit
from torch import Tensor, nn

from kit.models.attention import KeysValues
from kit.models.base import Denoiser
from kit.models.checkpoints import dtype_of
from kit.models.float8 import FLOAT8
from kit.models.inside import Layer, Untouched, Update, run_all
from kit.models.low_bits import BLOCK, FORMS, exchange_layers
from kit.planning.tally import imagine_network

NESTED_BLOCK = 256
"""Factors that share a factor in `nf4_double`. Source: Dettmers et al. 2023."""


@dataclass(frozen=True)
class Holding:
    """How a base holds its denoiser; the keys of a recipe's base of the same names."""

    dtype: torch.dtype
    quantise: str | None = None
    full_blocks: Sequence[int] = (0, -1)

    @property
    def is_packed(self) -> bool:
        """Whether each process needs all frozen weights."""
        return self.quantise is not None and FORMS[self.quantise].is_packed

    def apply(self, denoiser: Denoiser) -> None:
        """Give a denoiser on the meta device its dtypes and its layers of few bits."""
        if self.quantise is not None:
            exchange_layers(denoiser, self.quantise, self.full_blocks, self.dtype)
        for name, parameter in denoiser.named_parameters():
            is_packed = isinstance(parameter, Params4bit | Int8Params)
            if not is_packed and parameter.dtype != FLOAT8:
                parameter.data = parameter.data.to(dtype_of(name, self.dtype))


def imagine_denoiser(denoiser: Denoiser) -> None:
    """Bring a denoiser from the meta device among imagined tensors, its few bits packed."""
    imagine_network(denoiser, _packed)


def num_bytes(parameter: nn.Parameter) -> int:
    """Count what a parameter on the meta device will take."""
    if isinstance(parameter, Params4bit):
        factors = parameter.numel() // BLOCK
        nested = factors + 4 * -(-factors // NESTED_BLOCK)
        return parameter.numel() // 2 + (nested if parameter.compress_statistics else 4 * factors)
    if isinstance(parameter, Int8Params):
        return parameter.numel() + 4 * len(parameter)
    return parameter.numel() * parameter.element_size()


def _packed(parameter: nn.Parameter) -> nn.Parameter | None:
    """Make what bitsandbytes' layers look for in a weight; its own classes take no imagined ones.

    Its functions that quantise are not called: they remember tables, which must be real ones.
    """
    if isinstance(parameter, Params4bit):
        numbers = torch.empty(parameter.numel() // 2, 1, dtype=torch.uint8)
        weight = nn.Parameter(numbers, requires_grad=False)
        weight.quant_state = _four_bit_state(parameter)  # type: ignore[attr-defined]
        return weight
    if isinstance(parameter, Int8Params):
        numbers = torch.empty(parameter.shape, dtype=torch.int8)
        weight = nn.Parameter(numbers, requires_grad=False)
        weight.CB, weight.SCB = numbers, torch.empty(len(numbers))  # type: ignore[attr-defined]
        return weight
    return None


def _four_bit_state(parameter: Params4bit) -> QuantState:
    num_factors = parameter.numel() // BLOCK
    factors, offset, nested = torch.empty(num_factors), None, None
    if parameter.compress_statistics:
        factors, offset = factors.to(torch.uint8), torch.empty(())
        nested = QuantState(  # type: ignore[no-untyped-call]
            torch.empty(-(-num_factors // NESTED_BLOCK)),
            code=torch.empty(NESTED_BLOCK),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
    return QuantState(  # type: ignore[no-untyped-call]
        factors,
        shape=parameter.shape,
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=torch.float32,
        offset=offset,
        state2=nested,
    )


class Excerpt(Untouched):
    """Runs the first blocks only: what one block takes, all others of its kind take as well.

    Args:
        num_blocks: to run; None runs all.
        is_fused: attend as on a GPU, whatever a processor would do.
    """

    def __init__(self, num_blocks: int | None, *, is_fused: bool) -> None:
        self.num_blocks = num_blocks
        self.is_fused = is_fused

    def run(self, blocks: Sequence[Update], x: Tensor) -> Tensor:
        """Run the first blocks."""
        return run_all(blocks[: self.num_blocks], x)

    def attend(self, layer: Layer, query: Tensor, seen: KeysValues) -> Tensor:
        """Attend; see `Inside`."""
        if not self.is_fused:
            return super().attend(layer, query, seen)
        dtype = seen.value.dtype
        query, key, value = (x.to(dtype).transpose(1, 2) for x in (query, seen.key, seen.value))
        bias = None if seen.bias is None else seen.bias.to(dtype)
        mixed: Tensor = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return mixed.transpose(1, 2).flatten(2)
