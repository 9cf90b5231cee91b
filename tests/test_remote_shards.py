"""Shards behind an address: the same batches as from a folder, whatever the connection does."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kit.data.claims import claim
from kit.data.clips import RawClips
from kit.data.connection import Patience
from kit.data.fields import INDEX_NAME, Meta
from kit.data.loader import ResumableLoader
from kit.data.module import ShardData
from kit.data.order import Mixing, Order, epoch_batches
from kit.data.remote import Cache, RemoteFolder
from kit.data.shards import Shards
from kit.data.writer import ShardWriter
from kit.errors import InputError
from kit.models.base import Encoders
from tests.processes import run_together
from tests.serving import Server, serving

NUM_STILLS, PER_SHARD, NUM_SHARDS = 25, 4, 7
HASTE = Patience(attempts=3, pause_seconds=0.01, stall_seconds=0.5)

MakeData = Callable[..., ShardData]


def write_stills(folder: Path, seed: int = 0) -> None:
    """Write small pictures, a few in each shard."""
    random = np.random.default_rng(seed)
    meta = Meta(
        kind="image",
        num_frames=1,
        height=32,
        width=32,
        fps=25,
        num_speakers=0,
        num_masks=0,
        has_caption=True,
        source="drawn",
        start_seconds=0.0,
        loudness=[],
    )
    with ShardWriter(folder, "raw", max_samples=PER_SHARD) as writer:
        for number in range(NUM_STILLS):
            picture = BytesIO()
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(picture, "png")
            facts = {"json": json.dumps(meta).encode(), "txt": f"still {number}".encode()}
            writer.write(f"{number:03d}", {**facts, "png": picture.getvalue()})


@pytest.fixture(scope="module")
def stills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stills")
    write_stills(folder)
    return folder


@pytest.fixture
def server(stills: Path) -> Iterator[Server]:
    with serving(stills) as started:
        yield started


def opened(server: Server, cache: Path, shards_held: float = 99) -> RemoteFolder:
    size = max(path.stat().st_size for path in server.folder.glob("*.tar"))
    return RemoteFolder(server.address, Cache(cache, shards_held * size), HASTE)


def cached(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("*/*")}


def read_share(
    path: str, cache: str, num_batches: int, num_workers: int, **options: Any
) -> list[list[int]]:
    """Read the batches of one process, whose place the environment tells: (epoch, number) each."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    data = ShardData(
        4,
        8,
        25,
        None,
        path=path,
        cache=f"{cache}/host{rank // 2}",
        batch_size=2,
        num_workers=num_workers,
        **options,
    )
    assert data.problems() == []
    data.prepare_run(None, seed=0, num_batches=num_batches, place=(rank, world))
    batches = islice(data.train_dataloader(), num_batches)
    return [[raw.epoch, raw.index] for batch in batches for raw in batch]


@pytest.mark.parametrize("is_remote", [False, True])
def test_two_machines_read_every_sample_once_an_epoch(
    server: Server, tmp_path: Path, is_remote: bool
) -> None:
    """Four epochs of 13 batches for four processes of two workers; each ends amid their turns."""
    path = server.address if is_remote else str(server.folder)
    shares = run_together(4, read_share, path, str(tmp_path), 13, 2)
    draws = Counter((epoch, number) for share in shares for epoch, number in share)
    assert draws == Counter((epoch, number) for epoch in range(4) for number in range(NUM_STILLS))
    if is_remote:
        # Each machine fetched each shard once.
        asked = {name: count for name, count in server.asked.items() if name.endswith(".tar")}
        assert asked == {f"shard-{number:06d}.tar": 2 for number in range(NUM_SHARDS)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_the_folder(
    encoded_shards: Path,
    shard_data: MakeData,
    tiny_encoders: Encoders,
    tmp_path: Path,
    num_workers: int,
) -> None:
    def batches(path: str, **options: Any) -> list[Any]:
        data = shard_data(path, **options)
        assert data.problems() == []
        data.prepare_run(lambda: tiny_encoders, seed=3, num_batches=6, place=(0, 1))
        return list(islice(data.train_dataloader(), 6))

    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "encoded").symlink_to(encoded_shards)
    with serving(tmp_path / "shards") as server:
        remote = batches(server.address, cache=str(tmp_path / "cache"), num_workers=num_workers)
    for ours, theirs in zip(remote, batches(str(encoded_shards)), strict=True):
        assert ours.keys == theirs.keys
        assert torch.equal(ours.latents, theirs.latents)
        assert torch.equal(ours.conditions.audio, theirs.conditions.audio)


def test_samples_are_identified_wherever_they_lie(
    server: Server, shard_data: MakeData, tmp_path: Path
) -> None:
    local, remote = shard_data(server.folder), shard_data(server.address, cache=str(tmp_path))
    assert remote.digest() == local.digest()
    assert shard_data(server.folder, mixed_shards=2).digest() != local.digest()


