"""Random access to samples in tar shards, by the offsets of their index."""

import hashlib
import json
import os
from collections.abc import Iterable
from io import BufferedIOBase
from pathlib import Path
from typing import Protocol

from kit.data.fields import INDEX_NAME, Index, IndexedSample, Meta
from kit.data.writer import read_index


class Folder(Protocol):
    """Where shards lie: on this machine, or as `kit.data.remote.RemoteFolder`.

    Attributes:
        index: of the shards.
        max_open: shards that a process keeps open.
    """

    index: Index
    max_open: int

    @property
    def digest(self) -> str:
        """Identify all that the shards hold."""

    def open(self, file: str) -> int:
        """Give a descriptor of a shard, for reading."""


def digest_of(files: Iterable[BufferedIOBase]) -> str:
    """Hash what files hold, one behind the other."""
    digest = hashlib.sha256()
    for file in files:
        with file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class LocalFolder:
    """A folder on this machine.

    Args:
        path: holds `index.json` and the tar files it names.

    Raises:
        InputError: the folder holds no shards, or one is missing, cut or unfit.
    """

    max_open = 64

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = read_index(path)

    @property
    def digest(self) -> str:
        """Identify all that the shards hold; an index without a digest makes it read them."""
        index = self.path / INDEX_NAME
        files = [index]
        if not index.exists() or "digest" not in json.loads(index.read_bytes()):
            files = sorted({*self.path.glob("*.tar"), *self.path.glob(INDEX_NAME)})
        return digest_of(path.open("rb") for path in files)

    def open(self, file: str) -> int:
        """Give a descriptor of a shard, for reading."""
        return os.open(self.path / file, os.O_RDONLY)


class Shards:
    """A folder of shards as one long list of samples.

    Samples are read by position, not streamed, so that any order can be resumed at any place.

    Args:
        folder: of the shards; a path is one on this machine.

    Raises:
        InputError: the folder holds no shards, or one is missing, cut or unfit.
    """

    def __init__(self, folder: Path | Folder) -> None:
        self._folder = LocalFolder(folder) if isinstance(folder, Path) else folder
        index = self._folder.index
        self.kind = index["kind"]
        self.settings = index["settings"]
        self._entries = [(s["file"], sample) for s in index["shards"] for sample in s["samples"]]
        self._open: dict[tuple[int, str], int] = {}

    @property
    def digest(self) -> str:
        """Identify all that the shards hold."""
        return self._folder.digest

    def __len__(self) -> int:
        """Count the samples."""
        return len(self._entries)

    def key(self, number: int) -> str:
        """Name a sample."""
        return self._sample(number)["key"]

    def meta(self, number: int) -> Meta:
        """Give the facts about a sample, without reading its shard."""
        return self._sample(number)["meta"]

    def file(self, number: int) -> str:
        """Name the shard of a sample."""
        return self._entries[number][0]

    def by_shard(self) -> list[list[int]]:
        """List the samples of each shard."""
        groups: dict[str, list[int]] = {}
        for number, (file, _) in enumerate(self._entries):
            groups.setdefault(file, []).append(number)
        return list(groups.values())

    def members(self, number: int) -> list[str]:
        """List the extensions that a sample has."""
        return list(self._sample(number)["members"])

    def read(self, number: int, member: str) -> bytes:
        """Read one member of a sample."""
        file, sample = self._entries[number]
        offset, size = sample["members"][member]
        return os.pread(self._descriptor(file), size, offset)

    def _sample(self, number: int) -> IndexedSample:
        return self._entries[number][1]

    def _descriptor(self, file: str) -> int:
        # A forked loader worker must not share its parent's descriptors.
        place = (os.getpid(), file)
        descriptor = self._open.pop(place, None)
        if descriptor is None:
            while len(self._open) >= self._folder.max_open:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = self._folder.open(file)
        self._open[place] = descriptor
        return descriptor
