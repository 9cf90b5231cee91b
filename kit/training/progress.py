"""One bar for a run: optimiser steps, from where it continues to its end."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from tqdm import tqdm


class Progress(Callback):
    """Shows steps done, steps to go, speed and loss.

    Lightning's own bar counts epochs, of which a run has one.
    """

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start where the run continues."""
        if trainer.is_global_zero:
            done, total = trainer.global_step, trainer.max_steps
            self._bar = tqdm(initial=done, total=total, unit="step", desc="fit")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *batch: object
    ) -> None:
        """Move on with each optimiser step."""
        if self._bar is None or trainer.global_step == self._bar.n:
            return
        self._bar.set_postfix(loss=f"{float(outputs['loss']):.4f}", refresh=False)
        self._bar.update()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the bar as it stands; Lightning tears nothing down behind an error."""
        self.teardown(trainer, pl_module, "fit")