@pytest.mark.parametrize("fault", ["503", "429", "cut", "stall"])
def test_what_fails_is_tried_again(server: Server, tmp_path: Path, fault: str) -> None:
    server.faults["shard-000001.tar"] = [fault, fault]
    shards = Shards(opened(server, tmp_path))
    assert shards.read(PER_SHARD, "txt") == b"still 4"
    assert server.asked["shard-000001.tar"] == 3
    assert cached(tmp_path) == {"shard-000001.tar"}


@pytest.mark.parametrize(
    ("faults", "message", "tries"),
    [
        (["503"] * 9, r"shard-000001\.tar cannot be read, tried 3 times: 503", 3),
        (["cut"] * 9, r"shard-000001\.tar cannot be read, tried 3 times: ", 3),
        (["stall"] * 9, r"shard-000001\.tar cannot be read, tried 3 times: nothing came", 3),
        (["404"], r"shard-000001\.tar cannot be read: there is no such file", 1),
        (["403"], r"shard-000001\.tar cannot be read: 403", 1),
    ],
)
def test_what_fails_for_good_names_the_address(
    server: Server, tmp_path: Path, faults: list[str], message: str, tries: int
) -> None:
    server.faults["shard-000001.tar"] = faults
    shards = Shards(opened(server, tmp_path))
    with pytest.raises(InputError, match=f"{server.address}/{message}"):
        shards.read(PER_SHARD, "txt")
    assert server.asked["shard-000001.tar"] == tries
    assert cached(tmp_path) == set()


def test_a_failure_in_a_worker_is_one_line(
    server: Server, shard_data: MakeData, tmp_path: Path
) -> None:
    server.faults["shard-000000.tar"] = ["403"] * 9
    shards = Shards(opened(server, tmp_path))
    data = shard_data(server.folder)
    data.prepare_run(None, seed=0, num_batches=9, place=(0, 1))
    clips = data.train_dataloader().dataset
    assert isinstance(clips, RawClips)
    order = Order([0] * PER_SHARD, 1, seed=0)
    remote = RawClips(shards, clips.selection)
    loader = ResumableLoader(remote, order, 4, 0, 1, num_workers=1, collate=list)
    with pytest.raises(InputError) as failure:
        next(iter(loader))
    assert str(failure.value).startswith(f"{server.address}/shard-000000.tar cannot be read")
    assert "\n" not in str(failure.value)


def test_a_shard_of_another_size_is_refused(server: Server, tmp_path: Path) -> None:
    folder = opened(server, tmp_path)
    folder.sizes["shard-000001.tar"] += 1
    with pytest.raises(InputError, match="bytes came instead of"):
        folder.fetch("shard-000001.tar")
    assert cached(tmp_path) == set()


def test_the_cache_drops_what_was_used_longest_ago(server: Server, tmp_path: Path) -> None:
    folder = opened(server, tmp_path, shards_held=3)
    names = [f"shard-{number:06d}.tar" for number in range(4)]
    for age, name in enumerate(names[:3]):
        folder.fetch(name)
        os.utime(next(tmp_path.glob(f"*/{name}")), (1000 + age, 1000 + age))
    os.close(folder.open(names[0]))
    folder.fetch(names[3])
    assert cached(tmp_path) == {names[0], names[2], names[3]}


def test_the_cache_drops_nothing_that_is_open(server: Server, tmp_path: Path) -> None:
    folder = opened(server, tmp_path, shards_held=1)
    held = folder.open("shard-000000.tar")
    folder.fetch("shard-000001.tar")
    folder.fetch("shard-000002.tar")
    assert cached(tmp_path) == {"shard-000000.tar", "shard-000002.tar"}
    os.close(held)
    folder.fetch("shard-000003.tar")
    assert cached(tmp_path) == {"shard-000003.tar"}


def test_reading_on_keeps_to_the_size_of_the_cache(
    server: Server, shard_data: MakeData, tmp_path: Path
) -> None:
    """Over three epochs, two shards mixed at a time, in a cache for six of seven."""
    size = max(path.stat().st_size for path in server.folder.glob("*.tar"))
    options = {"cache": str(tmp_path), "cache_gb": 6 * size / 1e9}
    data = shard_data(server.address, mixed_shards=2, batch_size=2, **options)
    assert data.problems() == []
    data.prepare_run(None, seed=0, num_batches=39, place=(0, 1))
    seen = Counter[int]()
    for batch in islice(data.train_dataloader(), 39):
        seen.update(raw.index for raw in batch)
        assert sum(path.stat().st_size for path in tmp_path.glob("*/*.tar")) <= 6 * size
    assert seen == Counter({number: 3 for number in range(NUM_STILLS)})


def test_shards_are_fetched_before_they_are_read(
    server: Server, shard_data: MakeData, tmp_path: Path
) -> None:
    data = shard_data(server.address, cache=str(tmp_path))
    data.prepare_run(None, seed=0, num_batches=50, place=(0, 1))
    batches = iter(data.train_dataloader())
    next(batches)
    wait_until(lambda: len(cached(tmp_path)) == NUM_SHARDS)
    asked = server.asked.total()
    list(islice(batches, 20))
    assert server.asked.total() == asked
    batches.close()  # type: ignore[attr-defined]


def wait_until(is_so: Callable[[], bool]) -> None:
    for _ in range(200):
        if is_so():
            return
        time.sleep(0.05)
    raise AssertionError("it never came true")


