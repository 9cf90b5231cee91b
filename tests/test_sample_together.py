"""A video by several processes, which share each chunk's frames, is the video of one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.errors import InputError
from kit.run.sample import sample
from tests.processes import run_together
from tests.test_sample import RECIPE, frames, words


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(given: list[str]) -> list[str]:
    told: list[str] = []
    sample(str(RECIPE), given, told.append)
    return told


@pytest.mark.parametrize("shard", ["false", "true"])
def test_two_processes_make_the_video_of_one(shard: str) -> None:
    options: dict[str, Any] = {"sampling.steps": 2, "sampling.shard": shard}
    make(words(out="alone.mp4", **options))
    told = run_together(2, make, words(out="together.mp4", **options))
    assert len(told[0]) > 1
    assert told[1] == []
    alone, together = (frames(Path(f"{name}.mp4")).astype(int) for name in ("alone", "together"))
    # The codec makes more of the last digits; another seed differs by 40 on the average.
    assert np.abs(alone - together).mean() < 0.5
    assert not list(Path().glob("*.partial"))


def test_what_cannot_be_cut_is_refused() -> None:
    given = words(**{"sampling.shard": "true", "sampling.offload": "turns"})
    with pytest.raises(InputError, match=r"sampling.offload: each process has only a share"):
        make(given)
