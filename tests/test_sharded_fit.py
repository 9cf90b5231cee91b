"""Training by several processes: equal to one process, and resumed by any number of them."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kit.data.media import iter_frames
from kit.errors import InputError
from kit.run.fit import fit
from tests.processes import run_together
from tests.test_fit import RECIPE, SHORT_PREVIEWS, overrides

STEPS = 6


def words(shards: Path, name: str, **more: Any) -> list[str]:
    options = {"trainer.max_steps": STEPS, "trainer.save_every": 3, "trainer.keep_checkpoints": 9}
    return overrides(shards, name=name, **(options | more))


def train(given: list[str]) -> list[str]:
    """Train in one of several processes; gives what it told."""
    told: list[str] = []
    fit(str(RECIPE), given, told.append)
    return told


def course(name: str, column: str = "loss/velocity") -> list[float]:
    with Path("runs", name, "metrics.csv").open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file)]


def adapter(name: str) -> dict[str, torch.Tensor]:
    return load_file(f"runs/{name}/adapter.safetensors")


def assert_alike(name: str, other: str, atol: float = 1e-5) -> None:
    for column in ("loss/velocity", "grad_norm", "lr", "samples"):
        torch.testing.assert_close(
            course(name, column), course(other, column), rtol=1e-5, atol=1e-5
        )
    one, two = adapter(name), adapter(other)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0.0, atol=atol)


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_two_processes_equal_one(encoded_shards: Path) -> None:
    """The same batches in a step: two one behind the other, or one for each process."""
    train(words(encoded_shards, "alone", **{"trainer.accumulate": 2}))
    told = run_together(2, train, words(encoded_shards, "pair"))
    assert_alike("pair", "alone")
    assert told[0][-1].endswith("step 6")


def test_two_processes_that_share_each_video_equal_one(encoded_shards: Path) -> None:
    train(words(encoded_shards, "alone"))
    run_together(2, train, words(encoded_shards, "shared", **{"trainer.split_frames": 2}))
    assert_alike("shared", "alone")


def test_previews_are_made_together_and_written_once(encoded_shards: Path) -> None:
    options = {"trainer.max_steps": 2, **SHORT_PREVIEWS}
    alone, together = (
        [word for word in words(encoded_shards, name, **options) if word != "preview=null"]
        for name in ("alone", "together")
    )
    train([*alone, "trainer.accumulate=2"])
    run_together(2, train, together)
    for step in (1, 2):
        one, other = (
            np.stack(list(iter_frames(Path(f"runs/{name}/previews/step-{step:08d}.mp4"), 25)))
            for name in ("alone", "together")
        )
        assert np.abs(one.astype(int) - other.astype(int)).mean() < 0.5
    # The step behind a preview works with the weights again, not with their average.
    assert_alike("together", "alone")


def test_one_sharded_process_equals_none(encoded_shards: Path) -> None:
    train(words(encoded_shards, "plain"))
    run_together(1, train, words(encoded_shards, "sharded", **{"trainer.shard": "true"}))
    # One thread adds up in another order than two.
    assert_alike("sharded", "plain", atol=1e-7)


def test_resume_bit_for_bit(encoded_shards: Path) -> None:
    run_together(2, train, words(encoded_shards, "through"))
    run_together(2, train, words(encoded_shards, "twice", **{"trainer.max_steps": 3}))
    run_together(2, train, words(encoded_shards, "twice"))
    assert_alike("twice", "through", atol=0.0)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resume_with_another_number_of_processes(
    encoded_shards: Path, before: int, after: int
) -> None:
    def go(world: int, name: str, steps: int) -> None:
        options = {"trainer.max_steps": steps, "trainer.accumulate": 2 // world}
        if world == 1:
            train(words(encoded_shards, name, **options))
        else:
            run_together(2, train, words(encoded_shards, name, **options))

    go(before, "through", STEPS)
    go(before, "changing", 3)
    go(after, "changing", STEPS)
    assert_alike("changing", "through")


def test_another_number_of_batches_in_a_step_is_refused(encoded_shards: Path) -> None:
    train(words(encoded_shards, "run", **{"trainer.max_steps": 3}))
    with pytest.raises(InputError, match="batches_per_step: was 1, is 2"):
        train(words(encoded_shards, "run", **{"trainer.accumulate": 2}))


@pytest.mark.parametrize(
    ("option", "finding"),
    [
        ("adapter.kind=dora", "adapter.kind: the magnitudes of dora need whole weights"),
        ("trainer.split_frames=2", "trainer.split_frames: 2 does not divide 1 processes"),
        ("optimizer.state_bits=8", "optimizer: this one needs whole matrices or blocks"),
    ],
)
def test_what_cannot_be_distributed_is_refused(
    encoded_shards: Path, option: str, finding: str
) -> None:
    with pytest.raises(InputError, match=finding):
        train([*words(encoded_shards, "run", **{"trainer.shard": "true"}), option])
