"""How a chunk goes on from what is there: which pictures it is given."""

from typing import NamedTuple

from torch import Tensor

from kit.sampling.chunks import Chunk
from kit.sampling.scene import Source


class Ends(NamedTuple):
    """The pictures that a chunk is given: its reference, and its last frame or None."""

    first: Tensor
    last: Tensor | None = None


def follow_source(source: Source, chunk: Chunk, tail: Tensor | None) -> Ends:
    """Take the source's frame at the chunk's start.

    Source: InfiniteTalk, sparse-frame dubbing.
    """
    return Ends(source.frame(chunk.start))


def follow_last_frame(source: Source, chunk: Chunk, tail: Tensor | None) -> Ends:
    """Take the last frame that was made, as image-to-video chained after itself.

    Source: the I2V baseline of InfiniteTalk's paper; colours and faces drift by design.
    """
    return Ends(source.frame(chunk.start) if tail is None else tail[:, -1])


def meet_source(source: Source, chunk: Chunk, tail: Tensor | None) -> Ends:
    """Go from the last frame that was made to the source's frame at the chunk's end.

    Source: the FL2V baseline of InfiniteTalk's paper; poses of the source are copied by design.
    """
    first, _ = follow_last_frame(source, chunk, tail)
    return Ends(first, source.frame(chunk.start + chunk.num_frames - 1))


CONTINUITIES = {
    "source": follow_source,
    "last_frame": follow_last_frame,
    "both_ends": meet_source,
}
"""What the reference of a chunk is."""
