"""Writing shards and their index, and reading the index back with every promise checked.

A shard is a tar file whose members are named `<key>.<extension>`. It appears under its name only
when it is complete, and `index.json` only when all shards are.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from pydantic import TypeAdapter, ValidationError
from webdataset.writer import TarWriter  # type: ignore[import-untyped]

from kit.atomic import atomic_write, naming
from kit.data.fields import (
    INDEX_FORMAT,
    INDEX_NAME,
    INDEX_VERSION,
    Index,
    IndexedSample,
    IndexedShard,
    Meta,
    Settings,
    ShardKind,
)
from kit.errors import InputError


class ShardWriter:
    """Write samples into numbered shards, and the index when all went well.

    An exception leaves the shards that were complete, and neither index nor half shard.

    Args:
        folder: is made if need be.
        kind: what the samples are.
        settings: what an encoded folder was encoded with; empty for raw.
        max_samples: samples in a shard at most.
        max_bytes: a shard is closed when its samples reach this size.
    """

    def __init__(
        self,
        folder: Path,
        kind: ShardKind,
        settings: Settings | None = None,
        *,
        max_samples: int = 64,
        max_bytes: int = 2**30,
    ) -> None:
        self._folder = folder
        self._kind = kind
        self._settings = settings or {}
        self._max_samples = max_samples
        self._max_bytes = max_bytes
        self._shards: list[IndexedShard] = []
        self._current: _Shard | None = None
        self._content = hashlib.sha256()

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample; members are named by extension and one of them is `json`."""
        if self._current is None:
            self._current = _Shard(self._folder / shard_name(len(self._shards)))
        self._current.write(key, members)
        for content in members.values():
            self._content.update(content)
        full = self._current.num_samples >= self._max_samples
        if full or self._current.num_bytes >= self._max_bytes:
            self._close_shard()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            if self._current is not None:
                self._current.discard()
            return
        self._close_shard()
        digest = self._content.hexdigest()
        write_index(self._folder, self._kind, self._settings, self._shards, digest)

    def _close_shard(self) -> None:
        if self._current is not None:
            shard, self._current = self._current, None
            self._shards.append(index_tar(shard.publish()))


def shard_name(number: int) -> str:
    """Name a shard by its number."""
    return f"shard-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write one shard of (key, members) pairs; `path` appears only when it is complete."""
    shard = _Shard(path)
    try:
        for key, members in samples:
            shard.write(key, members)
    except BaseException:
        shard.discard()
        raise
    shard.publish()


def write_index(
    folder: Path,
    kind: ShardKind,
    settings: Settings,
    shards: Sequence[IndexedShard],
    digest: str,
) -> None:
    """Write `index.json`, whole or not at all.

    Args:
        folder: of the shards.
        kind: what the samples are.
        settings: what they were encoded with.
        shards: in order.
        digest: of all that they hold or were made of, so that other content shows in the index.
    """
    index = Index(
        format=INDEX_FORMAT,
        version=INDEX_VERSION,
        kind=kind,
        settings=dict(settings),
        shards=list(shards),
    )
    path = folder / INDEX_NAME
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
        json.dump({**index, "digest": digest}, file, ensure_ascii=False)


def read_index(folder: Path) -> Index:
    """Read a folder's index, or make one from its tar files, and compare it with them.

    Raises:
        InputError: there are no shards, the index is no index of ours, or a shard is missing,
            cut or changed.
    """
    path = folder / INDEX_NAME
    if not path.exists():
        return _index_of_tars(folder)
    index = parse_index(path.read_bytes(), path)
    for shard in index["shards"]:
        _check_size(folder / shard["file"], shard["bytes"])
    return index


