"""Computing with tensors that have no numbers, to count their bytes and the work.

Torch runs the real code with shapes and dtypes alone (`FakeTensorMode`), gradients, autocast and
recomputed blocks included, so that what is kept and for how long follows from the code itself and
from no formula. It takes the place of a processor's memory; a GPU's differs in attention alone.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from kit.models.attention import grid_rotation

_aten, _mkldnn = torch.ops.aten, torch.ops.mkldnn


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    shapes = (query.shape, key.shape, value.shape)
    return int(sdpa_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _attention_backward(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
) -> int:
    shapes = (out.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _linear(x: Tensor, weight: Tensor, *_: object, **__: object) -> int:
    return 2 * x.numel() * weight.shape[0]


FLOPS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _mkldnn._linear_pointwise: _linear,
}
"""Operations with their work: torch's table, and what it lacks of a processor's."""


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is alive and what is computed, as long as it is entered.

    `torch.distributed._tools.MemTracker` counts the same by module, but visits all modules for
    every operation; its tracking of modules, like that of `FlopCounterMode`, keeps recomputed
    tensors alive.

    Args:
        num_speakers: what whoever asks for the number in a tensor is told; only the question how
            many speakers there are depends on one.

    Attributes:
        live: bytes of the tensors alive.
        peak: most bytes alive since it was set.
        flops: of products and attention.
    """

    def __init__(self, num_speakers: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_speakers = num_speakers
        self.live = self.peak = self.flops = 0
        self._known: set[int] = set()

    def begin(self) -> int:
        """Begin to count anew; gives what is alive."""
        grid_rotation.cache_clear()
        self.peak, self.flops = self.live, 0
        return self.live

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Do an operation and count it."""
        if func is _aten._local_scalar_dense.default and args[0].constant is None:
            return self.num_speakers
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in FLOPS:
            self.flops += FLOPS[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self._known:
            self._known.add(place)
            self.live += size
            weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._known.remove(place)
        self.live -= size


@contextmanager
def imagining(num_speakers: int = 1) -> Iterator[Tally]:
    """Let all tensors that are made be without numbers, and counted."""
    # It remembers tensors, and must not hand real ones in nor imagined ones out.
    grid_rotation.cache_clear()
    tally = Tally(num_speakers)
    try:
        with FakeTensorMode(), tally:
            yield tally
    finally:
        grid_rotation.cache_clear()


def imagined(value: Tensor) -> Tensor:
    """Make an imagined tensor of the same shape and dtype, inside `imagining`."""
    return torch.empty(value.shape, dtype=value.dtype)


def imagine_network(
    network: nn.Module, form: Callable[[nn.Parameter], nn.Parameter | None] = lambda _: None
) -> None:
    """Bring a network from the meta device among imagined tensors, inside `imagining`.

    Args:
        network: its parameters have their final dtypes.
        form: makes parameters that are held in another form than they are shaped; None for others.
    """
    for name, parameter in list(network.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = form(parameter)
        if value is None:
            value = nn.Parameter(imagined(parameter), requires_grad=parameter.requires_grad)
        setattr(network.get_submodule(owner), leaf, value)
    for name, buffer in list(network.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, imagined(buffer))
