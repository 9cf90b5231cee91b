"""What torch does slowly on a CPU, done faster, forwards and backwards.

The rates were measured on one core of an AMD EPYC with AVX-512, 768 channels in heads of 64.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product as places
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

QUERIES_AT_ONCE = 256
"""For each core: their scores with some thousand keys stay in its cache."""

WORTHWHILE_SCORES = 1 << 16
"""Fewer scores in a head than this are computed before a loop in Python has begun."""


class OneDnnProducts(TorchFunctionMode):
    """Hands linear layers in float32 to oneDNN, whoever calls them: 220 GFLOP/s.

    Torch takes MKL for them, which knows AMD's processors badly: 100 GFLOP/s. Other dtypes go to
    oneDNN anyway.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute one function of torch."""
        if func is F.linear and not kwargs and all(_is_plain(value) for value in args):
            x, weight, bias = (*args, None)[:3]
            return _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


def _is_plain(value: Tensor | None) -> bool:
    return value is None or (value.dtype == torch.float32 and value.device.type == "cpu")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by oneDNN, without gradients. [..., n], [m, n] to [..., m]"""
    if x.dtype != torch.float32 or not x.numel():
        return F.linear(x, weight, bias)  # in other dtypes by oneDNN, which refuses empty ones
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # gaps between rows would make it a thousand times slower
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


class _Linear(torch.autograd.Function):
    """A linear layer; gradients of frozen parameters are not computed, nor their inputs kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wants_x, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            None if weight is None else product(grad, weight.t()),
            None if x is None else product(rows.t(), x.reshape(-1, x.shape[-1]).t()),
            rows.sum(dim=0) if ctx.needs_input_grad[2] else None,
        )


def fast_products(device: torch.device) -> AbstractContextManager[object]:
    """Let linear layers be fast, where that is known to be right, as long as the context lasts."""
    if device.type != "cpu" or torch.is_autocast_enabled("cpu") or not has_one_dnn():
        return nullcontext()
    return OneDnnProducts()


def fast_again(
    device: torch.device,
) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Give a checkpointed block's contexts: nothing new now, and fast products when it recomputes.

    The backward pass comes when the forward pass has left its own.
    """
    return nullcontext(), fast_products(device)


def has_one_dnn() -> bool:
    """Tell whether torch has oneDNN and may use it: `torch.backends.mkldnn.flags` forbids it."""
    is_there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_there and bool(torch.backends.mkldnn.enabled)


def suits_by_head(query: Tensor, key: Tensor) -> bool:
    """Tell whether `mixed_by_head` may and should compute an attention. [B, h, N, d] each"""
    is_large = query.shape[2] * key.shape[2] >= WORTHWHILE_SCORES
    return query.device.type == "cpu" and has_one_dnn() and is_large


def mixed_by_head(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """Compute attention for one head and some queries at a time, by its definition.

    140 GFLOP/s in float32 and 220 in bfloat16, where torch's own kernel has 84 and 76.

    Args:
        query: [B, h, N, d]
        key: [B, h, N', d]
        value: [B, h, N', d']
        attn_mask: added to the scores; gets no gradient. [B, 1, 1, N']

    Returns:
        [B, h, N, d']
    """
    mixed: Tensor = _Attention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]
    return mixed


class _Attention(torch.autograd.Function):
    """Attention by head; the backward pass finds the probabilities again."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, attn_mask)
        batch, num_heads, num_queries, _ = query.shape
        # The caller puts heads side by side, which is free of copies with this layout.
        mixed = query.new_empty(batch, num_queries, num_heads, value.shape[-1]).transpose(1, 2)
        for place in places(range(batch), range(num_heads)):
            keys, turned_values = key[place].contiguous(), value[place].t().contiguous()
            bias = None if attn_mask is None else attn_mask[place[0], 0]
            for some, target in zip(*_pieces(query[place], mixed[place]), strict=True):
                target.copy_(product(_probabilities(some, keys, bias), turned_values))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, attn_mask = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (query, key, value)]
        for place in places(range(len(query)), range(query.shape[1])):
            bias = None if attn_mask is None else attn_mask[place[0], 0]
            given = query[place], key[place].contiguous(), value[place].contiguous()
            _put_gradients([x[place] for x in gradients], *given, bias, grad[place])
        return (*gradients, None)


def _pieces(*rows: Tensor) -> list[Sequence[Tensor]]:
    """Split rows of one head into as many as are worked on at once."""
    at_once = QUERIES_AT_ONCE * torch.get_num_threads()
    return [torch.split(x, at_once) for x in rows]


def _probabilities(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    scores = product(query * query.shape[-1] ** -0.5, key)
    return (scores if bias is None else scores + bias).softmax(-1)


def _put_gradients(
    targets: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    grad: Tensor,
) -> None:
    """Find the gradients of a head's queries [N, d], keys [N', d] and values [N', d']."""
    of_query, of_key, of_value = targets
    # Sums are turned, so that only the narrow factor of each product has to be.
    turned_keys, turned_values = (
        torch.zeros(key.shape[::-1], dtype=key.dtype),
        torch.zeros(value.shape[::-1], dtype=value.dtype),
    )
    for some, above, target in zip(*_pieces(query, grad, of_query), strict=True):
        p = _probabilities(some, key, bias)  # [n, N']
        turned_values += product(above.t(), p.t())
        of_scores = torch._softmax_backward_data(product(above, value), p, -1, p.dtype)
        of_scores *= query.shape[-1] ** -0.5
        target.copy_(product(of_scores, key.t()))
        turned_keys += product(some.t(), of_scores.t())
    of_key.copy_(turned_keys.t())
    of_value.copy_(turned_values.t())
