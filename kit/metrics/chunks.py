"""Cutting a row of frames where a sampler's chunks begin."""

from collections.abc import Sequence

from torch import Tensor


def split_chunks(frames: Tensor, chunk_starts: Sequence[int]) -> tuple[Tensor, ...]:
    """Cut frames into chunks.

    Args:
        frames: one entry for each frame. [T, ...]
        chunk_starts: first frame of each chunk, rising, the first 0.
    """
    return frames.tensor_split(list(chunk_starts[1:]))
