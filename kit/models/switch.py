"""Networks without their adapters for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@contextmanager
def bare(network: nn.Module) -> Iterator[None]:
    """Let a network compute as if it had no adapters.

    Only this is switched: PEFT's own ways of doing it also change which parameters ask for
    gradients. Parts that trained without factors stay as they are.
    """
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was_disabled in zip(layers, before, strict=True):
            layer._disable_adapters = was_disabled
