"""A shard is complete or not there, the same for the same samples, and checked when read."""

import errno
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from webdataset.writer import TarWriter  # type: ignore[import-untyped]

from kit.data.fields import INDEX_NAME, Meta
from kit.data.writer import ShardWriter, index_tar, read_index, write_shard
from kit.errors import InputError

META = Meta(
    kind="video",
    num_frames=5,
    height=16,
    width=16,
    fps=25,
    num_speakers=1,
    num_masks=0,
    has_caption=True,
    source="a.mp4",
    start_seconds=0.0,
    loudness=[None],
)


def sample(number: int) -> tuple[str, dict[str, bytes]]:
    content = bytes([number]) * (100 + number)
    return f"{number:03d}", {"json": json.dumps(META).encode(), "txt": b"", "mp4": content}


def fill(folder: Path, count: int = 5, max_samples: int = 2) -> None:
    with ShardWriter(folder, "raw", max_samples=max_samples) as writer:
        for number in range(count):
            writer.write(*sample(number))


def write_tar(path: Path, *members: tarfile.TarInfo) -> None:
    with tarfile.open(path, "w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def test_index_leads_to_every_byte(tmp_path: Path) -> None:
    fill(tmp_path)
    index = read_index(tmp_path)
    assert [shard["file"] for shard in index["shards"]] == [f"shard-00000{n}.tar" for n in range(3)]
    keys = []
    for shard in index["shards"]:
        data = (tmp_path / shard["file"]).read_bytes()
        for entry in shard["samples"]:
            keys.append(entry["key"])
            expected = sample(int(entry["key"]))[1]
            places = entry["members"].items()
            assert {name: data[start : start + size] for name, (start, size) in places} == expected
            assert entry["meta"] == META
    assert keys == [f"{number:03d}" for number in range(5)]


def test_shards_are_closed_by_size(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "raw", max_bytes=500) as writer:
        for number in range(4):
            writer.write(*sample(number))
    assert [len(shard["samples"]) for shard in read_index(tmp_path)["shards"]] == [2, 2]


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    fill(tmp_path / "b")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"
    )
    assert first == second


def test_foreign_tars_need_no_index(tmp_path: Path) -> None:
    fill(tmp_path)
    with_index = read_index(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    assert read_index(tmp_path) == with_index


def test_exception_leaves_complete_shards_only(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ShardWriter(tmp_path, "raw", max_samples=2) as writer:
        for number in range(3):
            writer.write(*sample(number))
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar"]
    assert len(index_tar(tmp_path / "shard-000000.tar")["samples"]) == 2


@pytest.mark.parametrize("method", ["write", "close"])
def test_full_disk_leaves_complete_shards_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    original: Callable[..., int] = getattr(TarWriter, method)
    calls = []

    def fail_at_last(self: object, *arguments: object) -> int:
        calls.append(1)
        if len(calls) == {"write": 4, "close": 2}[method]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *arguments)

    monkeypatch.setattr(TarWriter, method, fail_at_last)
    with pytest.raises(OSError, match="No space left"):
        fill(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar"]
    monkeypatch.undo()
    fill(tmp_path)
    assert len(read_index(tmp_path)["shards"]) == 3


def test_half_a_shard_is_never_visible(tmp_path: Path) -> None:
    def two_samples_and_an_end() -> object:
        yield sample(0)
        assert [path.name for path in tmp_path.iterdir()] == ["a.tar.partial"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.tar", two_samples_and_an_end())  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_cut_shard(tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / "shard-000002.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=f"shard-000002.tar is cut: 1000 bytes instead of {size}"):
        read_index(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(InputError, match=r"shard-000002.tar is (cut|not a complete tar)"):
        read_index(tmp_path)


def test_missing_and_changed_shards(tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / "shard-000001.tar"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(InputError, match="shard-000001.tar is changed"):
        read_index(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="shard-000001.tar is named in index.json but is not"):
        read_index(tmp_path)


def test_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no index.json and no tar files"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"charakit-shards"', '"other"', "format 'other'"),
        ('"version": 1', '"version": 9', "version 9; this kit reads .* version 1"),
        ('"kind": "raw"', '"kind": "cooked"', "kind"),
        ('"shard-000000.tar"', '"../shard-000000.tar"', "must be a file name without folders"),
        ('"key": "000"', '"key": "../000"', "cannot be a sample's name"),
        ('"num_frames": 5', '"num_frames": "many"', "num_frames"),
        ('"mp4": [', '"mp4": [999999', "lies outside the file"),
        ("{", "", "is not an index of shards"),
    ],
)
def test_unfit_index(tmp_path: Path, old: str, new: str, message: str) -> None:
    fill(tmp_path)
    path = tmp_path / INDEX_NAME
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member("../../x.json"), r"a.tar: '../../x.json' must be a file name without folders"),
        (member("/etc/x.json"), "must be a file name without folders"),
        (member("folder/x.json"), "must be a file name without folders"),
        (member("x.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link or a device"),
        (member("x.json", type=tarfile.LNKTYPE, linkname="y"), "is a link or a device"),
        (member("x.json", type=tarfile.CHRTYPE), "is a link or a device"),
        (member("x"), "must be named <key>.<extension>"),
        (member("x.mp4"), "sample 'x' has no 'x.json'"),
        (member("x.json", size=1), "x.json: .*Invalid JSON"),
    ],
)
def test_unfit_members(tmp_path: Path, info: tarfile.TarInfo, message: str) -> None:
    write_tar(tmp_path / "a.tar", info)
    with pytest.raises(InputError, match=message):
        index_tar(tmp_path / "a.tar")


def test_not_a_tar(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(InputError, match="a.tar is not a complete tar file"):
        index_tar(tmp_path / "a.tar")
