"""Stop at the end of a step when asked to, with everything saved."""

import logging
import signal
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)


class GracefulStop(Callback):
    """Ends the run after the current step on SIGTERM or the first Ctrl-C.

    Lightning's own handler raises in the middle of a step, and hangs with several processes.
    """

    def __init__(self) -> None:
        self.asked = False
        self._last_step = 0
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning."""
        self._last_step = trainer.global_step
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._ask)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *batch: object
    ) -> None:
        """Stop if any process was asked to; not inside an accumulation."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            trainer.should_stop = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back; Lightning tears nothing down behind an error."""
        self.teardown(trainer, pl_module, "fit")

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        log.warning("stopping at the end of this step; everything will be saved")
        # A second Ctrl-C means now.
        signal.signal(signal.SIGINT, signal.default_int_handler)
