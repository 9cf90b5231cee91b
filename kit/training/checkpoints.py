"""Checkpoints of what trains: written whole or not at all, found again, and compared."""

import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from kit.errors import InputError

MAY_CHANGE = (
    "trainer.max_steps",
    "trainer.save_every",
    "trainer.keep_checkpoints",
    "trainer.log_every",
    "trainer.accumulate",
    "trainer.devices",
    "trainer.nodes",
    "trainer.shard",
    "trainer.split_frames",
    "data.num_workers",
    "data.path",
    "preview",
    "measure",
    "sampling",
)
"""Keys that may differ between a run and its continuation: they change no training step."""


BATCHES_PER_STEP = "batches_per_step"
"""Key beside those of the recipe: of all processes together."""


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place, flushes it to disk, then renames it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save a checkpoint; a failure leaves no file of that name."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


class SaveCheckpoints(Callback):
    """Saves a checkpoint every so many steps and at the last one, and drops old ones.

    Args:
        folder: of the checkpoints.
        every: optimiser steps between two.
        keep: newest ones to keep.
    """

    def __init__(self, folder: Path, every: int, keep: int) -> None:
        self.folder = folder
        self.every = every
        self.keep = keep
        self._saved = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the step that the run continues at; drop what killed runs left half."""
        self._saved = trainer.global_step
        if trainer.is_global_zero:
            for half in self.folder.glob("*.partial"):
                half.unlink()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *batch: object
    ) -> None:
        """Save where it is due; inside an accumulation nothing is."""
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps or trainer.should_stop
        if step > self._saved and due:
            self._saved = step
            trainer.save_checkpoint(self.folder / f"step-{step:08d}.ckpt")
            if trainer.is_global_zero:
                for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep]:
                    old.unlink()


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint of a run, if there is one."""
    return max(folder.glob("step-*.ckpt"), default=None)


def step_of(checkpoint: Path) -> int:
    """Read the number of optimiser steps from a checkpoint's name."""
    return int(checkpoint.stem.removeprefix("step-"))


def require_same_recipe(checkpoint: Path, recipe: Mapping[str, Any]) -> None:
    """Refuse to continue a run under a recipe that would train differently.

    Raises:
        InputError: lists the keys that differ.
    """
    try:
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)["recipe"]
    except (RuntimeError, KeyError, OSError, UnpicklingError) as error:
        raise InputError(
            f"{checkpoint} is damaged; remove it to go on from the one before"
        ) from error
    before, now = _flat(saved), _flat(recipe)
    for values in (before, now):
        values.setdefault(BATCHES_PER_STEP, values.get("trainer.accumulate", 1))
    # A falling rate depends on the length of the run.
    is_falling = now.get("optimizer.course") == "cosine"
    free = tuple(key for key in MAY_CHANGE if not (is_falling and key == "trainer.max_steps"))
    differing = [
        f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(free)
    ]
    if differing:
        listed = "\n  ".join(differing)
        raise InputError(
            f"{checkpoint.parent.parent} holds a run of another recipe; give this one another "
            f"name, or remove that folder:\n  {listed}"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else None
        flat |= inner if inner is not None else {prefix + key: value}
    return flat
