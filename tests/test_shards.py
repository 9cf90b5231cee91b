"""From shards to batches: every sample once, resumable anywhere, raw and encoded alike."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kit.batch import Batch
from kit.data.clips import Selection, choose_window
from kit.data.encode import encode_shards
from kit.data.module import ShardData
from kit.data.order import Draw, Order, epoch_batches
from kit.data.shards import Shards
from kit.data.writer import write_shard
from kit.errors import InputError
from kit.models.base import Encoders

MakeData = Callable[..., ShardData]
CPU = torch.device("cpu")
NUM_BATCHES = 6


def say_nothing(line: str) -> None:
    pass


def encode(
    data: ShardData,
    encoders: Encoders,
    out: Path,
    report: Callable[[str], None] = say_nothing,
    *,
    overwrite: bool = False,
) -> None:
    encoder = data.clip_encoder(encoders)
    encode_shards(
        data.path,
        out,
        encoder,
        data.plan,
        data.settings,
        report,
        overwrite=overwrite,
        clips_per_shard=2,
    )


def start(data: ShardData, encoders: Encoders, place: tuple[int, int] = (0, 1)) -> ShardData:
    data.prepare_run(lambda: encoders, seed=3, num_batches=NUM_BATCHES, place=place)
    return data


def batches(data: ShardData) -> Iterator[Batch]:
    for loaded in data.train_dataloader():
        yield data.transfer_batch_to_device(loaded, CPU, 0)


def flat(value: Any) -> dict[str, Any]:
    """List all fields of a batch by name."""
    found: dict[str, Any] = {}
    for field in fields(value):
        content = getattr(value, field.name)
        found |= flat(content) if field.name == "conditions" else {field.name: content}
    return found


def assert_same(first: Batch, second: Batch) -> None:
    ours, theirs = flat(first), flat(second)
    for name, value in ours.items():
        if isinstance(value, Tensor):
            assert value.dtype == theirs[name].dtype, name
            assert torch.equal(value, theirs[name]), name
        else:
            assert value == theirs[name]


def make_order(counts: list[int], batch_size: int) -> Order:
    buckets = [bucket for bucket, count in enumerate(counts) for _ in range(count)]
    return Order(buckets, batch_size, seed=0)


@pytest.mark.parametrize("counts", [[1], [7], [4, 4], [5, 1, 8]])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_every_sample_occurs_once_an_epoch(counts: list[int], batch_size: int) -> None:
    order = make_order(counts, batch_size)
    for epoch in range(3):
        shuffled = epoch_batches(order.buckets, batch_size, 0, epoch)
        assert sorted(number for batch in shuffled for number in batch) == list(range(sum(counts)))
        assert len(shuffled) == order.batches_per_epoch
        for batch in shuffled:
            assert len(batch) <= batch_size
            assert len({order.buckets[number] for number in batch}) == 1


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [epoch_batches([0] * 20, 2, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({str(order) for order in orders}) == 4


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("counts", [[6], [5, 3]])
def test_all_ranks_together_do_what_one_does(counts: list[int], world: int) -> None:
    order = make_order(counts, batch_size=2)
    alone = list(order.batches(0, 6 * world, rank=0, world=1))
    shared = [list(order.batches(0, 6, rank, world)) for rank in range(world)]
    assert [share[turn] for turn in range(6) for share in shared] == alone


@pytest.mark.parametrize("stop", range(0, 12))
def test_an_order_goes_on_anywhere(stop: int) -> None:
    order = make_order([5, 3], batch_size=2)
    whole = list(order.batches(0, 12, 0, 1))
    assert list(order.batches(0, stop, 0, 1)) + list(order.batches(stop, 12, 0, 1)) == whole


def test_two_epochs_name_their_draws() -> None:
    order = make_order([5], batch_size=2)
    draws: Counter[Draw] = Counter(draw for batch in order.batches(0, 6, 0, 1) for draw in batch)
    assert draws == Counter((epoch, number) for epoch in range(2) for number in range(5))


def test_shards_are_one_long_list(raw_shards: Path) -> None:
    shards = Shards(raw_shards)
    assert shards.kind == "raw"
    names = ["ann", "bob", "duo", "still"]
    assert [shards.key(number).split("-")[1] for number in range(len(shards))] == names
    assert [shards.meta(number)["num_speakers"] for number in range(4)] == [1, 1, 2, 0]
    assert [shards.read(number, "txt").decode() for number in range(4)] == [
        "ann speaks", "bob speaks", "duo speaks", "",
    ]  # fmt: skip
    assert set(shards.members(2)) == {"json", "txt", "mp4", "wav", "speaker0.png", "speaker1.png"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_raw_and_encoded_shards_give_equal_batches(
    raw_shards: Path,
    encoded_shards: Path,
    shard_data: MakeData,
    tiny_encoders: Encoders,
    tmp_path: Path,
    dtype: str,
) -> None:
    options = {"feature_dtype": dtype, "batch_size": 2}
    raw, encoded = shard_data(raw_shards, num_workers=1, **options), encoded_shards
    if dtype != "float32":
        encoded = tmp_path
        encode(raw, tiny_encoders, encoded)
    ready = start(shard_data(encoded, **options), tiny_encoders)
    seen = set()
    for ours, theirs in zip(batches(start(raw, tiny_encoders)), batches(ready), strict=True):
        assert_same(ours, theirs)
        assert ours.latents.dtype == torch.float32
        seen |= set(ours.keys)
    assert len(seen) == 4


def test_what_a_batch_holds(
    encoded_shards: Path, shard_data: MakeData, tiny_encoders: Encoders
) -> None:
    data = start(shard_data(encoded_shards), tiny_encoders)
    for batch in batches(data):
        is_still, is_duo = "still" in batch.keys[0], "duo" in batch.keys[0]
        num_frames = 1 if is_still else 3
        assert batch.latents.shape == (1, 16, num_frames, 8, 8)
        assert batch.conditions.reference.shape == batch.latents.shape
        assert batch.conditions.num_speakers.tolist() == [2 if is_duo else 1]
        assert batch.conditions.audio.shape[2:4] == (4 * num_frames - 3, 5)
        assert batch.conditions.audio.any() != is_still
        assert batch.num_context.item() in ([0] if is_still else [1, 2])
        assert batch.conditions.speaker_masks.sum() == 64


def test_clips_choose_on_their_own(raw_shards: Path, shard_data: MakeData) -> None:
    shards, plan = Shards(raw_shards), shard_data(raw_shards).plan
    selection = Selection(plan, 0.5, 5, seed=0, frame_stride=4, pixel_stride=8)
    chosen = [
        [choose_window(shards, selection, (epoch, number))[1] for epoch in range(20)]
        for number in range(3)
    ]
    assert chosen[0] != chosen[1] != chosen[2] != chosen[0]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 4, 6])
def test_a_loader_goes_on_anywhere(
    encoded_shards: Path, shard_data: MakeData, tiny_encoders: Encoders, num_workers: int, stop: int
) -> None:
    whole = list(batches(start(shard_data(encoded_shards), tiny_encoders)))
    first = start(shard_data(encoded_shards, num_workers=num_workers), tiny_encoders)
    before = list(islice(batches(first), stop))
    second = start(shard_data(encoded_shards, num_workers=num_workers), tiny_encoders)
    second.train_dataloader().load_state_dict(first.train_dataloader().state_dict())
    after = list(batches(second))
    for ours, theirs in zip(before + after, whole, strict=True):
        assert_same(ours, theirs)


def test_another_number_of_processes_goes_on(
    encoded_shards: Path, shard_data: MakeData, tiny_encoders: Encoders
) -> None:
    def begin(place: tuple[int, int]) -> ShardData:
        return start(shard_data(encoded_shards), tiny_encoders, place)

    alone = list(batches(begin((0, 1))))
    first = begin((0, 2))
    assert len(list(islice(batches(first), 2))) == 2
    state = first.train_dataloader().state_dict()
    for place, number in (((0, 1), 4), ((0, 2), 4), ((1, 2), 5)):
        data = begin(place)
        data.train_dataloader().load_state_dict(state)
        assert_same(next(batches(data)), alone[number])


class Stopped(Exception):
    """Stands for a power cut."""


def test_encoding_goes_on_after_a_stop(
    raw_shards: Path,
    encoded_shards: Path,
    shard_data: MakeData,
    tiny_encoders: Encoders,
    tmp_path: Path,
) -> None:
    def stop(line: str) -> None:
        raise Stopped

    data = shard_data(raw_shards)
    with pytest.raises(Stopped):
        encode(data, tiny_encoders, tmp_path, stop)
    assert {path.name for path in tmp_path.iterdir()} == {"begun.json", "shard-000000.tar"}
    begun = (tmp_path / "shard-000000.tar").stat().st_mtime_ns
    encode(data, tiny_encoders, tmp_path)
    assert (tmp_path / "shard-000000.tar").stat().st_mtime_ns == begun
    names = {path.name for path in encoded_shards.iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()}
    assert len(names) == 4
    for name in names:
        assert (tmp_path / name).read_bytes() == (encoded_shards / name).read_bytes(), name


def test_encodings_are_not_mixed(
    raw_shards: Path, encoded_shards: Path, shard_data: MakeData, tiny_encoders: Encoders
) -> None:
    with pytest.raises(InputError, match="was encoded from other references 'm3'"):
        encode(shard_data(raw_shards, references="m1"), tiny_encoders, encoded_shards)
    with pytest.raises(InputError, match="encoded already"):
        encode(shard_data(encoded_shards), tiny_encoders, encoded_shards)


def test_shards_of_other_clips_can_be_overwritten(
    raw_shards: Path, shard_data: MakeData, tiny_encoders: Encoders, tmp_path: Path
) -> None:
    begun = tmp_path / "begun.json"
    begun.write_text(json.dumps({"source": "others", **shard_data(raw_shards).settings}))
    write_shard(tmp_path / "shard-000000.tar", [("other", {"json": b"{}"})])
    with pytest.raises(InputError, match="was encoded from other clips"):
        encode(shard_data(raw_shards), tiny_encoders, tmp_path)
    encode(shard_data(raw_shards), tiny_encoders, tmp_path, overwrite=True)
    encoded = Shards(tmp_path)
    assert encoded.kind == "encoded"
    assert [encoded.key(i) for i in range(4)] == [Shards(raw_shards).key(i) for i in range(4)]


def test_fit_data_has_no_problems(
    raw_shards: Path, encoded_shards: Path, shard_data: MakeData
) -> None:
    for path in (raw_shards, encoded_shards):
        assert shard_data(path).problems() == []
    assert shard_data(raw_shards).notes() == ["4 clips (raw), 7 windows"]
    notes = shard_data(raw_shards, references="m2").notes()
    assert notes[1].startswith("6 windows lie in clips too short for references 'm2'")


def test_encoded_shards_must_have_the_recipes_settings(
    encoded_shards: Path, shard_data: MakeData
) -> None:
    options = {"references": "m0", "negative_text": "blurred", "feature_dtype": "float16"}
    lines = shard_data(encoded_shards, **options).problems()
    assert [line.split(":")[0] for line in lines] == [
        "data.references", "data.feature_dtype", "data.negative_text",
    ]  # fmt: skip
    assert "encoded with 'm3', the recipe says 'm0'" in lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_frames": 10}, "data.window_frames: 10 is not 4n + 1"),
        ({"context_frames": 6}, "data.context_frames: 6 is not 4n + 1"),
        ({"context_frames": 9}, "data.context_frames: 9 leave nothing to learn"),
        ({"window_frames": 81}, "data.window_frames: 3 clips are shorter than a window"),
    ],
)
def test_problems_are_said_in_words(
    raw_shards: Path, shard_data: MakeData, options: dict[str, int], message: str
) -> None:
    (line,) = shard_data(raw_shards, **options).problems()
    assert line.startswith(message)


def test_cut_and_missing_shards_are_refused(
    encoded_shards: Path, shard_data: MakeData, tmp_path: Path
) -> None:
    shutil.copytree(encoded_shards, tmp_path, dirs_exist_ok=True)
    shard = tmp_path / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"shard-000001\.tar is cut"):
        Shards(tmp_path)
    (line,) = shard_data(tmp_path).problems()
    assert line.startswith("data.path: ") and "is cut" in line
    shard.unlink()
    with pytest.raises(InputError, match="is not there"):
        Shards(tmp_path)
    (line,) = shard_data(tmp_path / "nowhere").problems()
    assert line.startswith("data.path: ")
