"""A damaged checkpoint is told, set aside, and the run goes on from the one before it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kit.run.fit import fit
from kit.training.checkpoints import AtomicCheckpoints, is_whole, newest_checkpoint
from tests.processes import run_together
from tests.test_fit import (
    RECIPE,
    assert_same_tensors,
    losses,
    overrides,
    print_nothing,
)
from tests.test_sharded_fit import assert_alike, train, words

NEWEST = "step-00000006.ckpt"


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def cut(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:3000])


def empty(checkpoint: Path) -> None:
    checkpoint.write_bytes(b"")


def flip(checkpoint: Path) -> None:
    """Turn one bit of a weight, which loads as another number."""
    content = bytearray(checkpoint.read_bytes())
    weight = next(iter(torch.load(checkpoint, weights_only=True)["state_dict"].values()))
    content[content.index(weight.numpy().tobytes())] ^= 1
    checkpoint.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, empty, flip])
def test_the_one_before_takes_its_place(
    encoded_shards: Path, damage: Callable[[Path], None]
) -> None:
    whole = fit(str(RECIPE), overrides(encoded_shards, name="whole"), print_nothing)
    hurt = fit(str(RECIPE), overrides(encoded_shards, name="hurt"), print_nothing)
    damage(hurt / "checkpoints" / NEWEST)
    told: list[str] = []
    fit(str(RECIPE), overrides(encoded_shards, name="hurt"), told.append)
    assert f"{NEWEST} is damaged; it is set aside as {NEWEST}.damaged" in told[0]
    assert told[1] == "going on from runs/hurt/checkpoints/step-00000004.ckpt"
    assert losses(hurt) == losses(whole)
    assert_same_tensors(hurt, whole)
    assert (hurt / "checkpoints" / f"{NEWEST}.damaged").exists()


def test_without_a_whole_one_the_run_starts_anew(encoded_shards: Path) -> None:
    whole = fit(str(RECIPE), overrides(encoded_shards, name="whole"), print_nothing)
    hurt = fit(str(RECIPE), overrides(encoded_shards, name="hurt"), print_nothing)
    for checkpoint in (hurt / "checkpoints").iterdir():
        empty(checkpoint)
    told: list[str] = []
    fit(str(RECIPE), overrides(encoded_shards, name="hurt"), told.append)
    assert [line.split()[0] for line in told[:2]] == [
        f"runs/hurt/checkpoints/step-0000000{step}.ckpt" for step in (6, 4)
    ]
    assert told[2].endswith("no whole checkpoint; the run starts from the beginning")
    assert losses(hurt) == losses(whole)
    assert_same_tensors(hurt, whole)


def test_processes_fall_back_to_the_same_one(encoded_shards: Path) -> None:
    run_together(2, train, words(encoded_shards, "whole"))
    run_together(2, train, words(encoded_shards, "hurt"))
    flip(Path("runs/hurt/checkpoints", NEWEST))
    told = run_together(2, train, words(encoded_shards, "hurt"))
    for lines in told:
        assert "going on from runs/hurt/checkpoints/step-00000003.ckpt" in lines
    assert_alike("hurt", "whole", atol=0.0)


def test_no_flipped_bit_goes_unnoticed_that_changes_what_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / NEWEST
    state: dict[str, Any] = {"recipe": {}, "weight": torch.arange(9.0), "step": 3}
    AtomicCheckpoints().save_checkpoint(state, path)
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 13):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        if is_whole(path):
            found = torch.load(path, weights_only=True)
            assert torch.equal(found["weight"], state["weight"]) and found["step"] == 3


def test_what_is_no_checkpoint_is_set_aside(tmp_path: Path) -> None:
    torch.save({"recipe": Path("a program to run")}, tmp_path / "step-00000003.ckpt")
    AtomicCheckpoints().save_checkpoint({"step": 2}, tmp_path / "step-00000002.ckpt")
    assert newest_checkpoint(tmp_path, print_nothing) is None
    assert len(list(tmp_path.glob("*.damaged"))) == 2
