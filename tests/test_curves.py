"""The course of a run as rows and as a picture."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from kit.training.curves import Curves, draw_curves, read_curves, smoothed
from kit.training.module import Fitting
from kit.training.task import Task


class Numbers(Dataset[float]):
    """A list of numbers."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, place: int) -> float:
        return self.values[place]


class Line(Task):
    """Fits one number; its losses are known in advance of every step."""

    def __init__(self) -> None:
        self._network = nn.Module()
        self._network.slope = nn.Parameter(torch.zeros(()))

    @property
    def network(self) -> nn.Module:
        """The number."""
        return self._network

    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        return {"line": self._network.get_parameter("slope") + batch.sum()}

    def names(self, batch: Tensor) -> tuple[list[str], list[list[int]]]:
        return [str(value) for value in batch], [[0, 0] for _ in batch]


class Descent:
    """Plain gradient descent."""

    is_elementwise = True

    def optimizer(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters.values(), lr=0.5)

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: 1.0)


def train(folder: Path, values: list[float], accumulate: int = 1) -> list[dict[str, str]]:
    trainer = Trainer(
        max_steps=len(values) // accumulate,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Curves(folder, every=1)],
    )
    with warnings.catch_warnings():
        # Lightning recommends loader processes and more; neither matters to two steps.
        warnings.simplefilter("ignore")
        trainer.fit(Fitting(Line(), Descent(), 0, {}), DataLoader(Numbers(values), batch_size=1))
    return read_curves(folder / "metrics.csv")


def test_every_step_has_a_row(tmp_path: Path) -> None:
    rows = train(tmp_path, [1.0, 2.0, 3.0])
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    # The slope falls by half a unit with each step.
    assert [float(row["loss/line"]) for row in rows] == [1.0, 1.5, 2.0]
    assert {float(row["grad_norm"]) for row in rows} == {1.0}
    assert {float(row["lr"]) for row in rows} == {0.5}
    assert {int(row["samples"]) for row in rows} == {1}
    draw_curves(rows, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size[0] > 100


def test_a_step_of_several_batches_is_averaged(tmp_path: Path) -> None:
    rows = train(tmp_path, [1.0, 2.0, 3.0, 5.0], accumulate=2)
    assert [float(row["loss/line"]) for row in rows] == [1.5, 3.5]
    assert [int(row["samples"]) for row in rows] == [2, 2]


def test_a_new_run_leaves_old_rows_behind(tmp_path: Path) -> None:
    train(tmp_path, [1.0, 2.0, 3.0])
    rows = train(tmp_path, [7.0])
    assert [float(row["loss/line"]) for row in rows] == [7.0]


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_curves(tmp_path / "metrics.csv") == []
    draw_curves([], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_has_no_bias_towards_the_start() -> None:
    assert smoothed([4.0] * 5) == pytest.approx([4.0] * 5)
    assert smoothed([0.0, 1.0])[1] == pytest.approx(1 / 1.9)
    settled = smoothed([0.0] * 5 + [1.0] * 100)
    assert settled[-1] == pytest.approx(1.0, abs=1e-3)
