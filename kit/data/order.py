"""The order of samples: a pure function of (seed, epoch), for any number of processes."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import torch

from kit.draws import generator

Draw = tuple[int, int]
"""(epoch, sample number): names one use of one sample, and all random choices in it."""


def epoch_batches(
    buckets: Sequence[Hashable], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """Shuffle samples into batches of one bucket each; every sample occurs exactly once.

    Args:
        buckets: each sample's bucket.
        batch_size: samples in a batch; the last one of a bucket may be smaller.
        seed: of the run.
        epoch: passes over the data before this one.
    """
    random = generator(seed, epoch, "order")
    members: dict[Hashable, list[int]] = defaultdict(list)
    for number in torch.randperm(len(buckets), generator=random).tolist():
        members[buckets[number]].append(number)
    batches = [
        numbers[start : start + batch_size]
        for numbers in members.values()
        for start in range(0, len(numbers), batch_size)
    ]
    return [batches[i] for i in torch.randperm(len(batches), generator=random).tolist()]


class Order:
    """The run's endless row of batches, of which process `rank` takes every `world`-th.

    Args:
        buckets: each sample's bucket.
        batch_size: samples in a batch.
        seed: of the run.
    """

    def __init__(self, buckets: Sequence[Hashable], batch_size: int, seed: int) -> None:
        self.buckets = buckets
        self.batch_size = batch_size
        self.seed = seed
        self.batches_per_epoch = len(epoch_batches(buckets, batch_size, seed, epoch=0))

    def batches(self, start: int, stop: int, rank: int, world: int) -> Iterator[list[Draw]]:
        """Yield the batches number start to stop - 1 of one process."""
        epoch, shuffled = -1, list[list[int]]()
        for number in range(start, stop):
            wanted, place = divmod(number * world + rank, self.batches_per_epoch)
            if wanted != epoch:
                epoch = wanted
                shuffled = epoch_batches(self.buckets, self.batch_size, self.seed, epoch)
            yield [(epoch, sample) for sample in shuffled[place]]
