"""A loader that goes on where it stopped, whatever the number of its workers."""

import signal
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset

from kit.data.order import Draw, Order


class Clips(Protocol):
    """Gives one sample for each draw."""

    def __getitem__(self, draw: Draw) -> Any:
        """Read the sample that a draw names."""


class _Draws(Dataset[Any]):
    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __getitem__(self, draw: Draw) -> Any:
        return self.clips[draw]


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
    ) -> None:
        self.dataset = _Draws(clips)
        self.order = order
        self.num_batches = num_batches
        self.rank = rank
        self.world = world
        self.num_workers = num_workers
        self.collate = collate
        self.handed_out = 0

    def __len__(self) -> int:
        """Count the batches of the whole run, and one that nobody asks for.

        A checkpoint behind the last batch of a loader says that the epoch is over, and a run with
        more steps could not go on from it.
        """
        return self.num_batches + 1

    def __iter__(self) -> Iterator[Any]:
        """Hand out the batches that are left."""
        order = self.order.batches(self.handed_out, self.num_batches, self.rank, self.world)
        loader = DataLoader(
            self.dataset,
            batch_sampler=order,
            num_workers=self.num_workers,
            collate_fn=self.collate,
            worker_init_fn=_leave_signals_to_parent,
        )
        for batch in loader:
            self.handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Save how far all processes together have come."""
        return {"batches": self.handed_out * self.world}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the batches of a saved state, also with another number of processes."""
        self.handed_out = state["batches"] // self.world


def _leave_signals_to_parent(worker: int) -> None:
    """Let the main process finish its step when a whole process group is asked to stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
