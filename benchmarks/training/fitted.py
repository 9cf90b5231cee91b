"""The same training by this project: what `kit fit` runs, on batches in memory."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from shape import CLIP_NORM, OBJECTIVE, RANK, RATE, SEED, Shape, start_factors
from torch.utils.data import DataLoader

from kit.adapters.lora import Lora
from kit.batch import Batch
from kit.training.dropout import ConditionDropout
from kit.training.ema import AdapterEMA
from kit.training.module import Fitting
from kit.training.optim import AdamW
from kit.training.task import DenoiserTask
from kit.training.trainer import Training


class EachStep(Callback):
    """Tells the loss of each step when it is done."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self.tell = tell

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *batch: object
    ) -> None:
        """Tell the loss."""
        self.tell(outputs["loss"].item())


def prepare(shape: Shape) -> Fitting:
    """Load our network and put an adapter on it."""
    network = shape.draw_network()
    Lora(rank=RANK, parts=shape.parts).inject(network, SEED)
    start_factors(network, [name for part in shape.parts for name in network.parts()[part]])
    network.checkpoint_activations(shape.checkpoint)
    everything = ConditionDropout(text=0, audio=0, image=0, reference=0)
    task = DenoiserTask(network, OBJECTIVE, everything, SEED)
    return Fitting(task, AdamW(lr=RATE, warmup_steps=0), SEED, {}).train()


def train(
    shape: Shape, module: Fitting, batches: list[Batch], folder: Path, tell: Callable[[float], None]
) -> None:
    """Train a step for each batch, with all callbacks of a run, and tell its loss."""
    logging.getLogger("lightning").setLevel(logging.ERROR)
    training = Training(
        max_steps=len(batches),
        precision="32-true" if shape.dtype == "float32" else "bf16-mixed",
        clip_norm=CLIP_NORM,
        device="cpu",
    )
    trainer = training.trainer(folder, AdapterEMA(training.ema_decay), [EachStep(tell)])
    trainer.fit(module, DataLoader(batches, batch_size=None))
