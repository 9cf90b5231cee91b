"""Shards behind an address: whole files, fetched once into a cache on this machine."""

import fcntl
import hashlib
import math
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from filelock import Timeout

from kit.data.claims import claim
from kit.data.connection import Connection, Patience, Refused
from kit.data.fields import ENCODED_FOLDER, INDEX_NAME
from kit.data.shards import digest_of
from kit.data.writer import parse_index

ABANDONED_SECONDS = 600.0
"""What nobody wrote to for so long has no owner any more."""


@dataclass(frozen=True)
class Cache:
    """Where fetched files lie, of all addresses.

    Attributes:
        folder: is made if need be.
        max_bytes: the files used longest ago make room for new ones, but none that is being read.
    """

    folder: Path
    max_bytes: float = math.inf

    def make_room(self, num_bytes: int) -> None:
        """Drop files until so many bytes fit in, as far as that can be done."""
        if math.isinf(self.max_bytes):
            return
        with claim(self.folder / "room"):
            # What others fetch meanwhile is taken to be as large as this one, and counted first:
            # it may be there a moment later.
            coming = sum(_is_young(path) for path in self.folder.glob("*/*.claim"))
            files = sorted(self._finished(), key=lambda facts: facts[1].st_mtime)
            total = sum(facts.st_size for _, facts in files) + num_bytes * coming
            for path, facts in files:
                if total > self.max_bytes and _drop(path):
                    total -= facts.st_size

    def _finished(self) -> list[tuple[Path, os.stat_result]]:
        """List fetched files, and halves that their owners left."""
        found = []
        for path in self.folder.glob("*/*"):
            is_coming = path.suffix in (".claim", ".partial") and _is_young(path)
            # Others come and go meanwhile.
            with suppress(FileNotFoundError):
                if not is_coming:
                    found.append((path, path.stat()))
        return found


class RemoteFolder:
    """A folder of shards behind an address; its files are read from a cache.

    Args:
        address: such as `s3://bucket/shards`.
        cache: shared by all processes of a machine.
        patience: with the connection.

    Raises:
        InputError: the address cannot be read, or holds no index that is fit.
    """

    max_open = 4
    """A file that a process has open cannot be dropped."""

    def __init__(self, address: str, cache: Cache, patience: Patience | None = None) -> None:
        self._connection = Connection(address.rstrip("/"), patience or Patience())
        self._cache = cache
        content = self._connection.read(INDEX_NAME)
        self.index = parse_index(content, f"{self}/{INDEX_NAME}")
        self.digest = digest_of([BytesIO(content)])
        # Other shards under the same address are other files.
        place = hashlib.sha256(f"{self} {self.digest}".encode()).hexdigest()
        self._place = cache.folder / place[:16]
        self.sizes = {shard["file"]: shard["bytes"] for shard in self.index["shards"]}

    def __str__(self) -> str:
        """Name the address."""
        return self._connection.address

    @property
    def max_bytes(self) -> float:
        """Tell how much the cache may hold."""
        return self._cache.max_bytes

    @property
    def num_bytes(self) -> int:
        """Tell the size of all shards."""
        return sum(self.sizes.values())

    def open(self, file: str) -> int:
        """Give a descriptor of a shard, fetched if need be; until it is closed nobody drops it."""
        while True:
            self.fetch(file)
            try:
                descriptor = os.open(self._place / file, os.O_RDONLY)
            except FileNotFoundError:  # dropped in between
                continue
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            return descriptor

    def fetch(self, file: str, *, waits: bool = True) -> None:
        """Bring a shard into the cache.

        Args:
            file: name of the shard.
            waits: for another process that fetches it already.

        Raises:
            InputError: it cannot be fetched, or has another size than the index says.
        """
        target = self._place / file
        if _touched(target):
            return
        self._place.mkdir(parents=True, exist_ok=True)
        try:
            with claim(target).acquire(timeout=-1 if waits else 0):
                if not target.exists():
                    self._cache.make_room(self.sizes[file])
                    self._fetch(file, target)
        except Timeout:
            return

    def _fetch(self, file: str, target: Path) -> None:
        partial = target.with_name(f"{file}.{os.getpid()}.partial")
        try:
            self._connection.fetch(file, partial, self.sizes[file])
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def find_shards(address: str, cache: Cache) -> RemoteFolder:
    """Open the shards of an address: encoded ones inside it, if there are any.

    Raises:
        InputError: see `RemoteFolder`.
    """
    try:
        return RemoteFolder(f"{address.rstrip('/')}/{ENCODED_FOLDER}", cache)
    except Refused:
        return RemoteFolder(address, cache)


def default_cache() -> Path:
    """Find the user's folder for what can be fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "charakit" / "shards"


def _touched(path: Path) -> bool:
    """Note that a file is used, if it is there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _is_young(path: Path) -> bool:
    """Whether somebody has written to a file, or renewed a claim, not long ago."""
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime < ABANDONED_SECONDS
    return False


def _drop(path: Path) -> bool:
    """Remove a file that is not in use."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
    return True
