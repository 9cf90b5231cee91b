"""Frozen linear layers in floating point numbers of eight bits, with a factor for each row."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn
"""Four bits of exponent, three of mantissa: every number of it is one of bfloat16."""


class Float8Linear(nn.Linear):
    """A linear layer whose weight is `weight` times `factor`.

    Unlike weights packed into integers, these are cut by rows like any others, since a row has a
    factor of its own.

    Args:
        in_features: numbers in a row.
        out_features: rows.
        compute_dtype: to multiply in; PEFT gives adapters this dtype.
    """

    factor: Tensor

    def __init__(self, in_features: int, out_features: int, compute_dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.compute_dtype = compute_dtype
        self.weight = nn.Parameter(self.weight.to(FLOAT8), requires_grad=False)
        self.register_buffer("factor", torch.empty(out_features, device="meta"))

    def fill(self, weight: Tensor) -> None:
        """Take a weight [out, in], rounded."""
        numbers, self.factor = to_float8(weight)
        self.weight = nn.Parameter(numbers, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, and add the bias."""
        given = x.to(self.compute_dtype), self.weight, self.factor
        product: Tensor = _ScaledProduct.apply(*given)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)


def to_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [out, in]; each row's largest number becomes the largest there is.

    Returns:
        Numbers [out, in] and factors [out].
    """
    largest = torch.finfo(FLOAT8).max
    factor = weight.float().abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / largest
    return (weight.float() / factor[:, None]).to(FLOAT8), factor


class _ScaledProduct(torch.autograd.Function):
    """Multiplies by a weight that is in the dtype of the product for no longer than this takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(numbers, factor)
        return F.linear(x, numbers.to(x.dtype)).mul_(factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (numbers, factor) = gradients, ctx.saved_tensors
        # The product is rounded to the gradient's dtype, the factor is not.
        scaled = torch.mul(gradient, factor, out=torch.empty_like(gradient))
        return scaled @ numbers.to(gradient.dtype), None, None
