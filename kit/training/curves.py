"""The course of a run: one row of numbers a step, in a CSV, in TensorBoard and as a picture."""

import csv
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer

from kit.atomic import atomic_write
from kit.training.module import Fitting

SMOOTHING = 0.9
"""Share of the smoothed loss that stays from one step to the next, in the picture."""


class Curves(Callback):
    """Writes `metrics.csv` in the run's folder.

    Rows behind the step that a run continues at are dropped: they are trained again.

    Args:
        folder: of the run.
        every: steps between two rows in TensorBoard; the CSV has them all.
        sharing: processes that work on the same samples.
    """

    def __init__(self, folder: Path, every: int, sharing: int = 1) -> None:
        self.path = folder / "metrics.csv"
        self.every = every
        self.sharing = sharing
        self._losses: list[dict[str, torch.Tensor]] = []
        self._samples = 0
        self._lr = 0.0
        self._last_step = 0
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the rows of the steps done so far."""
        self._last_step = trainer.global_step
        if trainer.is_global_zero:
            kept = [row for row in read_curves(self.path) if int(row["step"]) <= self._last_step]
            if kept:
                with atomic_write(self.path) as partial:
                    _write_rows(partial, kept, mode="w")
            else:
                self.path.unlink(missing_ok=True)
        self._since = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Note the rate before it changes."""
        self._lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *batch: object
    ) -> None:
        """Add a row at the end of each optimiser step, averaged over its batches."""
        self._losses.append(outputs["losses"])
        self._samples += outputs["samples"]
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        assert isinstance(pl_module, Fitting)
        row = self._row(pl_module.grad_norm, trainer.strategy)
        if trainer.is_global_zero:
            _write_rows(self.path, [row], mode="a")
        if self._last_step % self.every == 0 and trainer.logger is not None:
            trainer.logger.log_metrics(row, self._last_step)
        self._losses, self._samples, self._since = [], 0, time.perf_counter()

    def _row(self, grad_norm: float, processes: Strategy) -> dict[str, float]:
        """Average over the batches of all processes."""
        names = self._losses[0]
        means = [torch.stack([each[name] for each in self._losses]).mean() for name in names]
        shared = processes.reduce(torch.stack(means), reduce_op="mean").tolist()
        samples = processes.reduce(means[0].new_tensor(self._samples), reduce_op="sum")
        losses = {f"loss/{name}": value for name, value in zip(names, shared, strict=True)}
        return {
            "step": self._last_step,
            **losses,
            "lr": self._lr,
            "grad_norm": grad_norm,
            "seconds": time.perf_counter() - self._since,
            "samples": int(samples) // self.sharing,
        }


def read_curves(path: Path) -> list[dict[str, str]]:
    """Read the rows of a `metrics.csv`; a missing file has none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # A crash or a full disk may have left half a row.
    return [row for row in rows if all(row.values())]


def draw_curves(rows: list[dict[str, str]], picture: Path) -> None:
    """Draw every loss over the steps, and its smoothed course."""
    from matplotlib.figure import Figure

    if not rows:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [int(row["step"]) for row in rows]
    for name in (name for name in rows[0] if name.startswith("loss/")):
        values = [float(row[name]) for row in rows]
        (line,) = axes.plot(steps, values, alpha=0.3, linewidth=1)
        axes.plot(steps, smoothed(values), color=line.get_color(), label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    axes.grid(alpha=0.3)
    with atomic_write(picture) as partial:
        figure.savefig(partial, format="png", dpi=120)


def smoothed(values: list[float]) -> list[float]:
    """Average exponentially, without bias towards the first value."""
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(total / weight)
    return result


def _write_rows(path: Path, rows: list[Any], mode: str) -> None:
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)
