"""Fetching shards before they are read, in a thread beside the reading."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

from kit.data.order import Draw
from kit.data.remote import RemoteFolder
from kit.data.shards import Shards
from kit.errors import InputError

POLL_SECONDS = 0.2


class Prefetching:
    """Fetches the shards of the next batches, as many as half of the cache can hold.

    The other half keeps what is read meanwhile, so nothing is dropped before its turn.

    Args:
        folder: where the shards lie.
        shards: of that folder.
    """

    def __init__(self, folder: RemoteFolder, shards: Shards) -> None:
        self._folder = folder
        self._shards = shards

    @contextmanager
    def beside(
        self, batches: Iterator[tuple[int, list[Draw]]], handed_out: Callable[[], int]
    ) -> Iterator[None]:
        """Fetch while a block runs.

        Args:
            batches: those that will be read, with their numbers.
            handed_out: tells the number of the next one.
        """
        stop = Event()
        Thread(target=self._run, args=(batches, handed_out, stop), daemon=True).start()
        try:
            yield
        finally:
            stop.set()

    def _run(
        self,
        batches: Iterator[tuple[int, list[Draw]]],
        handed_out: Callable[[], int],
        stop: Event,
    ) -> None:
        last_use: dict[str, int] = {}
        for number, draws in batches:
            for file in dict.fromkeys(self._shards.file(sample) for _, sample in draws):
                while file not in last_use and not self._fits(last_use, file):
                    if stop.wait(POLL_SECONDS):
                        return
                    done = handed_out()
                    last_use = {name: last for name, last in last_use.items() if last >= done}
                if file not in last_use and not self._fetch(file):
                    return
                last_use[file] = number
            if stop.is_set() or len(last_use) == len(self._folder.sizes):
                return

    def _fits(self, held: dict[str, int], file: str) -> bool:
        num_bytes = sum(self._folder.sizes[name] for name in held) + self._folder.sizes[file]
        return not held or num_bytes <= self._folder.max_bytes / 2

    def _fetch(self, file: str) -> bool:
        try:
            self._folder.fetch(file, waits=False)
        except (InputError, OSError):
            # Who reads the shard meets the same failure, and says so.
            return False
        return True