def test_what_a_killed_process_left_is_fetched_again(server: Server, tmp_path: Path) -> None:
    folder = opened(server, tmp_path)
    folder.fetch("shard-000000.tar")
    place = next(tmp_path.glob("*/*.tar")).parent
    (place / "shard-000001.tar.1.partial").write_bytes(b"half")
    child = os.fork()
    if child == 0:
        held = claim(place / "shard-000001.tar")
        held.acquire()
        os._exit(0)
    os.waitpid(child, 0)
    assert (place / "shard-000001.tar.claim").exists()
    folder.fetch("shard-000001.tar")
    assert {"shard-000000.tar", "shard-000001.tar"} < cached(tmp_path)
    assert not (place / "shard-000001.tar.claim").exists()


def test_other_shards_at_the_same_address_are_fetched_anew(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    write_stills(tmp_path / "shards")
    with serving(tmp_path / "shards") as server:
        before = Shards(opened(server, tmp_path / "cache")).read(0, "png")
        write_stills(tmp_path / "shards", seed=1)
        shards = Shards(opened(server, tmp_path / "cache"))
        assert shards.read(0, "png") != before
        assert shards.read(0, "png") == Shards(server.folder).read(0, "png")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ftp://host/x", "'ftp://host/x' is no address of shards; valid: http://, https://, s3://"),
        ("https://me:secret@host/x", "https://host: an address must hold no name, password"),
        ("https://host/x?X-Amz-Signature=secret", "https://host: an address must hold no name"),
        ("http://127.0.0.1:9/x", "index.json cannot be read, tried"),
    ],
)
def test_addresses_that_cannot_be_read(
    shard_data: MakeData, tmp_path: Path, address: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as failure:
        RemoteFolder(address, Cache(tmp_path), HASTE)
    assert "secret" not in str(failure.value)


@pytest.mark.parametrize(("scheme", "driver"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_driver_is_named(shard_data: MakeData, scheme: str, driver: str) -> None:
    if find_spec(driver) is not None:
        pytest.skip(f"{driver} is installed")
    (line,) = shard_data(f"{scheme}://bucket/shards").problems()
    assert line.startswith(f"data.path: {scheme}://bucket needs {driver}; install it with")
    assert "charakit[remote]" in line


def test_an_address_without_shards(server: Server, shard_data: MakeData, tmp_path: Path) -> None:
    nowhere = f"{server.address}/nowhere"
    (line,) = shard_data(nowhere, cache=str(tmp_path)).problems()
    assert line == f"data.path: {nowhere}/{INDEX_NAME} cannot be read: there is no such file"


def test_a_cache_that_is_too_small_is_told_before_the_run(
    server: Server, shard_data: MakeData, tmp_path: Path
) -> None:
    size = max(path.stat().st_size for path in server.folder.glob("*.tar")) / 1e9
    cache = str(tmp_path)
    for more in ({"cache_gb": 5 * size}, {"cache_gb": 3 * size, "mixed_shards": 2}):
        (line,) = shard_data(server.address, cache=cache, **more).problems()
        assert line.startswith("data.cache_gb: ") and "data.mixed_shards" in line
    fitting = shard_data(server.address, cache=cache, cache_gb=5 * size, mixed_shards=2)
    assert fitting.problems() == []


def test_without_mixing_the_order_is_what_it_was() -> None:
    """Numbers of the order before shards could be mixed."""
    buckets = [number % 2 for number in range(10)]
    assert epoch_batches(buckets, 2, seed=42, epoch=1) == GOLDEN
    every = Mixing([range(5), range(5, 10)], at_once=2)
    assert epoch_batches(buckets, 2, seed=42, epoch=1, mixing=every) == GOLDEN


GOLDEN = [[4, 6], [9, 3], [2, 0], [7], [8], [5, 1]]


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_mixed_shards_give_every_sample_once(at_once: int, batch_size: int) -> None:
    shards = [range(0, 4), range(4, 9), range(9, 10), range(10, 17), range(17, 20)]
    buckets = [number % 3 for number in range(20)]
    counts = set()
    for epoch in range(4):
        batches = epoch_batches(buckets, batch_size, 7, epoch, Mixing(shards, at_once))
        assert sorted(number for batch in batches for number in batch) == list(range(20))
        assert all(len({buckets[number] for number in batch}) == 1 for batch in batches)
        counts.add(len(batches))
    assert len(counts) == 1


def test_mixed_shards_are_read_one_behind_the_other() -> None:
    shards = [range(10 * number, 10 * number + 10) for number in range(6)]
    batches = epoch_batches([0] * 60, 2, 1, 0, Mixing(shards, at_once=2))
    parts = [
        {number // 10 for batch in batches[s : s + 10] for number in batch} for s in (0, 10, 20)
    ]
    assert [len(part) for part in parts] == [2, 2, 2]
    assert set.union(*parts) == set(range(6))
    epochs = [epoch_batches([0] * 60, 2, 1, epoch, Mixing(shards, 2)) for epoch in range(2)]
    assert epochs[0] == batches and epochs[0] != epochs[1]
