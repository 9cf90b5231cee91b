"""Encoding by several processes, some of which die: the same bytes as one process writes."""

import os
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kit.data import claims
from kit.data.claims import claim
from kit.data.encode import ClipEncoder, encode_shards
from kit.data.module import ShardData
from kit.data.remote import Cache, RemoteFolder
from kit.errors import InputError
from kit.models.wan_base import WanBase
from kit.run.prepare import prepare
from tests.processes import PRELOADED, run_together
from tests.serving import serving

ROOT = Path(__file__).parents[1]
NAMES = {"begun.json", "index.json", *(f"shard-{number:06d}.tar" for number in range(4))}


class Killed(ClipEncoder):
    """Kills its process, as the system does, amid the clip with this number."""

    def __init__(self, encoder: ClipEncoder, at_clip: int) -> None:
        super().__init__(encoder.encoders, encoder.dtype, encoder.negative_text)
        self._left = at_clip

    def speech(self, tracks: Tensor) -> Tensor:
        """Encode speech, which is done once for each clip."""
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().speech(tracks)


def encode(raw: str, out: str, killed_at: int = 99, cache: str = "") -> list[str]:
    """Encode in one of the processes that the environment tells of, one clip in each shard."""
    torch.set_num_threads(1)
    base = WanBase(path=str(ROOT / "data/tiny_base"), random_weights=0, dtype="float32")
    data = ShardData(
        4,
        8,
        25,
        base.fingerprint(),
        path=raw,
        window_frames=9,
        windows_per_clip=2,
        references_per_window=1,
        context_frames=5,
    )
    told: list[str] = []
    encode_shards(
        RemoteFolder(raw, Cache(Path(cache))) if cache else Path(raw),
        Path(out),
        Killed(data.clip_encoder(base.load_encoders(torch.device("cpu"))), killed_at),
        data.plan,
        data.settings,
        told.append,
        clips_per_shard=1,
        place=(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))),
    )
    return told


@pytest.fixture(scope="module")
def alone(raw_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes."""
    out = tmp_path_factory.mktemp("alone")
    run_together(1, encode, str(raw_shards), str(out))
    written = contents(out)
    assert written.keys() == NAMES
    return written


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(work: Callable[[], object]) -> int | None:
    """Run a process to its end, and give its status."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def test_four_processes_write_what_one_writes(
    raw_shards: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    told = run_together(4, encode, str(raw_shards), str(tmp_path))
    assert contents(tmp_path) == alone
    # Nobody encoded what another did.
    assert sum(map(len, told)) == 4


def test_what_a_killed_process_began_is_taken_over(
    raw_shards: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    status = start(partial(encode, str(raw_shards), str(tmp_path), 1))
    assert status == -signal.SIGKILL
    left = {path.name.split("-")[-1].split(".", 1)[1] for path in tmp_path.glob("shard-000001*")}
    assert "tar.claim" in left and len(left) == 2
    told = run_together(2, encode, str(raw_shards), str(tmp_path))
    assert contents(tmp_path) == alone
    assert sum(map(len, told)) == 3


def test_the_others_go_on_where_one_is_killed(
    raw_shards: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    """One dies in its first clip while the other works, which then finishes alone."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    work = [partial(encode, str(raw_shards), str(tmp_path), at) for at in (0, 99)]
    processes = [context.Process(target=task) for task in work]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0]
    assert contents(tmp_path) == alone


def test_a_claim_of_a_machine_that_died_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.5)
    target = tmp_path / "shard-000000.tar"
    with claim(target):
        told = (tmp_path / "shard-000000.tar.claim").read_bytes()
    elsewhere = told.replace(os.uname().nodename.encode(), b"elsewhere")
    assert elsewhere != told
    (tmp_path / "shard-000000.tar.claim").write_bytes(elsewhere)
    with claim(target):
        assert (tmp_path / "shard-000000.tar.claim").read_bytes() != elsewhere
    assert not list(tmp_path.iterdir())


def test_shards_behind_an_address_are_encoded(
    raw_shards: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    with serving(raw_shards) as server:
        given = server.address, str(tmp_path / "out"), 99, str(tmp_path / "cache")
        run_together(2, encode, *given)
    assert contents(tmp_path / "out") == alone


def test_several_processes_prepare_no_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="clips are prepared by one process"):
        prepare(
            tmp_path,
            tmp_path / "out",
            recipe=None,
            encode=False,
            window=None,
            buckets=None,
            clip_seconds=15.0,
            sequence_fps=25.0,
            overwrite=False,
            report=print,
        )
