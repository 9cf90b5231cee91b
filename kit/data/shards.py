"""Random access to samples in tar shards, by the offsets of their index."""

import os
from pathlib import Path

from kit.data.fields import IndexedSample, Meta
from kit.data.writer import read_index


class Shards:
    """A folder of shards as one long list of samples.

    Samples are read by position, not streamed, so that any order can be resumed at any place.

    Args:
        folder: holds `index.json` and the tar files it names.

    Raises:
        InputError: the folder holds no shards, or one is missing, cut or unfit.
    """

    def __init__(self, folder: Path) -> None:
        index = read_index(folder)
        self.folder = folder
        self.kind = index["kind"]
        self.settings = index["settings"]
        self._entries = [(s["file"], sample) for s in index["shards"] for sample in s["samples"]]
        self._open: dict[tuple[int, str], int] = {}

    def __len__(self) -> int:
        """Count the samples."""
        return len(self._entries)

    def key(self, number: int) -> str:
        """Name a sample."""
        return self._sample(number)["key"]

    def meta(self, number: int) -> Meta:
        """Give the facts about a sample, without reading its shard."""
        return self._sample(number)["meta"]

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
        if place not in self._open:
            self._open[place] = os.open(self.folder / file, os.O_RDONLY)
        return self._open[place]
