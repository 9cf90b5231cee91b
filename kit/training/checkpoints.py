"""Checkpoints of what trains: written whole or not at all, found again, and compared."""

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.optim import Optimizer

from kit.atomic import atomic_write
from kit.data.loader import ResumableLoader
from kit.devices import is_out_of_memory
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
    "trainer.checkpoint_blocks",
    "trainer.activations",
    "trainer.offload",
    "trainer.split_frames",
    "data.num_workers",
    "data.path",
    "base.decode_tile",
    "when_out_of_memory",
    "preview",
    "measure",
    "sampling",
)
"""Keys that may differ between a run and its continuation: they change no training step."""


_DAMAGES = (BadZipFile, EOFError, FileNotFoundError, RuntimeError, UnpicklingError, ValueError)
"""What reading a checkpoint raises that is not whole."""

BATCHES_PER_STEP = "batches_per_step"
"""Key beside those of the recipe: of all processes together."""


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save a checkpoint; a failure leaves no file of that name."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Through a file of Python's, whose errors say what the system said.
        with atomic_write(target) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)


class SaveCheckpoints(Callback):
    """Saves a checkpoint every so many steps and at the last one, and drops old ones.

    One process alone also saves the step before that in which memory ran out. Several cannot: the
    others wait inside of it.

    Args:
        folder: of the checkpoints.
        every: optimiser steps between two.
        keep: newest ones to keep.
    """

    def __init__(self, folder: Path, every: int, keep: int) -> None:
        self.folder = folder
        self.every = every
        self.keep = keep
        self._saved = self._begun = sys.maxsize  # until training starts

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
            self._save(trainer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Note that weights are about to change."""
        self._begun = trainer.global_step

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save the last step if memory ran out behind it, with its batches and no others."""
        step = trainer.global_step
        is_half_changed = step == self._begun
        if not is_out_of_memory(exception) or is_half_changed or trainer.world_size > 1:
            return
        if step > self._saved:
            loader = trainer.train_dataloader
            assert isinstance(loader, ResumableLoader)
            loader.handed_out = step * trainer.accumulate_grad_batches
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self._saved = trainer.global_step
        trainer.save_checkpoint(self.folder / f"step-{self._saved:08d}.ckpt")
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep]:
                old.unlink()


def newest_checkpoint(folder: Path, report: Callable[[str], None]) -> Path | None:
    """Find the newest whole checkpoint of a run, if there is one; set damaged ones aside.

    Processes that ask at the same time find the same one.

    Args:
        folder: of the checkpoints.
        report: told what is damaged.
    """
    checkpoints = sorted(folder.glob("step-*.ckpt"), reverse=True)
    for checkpoint in checkpoints:
        if is_whole(checkpoint):
            return checkpoint
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
        with suppress(FileNotFoundError):  # another process was first
            checkpoint.replace(aside)
        report(f"{checkpoint} is damaged; it is set aside as {aside.name}")
    if checkpoints:
        report(f"{folder} holds no whole checkpoint; the run starts from the beginning")
    return None


def is_whole(checkpoint: Path) -> bool:
    """Tell whether a file is a checkpoint of this kit, as it was written.

    `torch.save` writes a zip file with the checksum of each tensor, and `torch.load` compares none.
    """
    try:
        with ZipFile(checkpoint) as archive:
            # Checksums do not cover what the directory says of the tensors.
            is_equal = all(map(_is_plain, archive.infolist())) and archive.testzip() is None
            return is_equal and "recipe" in _load(checkpoint)
    except _DAMAGES:
        return False


def _is_plain(entry: ZipInfo) -> bool:
    """Tell whether `torch.save` may have described a tensor so."""
    is_stored = entry.compress_type == ZIP_STORED and entry.external_attr == 0
    return is_stored and entry.header_offset >= 0


def _load(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(
        checkpoint, weights_only=True, map_location="cpu", mmap=True
    )
    return content


def step_of(checkpoint: Path) -> int:
    """Read the number of optimiser steps from a checkpoint's name."""
    return int(checkpoint.stem.removeprefix("step-"))


def require_same_recipe(checkpoint: Path, recipe: Mapping[str, Any]) -> None:
    """Refuse to continue a run under a recipe that would train differently.

    Raises:
        InputError: lists the keys that differ.
    """
    before, now = _flat(_load(checkpoint)["recipe"]), _flat(recipe)
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
