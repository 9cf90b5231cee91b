"""Commands that are killed anywhere and started again end as if nothing had happened."""

import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from benchmarks.chaos import attack_all, draw_clips
from kit.cli import main
from kit.training.curves import read_curves
from tests.processes import run_together, start_together
from tests.test_sharded_fit import assert_alike, train, words

LIMIT_SECONDS = 60.0
LONG = {"trainer.max_steps": 30, "trainer.save_every": 4}


def test_what_was_killed_ends_the_same(tmp_path: Path) -> None:
    """`benchmarks/chaos.py` kills more often."""
    outcomes = attack_all(tmp_path, kills=8, seed=0, length=9)
    assert outcomes.keys() == {"encode", "fit", "sample", "export"}
    for outcome in outcomes.values():
        assert len(outcome.fell) == 2
        assert not outcome.differing


@pytest.mark.parametrize("victims", [(0, 1), (0,), (1,)], ids=["both", "first", "second"])
def test_killed_processes_that_train_together_go_on_bit_for_bit(
    encoded_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victims: tuple[int, ...]
) -> None:
    """One that lost the other ends by itself, without torchrun."""
    monkeypatch.chdir(tmp_path)
    run_together(2, train, words(encoded_shards, "through", **LONG))
    pair, _ = start_together(2, train, words(encoded_shards, "killed", **LONG))
    try:
        wait_for_steps(Path("runs/killed/metrics.csv"), 9, pair)
        for victim in victims:
            pair[victim].kill()
        for process in pair:
            process.join(timeout=LIMIT_SECONDS)
            assert process.exitcode is not None
    finally:
        for process in pair:
            process.kill()
    told = run_together(2, train, words(encoded_shards, "killed", **LONG))
    assert any("going on from" in line for line in told[0])
    assert_alike("killed", "through", atol=0.0)


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_preparing_may_be_stopped_while_it_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    draw_clips(tmp_path / "clips", 1)
    command = ["prepare", str(tmp_path / "clips"), "--out", str(tmp_path / "shards")]
    command += ["--window", "9", "--buckets", "64x64"]
    assert main(command) == 0
    (tmp_path / "shards" / "index.json").unlink()  # as if it had been stopped just before
    unlink, done = Path.unlink, list[Path]()

    def stops(path: Path, missing_ok: bool = False) -> None:
        done.append(path)
        if len(done) == calls:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", stops)
        assert main(command) == 130
    assert main(command) == 0


def wait_for_steps(curves: Path, steps: int, processes: list[BaseProcess]) -> None:
    """Wait until a run has done some steps; it must not come to its end before."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(read_curves(curves)) < steps:
        assert all(process.is_alive() for process in processes) and time.monotonic() < deadline
        time.sleep(0.005)
