"""FreeNoise: all chunks begin with the noise of the first one, its frames rearranged.

Noise decides much of how a video looks and moves. Chunks that begin with the same frames of noise,
in another order, look and move more alike. Frames that two chunks share have the same noise; each
new frame has that of a frame at the beginning of the chunk before, neighbours having changed
places, so that movement does not repeat.

    plugins: {free_noise: {shuffle: 4}}

Source: Qiu et al. 2023, arXiv 2310.15169, noise rescheduling. Its windows overlap while they are
denoised; ours are chunks, one behind another.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kit.draws import draw_normal, generator
from kit.sampling.plugin import At, Plugin, Run


class FreeNoise(Plugin):
    """Rearranges the noise of the first chunk, by the seed of the run.

    Args:
        shuffle: latent frames that change places among each other, as in the paper 4; 1 repeats
            the noise as it is.
    """

    def __init__(self, *, shuffle: Annotated[int, Field(ge=1)] = 4) -> None:
        self.shuffle = shuffle

    def open(self, run: Run) -> None:
        """Know the seed."""
        self._seed = run.seed

    def noise(self, noise: Tensor, at: At) -> Tensor:
        """Take the first chunk's noise in the order of this one."""
        chunk, num_latent_frames = at.chunk, noise.shape[2]
        if chunk.index == 0:
            return noise
        first = draw_normal(tuple(noise.shape), self._seed, 0, "noise").to(noise)
        stride = (chunk.num_frames - 1) // (num_latent_frames - 1)
        num_new = num_latent_frames - 1 - (chunk.num_context - 1) // stride
        order = torch.arange(num_latent_frames)
        for index in range(1, chunk.index + 1):
            order = torch.cat([order[num_new:], self._shuffled(order[:num_new], index)])
        return first[:, :, order.to(noise.device)]

    def _shuffled(self, frames: Tensor, chunk: int) -> Tensor:
        """Let neighbours change places. [frames]"""
        random = generator(self._seed, chunk, "free_noise")
        groups = torch.split(frames, self.shuffle)
        return torch.cat([g[torch.randperm(len(g), generator=random)] for g in groups])


plugin = FreeNoise