def parse_index(content: bytes, place: Path | str) -> Index:
    """Read an index without looking at its shards.

    Args:
        content: of the file.
        place: where it lies, for errors.

    Raises:
        InputError: it is no index of ours, or places members outside of their shards.
    """
    try:
        facts = json.loads(content)
        found = (facts["format"], facts["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{place} is not an index of shards") from error
    if found != (INDEX_FORMAT, INDEX_VERSION):
        raise InputError(
            f"{place} has format '{found[0]}', version {found[1]}; "
            f"this kit reads '{INDEX_FORMAT}', version {INDEX_VERSION}"
        )
    try:
        index = TypeAdapter(Index).validate_python(facts)
    except ValidationError as error:
        raise InputError(f"{place}: {_first_finding(error)}") from error
    for shard in index["shards"]:
        _check_places(shard, place)
    return index


def index_tar(path: Path) -> IndexedShard:
    """Find the samples of a tar file, whoever wrote it.

    Raises:
        InputError: it is no tar file, is cut, or has a member that shards must not have: a link,
            a device, a path that leads elsewhere, a name without extension, an unfit `json`.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if not member.isdir()]
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path} is not a complete tar file: {error}") from error
    size = path.stat().st_size
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for member in members:
        key, extension = _split_name(path, member)
        if member.offset_data + member.size > size:
            raise InputError(f"{path} is cut: its member '{member.name}' is not complete")
        samples.setdefault(key, {})[extension] = (member.offset_data, member.size)
    return IndexedShard(
        file=path.name,
        bytes=size,
        samples=[
            IndexedSample(key=key, meta=_read_meta(path, key, places), members=places)
            for key, places in samples.items()
        ],
    )


class _Shard:
    """One shard on its way: a `.partial` file until it is published."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self._file = self._partial.open("wb")
        # No time and one fixed owner, so that equal samples give equal bytes.
        self._tar = TarWriter(self._file, encoder=False, mtime=0)
        self.num_samples = 0
        self.num_bytes = 0

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        with naming(self._path):
            self.num_bytes += self._tar.write({"__key__": key, **members})
        self.num_samples += 1

    def publish(self) -> Path:
        try:
            with naming(self._path):
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._partial.replace(self._path)
        except BaseException:
            self.discard()
            raise
        return self._path

    def discard(self) -> None:
        # On a full disk closing tries to write what is left, and fails once more.
        with suppress(OSError, ValueError):
            self._tar.close()
        with suppress(OSError):
            self._file.close()
        self._partial.unlink(missing_ok=True)


def _index_of_tars(folder: Path) -> Index:
    shards = [index_tar(path) for path in sorted(folder.glob("*.tar"))]
    if not shards:
        raise InputError(
            f"{folder} has no {INDEX_NAME} and no tar files; make it with 'kit prepare'"
        )
    encoded = any("text.safetensors" in s["members"] for shard in shards for s in shard["samples"])
    return Index(
        format=INDEX_FORMAT,
        version=INDEX_VERSION,
        kind="encoded" if encoded else "raw",
        settings={},
        shards=shards,
    )


def _split_name(path: Path, member: tarfile.TarInfo) -> tuple[str, str]:
    place = PurePosixPath(member.name)
    if not member.isreg():
        raise InputError(f"{path}: '{member.name}' is a link or a device; shards hold plain files")
    if place.is_absolute() or len(place.parts) != 1 or ".." in place.parts:
        raise InputError(f"{path}: '{member.name}' must be a file name without folders")
    key, _, extension = place.name.partition(".")
    if not key or not extension:
        raise InputError(f"{path}: '{member.name}' must be named <key>.<extension>")
    return key, extension


def _read_meta(path: Path, key: str, places: Mapping[str, tuple[int, int]]) -> Meta:
    if "json" not in places:
        raise InputError(f"{path}: sample '{key}' has no '{key}.json'")
    offset, size = places["json"]
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read(size)
    try:
        return TypeAdapter(Meta).validate_json(text)
    except ValidationError as error:
        raise InputError(f"{path}: {key}.json: {_first_finding(error)}") from error


def _check_size(path: Path, num_bytes: int) -> None:
    if not path.is_file():
        raise InputError(f"{path} is named in {INDEX_NAME} but is not there")
    size = path.stat().st_size
    if size != num_bytes:
        verb = "cut" if size < num_bytes else "changed"
        raise InputError(f"{path} is {verb}: {size} bytes instead of {num_bytes}")


def _check_places(shard: IndexedShard, place: Path | str) -> None:
    name = shard["file"]
    if not _is_plain_name(name):
        raise InputError(f"{place}: '{name}' must be a file name without folders")
    for sample in shard["samples"]:
        if not _is_plain_name(sample["key"]):
            raise InputError(f"{place}: '{sample['key']}' cannot be a sample's name")
        for extension, (offset, length) in sample["members"].items():
            if offset < 0 or length < 0 or offset + length > shard["bytes"]:
                raise InputError(f"{place}: {sample['key']}.{extension} lies outside the file")


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def _first_finding(error: ValidationError) -> str:
    finding = error.errors()[0]
    return f"{'.'.join(map(str, finding['loc']))}: {finding['msg']}"
