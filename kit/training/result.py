"""Write what a run is for while its network is still where it was trained."""

from collections.abc import Callable

from lightning import Callback, LightningModule, Trainer


class Result(Callback):
    """Writes the result at the end of the training loop.

    Lightning moves the whole network to the CPU before `fit` returns; at 14B that would need its
    size in host memory, just to save an adapter.

    Args:
        write: given the number of optimiser steps done.
    """

    def __init__(self, write: Callable[[int], None]) -> None:
        self._write = write
        self.is_written = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the result; all processes take part, since each has a share of it."""
        self._write(trainer.global_step)
        self.is_written = True
