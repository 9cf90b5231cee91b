"""One video among several processes: each has some of its latent frames, and sees all of them.

Attention to text and picture is of each token alone, that to speech of each latent frame alone;
only self-attention needs what the others have, their keys and values.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_gather_tensor_autograd

from kit.models.attention import KeysValues


@dataclass(frozen=True)
class Processes:
    """The processes that share a video.

    Every process computes the same loss of the whole, so that gradients come out once for each of
    them; averaged over the processes, as sharding does, they are those of one process alone.

    Attributes:
        group: of the processes.
        rank: number of this one.
        world: how many there are.
    """

    group: ProcessGroup
    rank: int
    world: int

    def of_frames(self, x: Tensor, dim: int) -> Tensor:
        """Take this process's latent frames; no other has two more. [..., F, ...]"""
        return x.tensor_split(self.world, dim=dim)[self.rank]


@dataclass(frozen=True)
class Split:
    """A video's frames among the processes.

    Attributes:
        processes: who shares it.
        grid: frames, rows and columns of video tokens.
    """

    processes: Processes
    grid: tuple[int, int, int]

    def of_tokens(self, x: Tensor, dim: int) -> Tensor:
        """Take the tokens of this process's frames. [..., N, ...]"""
        by_frame = x.reshape(*x.shape[:dim], self.grid[0], -1, *x.shape[dim + 1 :])
        return self.processes.of_frames(by_frame, dim).flatten(dim, dim + 1)

    def join(self, x: Tensor) -> Tensor:
        """Put the tokens of all processes together. [B, n, ...] to [B, N, ...]"""
        world, (num_frames, rows, columns) = self.processes.world, self.grid
        frames = torch.arange(num_frames).tensor_split(world)
        counts = [len(some) * rows * columns for some in frames]
        first = x.movedim(1, 0)
        missing = max(counts) - len(first)
        padded = F.pad(first, (0, 0) * (first.ndim - 1) + (0, missing)).contiguous()
        gathered = all_gather_tensor_autograd(padded, 0, self.processes.group).chunk(world)
        each = [part[:count] for part, count in zip(gathered, counts, strict=True)]
        return torch.cat(each).movedim(0, 1)

    def join_keys_values(self, seen: KeysValues) -> KeysValues:
        """Put the keys and values of all processes together, in one exchange."""
        key, value = self.join(torch.cat([seen.key, seen.value], dim=-1)).chunk(2, dim=-1)
        return KeysValues(key, value)

    def extremes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Find the least and the greatest of what all processes found."""
        both = torch.stack([-low, high])
        distributed.all_reduce(both, distributed.ReduceOp.MAX, self.processes.group)
        return -both[0], both[1]


def divide_frames(processes: Processes | None, grid: tuple[int, int, int]) -> Split | None:
    """Divide a video, unless some would get nothing of it: a picture is everybody's."""
    if processes is None or grid[0] < processes.world:
        return None
    return Split(processes, grid)
