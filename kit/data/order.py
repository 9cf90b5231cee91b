"""The order of samples: a pure function of (seed, epoch), for any number of processes."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from kit.draws import generator

Draw = tuple[int, int]
"""(epoch, sample number): names one use of one sample, and all random choices in it."""

Batches = list[list[int]]
_T = TypeVar("_T")


class Mixing(NamedTuple):
    """Which samples may stand near each other in an epoch.

    Attributes:
        shards: the samples of each shard.
        at_once: shards that are mixed at a time.
    """

    shards: Sequence[Sequence[int]]
    at_once: int


def epoch_batches(
    buckets: Sequence[Hashable],
    batch_size: int,
    seed: int,
    epoch: int,
    mixing: Mixing | None = None,
) -> Batches:
    """Shuffle samples into batches of one bucket each; every sample occurs exactly once.

    Args:
        buckets: each sample's bucket.
        batch_size: samples in a batch; the last one of a bucket may be smaller.
        seed: of the run.
        epoch: passes over the data before this one.
        mixing: shards are shuffled, and their samples only with those of shards next to them. What
            fills no batch there goes on to the next ones, so all epochs have equally many batches.
    """
    random = generator(seed, epoch, "order")
    waiting: dict[Hashable, list[int]] = defaultdict(list)
    batches: Batches = []
    parts = _parts(len(buckets), mixing, random)
    for number, part in enumerate(parts, start=1):
        for sample in _shuffled(part, random):
            waiting[buckets[sample]].append(sample)
        ready = _take_batches(waiting, batch_size, is_last=number == len(parts))
        batches += _shuffled(ready, random)
    return batches


class Order:
    """The run's endless row of batches, of which process `rank` takes every `world`-th.

    Args:
        buckets: each sample's bucket.
        batch_size: samples in a batch.
        seed: of the run.
        mixing: see `epoch_batches`.
    """

    def __init__(
        self,
        buckets: Sequence[Hashable],
        batch_size: int,
        seed: int,
        mixing: Mixing | None = None,
    ) -> None:
        self.buckets = buckets
        self.batch_size = batch_size
        self.seed = seed
        self.mixing = mixing
        self.batches_per_epoch = len(self._epoch(0))

    def batches(self, start: int, stop: int, rank: int, world: int) -> Iterator[list[Draw]]:
        """Yield the batches number start to stop - 1 of one process."""
        epoch, shuffled = -1, Batches()
        for number in range(start, stop):
            wanted, place = divmod(number * world + rank, self.batches_per_epoch)
            if wanted != epoch:
                epoch = wanted
                shuffled = self._epoch(epoch)
            yield [(epoch, sample) for sample in shuffled[place]]

    def _epoch(self, epoch: int) -> Batches:
        return epoch_batches(self.buckets, self.batch_size, self.seed, epoch, self.mixing)


def _parts(num_samples: int, mixing: Mixing | None, random: torch.Generator) -> list[Sequence[int]]:
    """List the samples that are shuffled together, part by part."""
    if mixing is None or mixing.at_once >= len(mixing.shards):
        return [range(num_samples)]
    shards = _shuffled(mixing.shards, random)
    return [
        [sample for shard in shards[start : start + mixing.at_once] for sample in shard]
        for start in range(0, len(shards), mixing.at_once)
    ]


def _shuffled(items: Sequence[_T], random: torch.Generator) -> list[_T]:
    return [items[place] for place in torch.randperm(len(items), generator=random).tolist()]


def _take_batches(
    waiting: Mapping[Hashable, list[int]], batch_size: int, *, is_last: bool
) -> Batches:
    """Take whole batches out of what waits in each bucket, at the end also smaller ones."""
    taken: Batches = []
    for samples in waiting.values():
        stop = len(samples) - (0 if is_last else len(samples) % batch_size)
        taken += [samples[start : start + batch_size] for start in range(0, stop, batch_size)]
        del samples[:stop]
    return taken
