"""The course of a run as rows and as a picture."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from kit.training.curves import Curves, draw_curves, read_curves, smoothed


class Numbers(Dataset[float]):
    """A list of numbers."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, place: int) -> float:
        return self.values[place]


class Line(LightningModule):
    """Fits one number; its losses are known in advance of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss = self.slope + batch.sum()
        return {"loss": loss, "losses": {"line": loss.detach()}, "samples": len(batch)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


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
        trainer.fit(Line(), DataLoader(Numbers(values), batch_size=1))
    return read_curves(folder / "metrics.csv")


def test_every_step_has_a_row(tmp_path: Path) -> None:
    rows = train(tmp_path, [1.0, 2.0, 3.0])
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    # The slope falls by half a unit with each step.
    assert [float(row["loss/line"]) for row in rows] == [1.0, 1.5, 2.0]
    assert {float(row["grad_norm"]) for row in rows} == {1.0}
    assert {float(row["lr"]) for row in rows} == {0.5}
    assert {int(row["samples"]) for row in rows} == {1}
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
