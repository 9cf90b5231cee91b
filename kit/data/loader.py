"""A loader that goes on where it stopped, whatever the number of its workers."""

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset

from kit.data.order import Draw, Order
from kit.data.prefetch import Prefetching
from kit.errors import InputError


class Clips(Protocol):
    """Gives one sample for each draw."""

    def __getitem__(self, draw: Draw) -> Any:
        """Read the sample that a draw names."""


class _Draws(Dataset[Any]):
    """Gives an error in place of a sample.

    One that crosses processes on its own has its whole traceback for a message.
    """

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __getitem__(self, draw: Draw) -> Any:
        try:
            return self.clips[draw]
        except InputError as error:
            return error


class ResumableLoader:
    """All batches of a run in order; its state is the number of batches handed out.

    Lightning fetches one batch ahead of the step unless the loader has a length, and would then
    save a state that is one batch too far: so this one has a length.

    Args:
        clips: gives one sample for each draw.
        order: of the batches.
        num_batches: batches of the whole run, of this process.
        rank: number of this process.
        world: number of processes.
        num_workers: loader processes; 0 reads in this one.
        collate: turns a list of samples into what the training step gets.
        prefetching: works beside the reading, if the samples lie elsewhere.
    """

    def __init__(
        self,
        clips: Clips,
        order: Order,
        num_batches: int,
        rank: int,
        world: int,
        num_workers: int,
        collate: Callable[[list[Any]], Any],
        prefetching: Prefetching | None = None,
    ) -> None:
        self.dataset = clips
        self.order = order
        self.num_batches = num_batches
        self.rank = rank
        self.world = world
        self.num_workers = num_workers
        self.collate = collate
        self.prefetching = prefetching
        self.handed_out = 0

    def __len__(self) -> int:
        """Count the batches of the whole run, and one that nobody asks for.

        A checkpoint behind the last batch of a loader says that the epoch is over, and a run with
        more steps could not go on from it.
        """
        return self.num_batches + 1

    def __iter__(self) -> Iterator[Any]:
        """Hand out the batches that are left.

        Raises:
            InputError: a sample cannot be read.
        """
        loader = DataLoader(
            _Draws(self.dataset),
            batch_sampler=self._order_left(),
            num_workers=self.num_workers,
            collate_fn=partial(_collate, self.collate),
            worker_init_fn=_leave_signals_to_parent,
        )
        # Workers are forked before a thread begins.
        batches = iter(loader)
        try:
            with self._prefetching():
                for batch in batches:
                    if isinstance(batch, InputError):
                        raise batch
                    self.handed_out += 1
                    yield batch
        finally:
            # Its workers end with it, and an error may hold this frame for long.
            del batches

    def state_dict(self) -> dict[str, int]:
        """Save how far all processes together have come."""
        return {"batches": self.handed_out * self.world}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the batches of a saved state, also with another number of processes."""
        self.handed_out = state["batches"] // self.world

    def _order_left(self) -> Iterator[list[Draw]]:
        return self.order.batches(self.handed_out, self.num_batches, self.rank, self.world)

    def _prefetching(self) -> AbstractContextManager[None]:
        if self.prefetching is None:
            return nullcontext()
        numbered = enumerate(self._order_left(), start=self.handed_out)
        return self.prefetching.beside(numbered, lambda: self.handed_out)


def _collate(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    errors = (sample for sample in samples if isinstance(sample, InputError))
    return next(errors, None) or collate(samples)


def _leave_signals_to_parent(worker: int) -> None:
    """Let the main process finish its step when a whole process group is asked to stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
