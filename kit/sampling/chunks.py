"""A video of any length as a row of chunks that share their border frames.

A chunk is one window of the denoiser. Its first frames repeat the end of the chunk before it: they
are given clean and not shown again.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LOOK_AHEAD_FRAMES = 3
"""Speech frames wanted behind the last chunk: two for its last window, one to spare."""


@dataclass(frozen=True)
class Chunk:
    """One window of the video.

    Attributes:
        index: number in the row.
        start: its first frame in the video.
        num_frames: frames in the window.
        num_context: leading frames that the chunk before has shown already; 0 in the first.
        num_shown: frames that it adds to the video; fewer in the last chunk.
    """

    index: int
    start: int
    num_frames: int
    num_context: int
    num_shown: int

    @property
    def first_shown(self) -> int:
        """The first frame that it adds to the video."""
        return self.start + self.num_context


def plan_chunks(total_frames: int, num_frames: int, context_frames: int) -> list[Chunk]:
    """Cover a video with chunks; the last one may reach beyond its end.

    Args:
        total_frames: frames of the video, at least 1.
        num_frames: frames in a chunk, 4n + 1.
        context_frames: frames that a chunk repeats, 4n + 1, fewer than num_frames.

    Source: InfiniteTalk: 81 frames, 9 repeated, so 72 new ones for each further chunk.
    """
    chunks: list[Chunk] = []
    shown = 0
    while shown < total_frames:
        context = context_frames if chunks else 0
        new = min(num_frames - context, total_frames - shown)
        chunks.append(Chunk(len(chunks), shown - context, num_frames, context, new))
        shown += new
    return chunks


def join_chunks(windows: Iterable[tuple[Chunk, Tensor]], crossfade_frames: int) -> Iterator[Tensor]:
    """Cut the frames to show out of windows; yields what no later window changes.

    Args:
        windows: each chunk with its pixels. [3, num_frames, height, width]
        crossfade_frames: last shared frames, which turn from one window's into the next one's:
            the same frames decoded twice differ a little, and one behind the other it is seen.

    Yields:
        Pixels. [3, T, height, width]
    """
    waiting: Tensor | None = None
    for chunk, pixels in windows:
        num_waiting = 0 if waiting is None else waiting.shape[1]
        shown = pixels[:, chunk.num_context - num_waiting : chunk.num_context + chunk.num_shown]
        if waiting is not None:
            own, new = shown[:, :num_waiting], shown[:, num_waiting:]
            shown = torch.cat([crossfade(waiting, own), new], dim=1)
        settled = max(shown.shape[1] - crossfade_frames, 0)
        # A copy, so that the window itself can go.
        waiting = shown[:, settled:].clone()
        if settled:
            yield shown[:, :settled]
    if waiting is not None and waiting.shape[1]:
        yield waiting


def crossfade(before: Tensor, after: Tensor) -> Tensor:
    """Turn from one into the other, frame by frame. [3, T, height, width]"""
    num_frames = before.shape[1]
    share = torch.arange(1, num_frames + 1, device=after.device) / (num_frames + 1)
    return torch.lerp(before.to(after), after, share.to(after)[:, None, None])


def speech_frames_needed(chunks: list[Chunk]) -> int:
    """Count the speech frames that the chunks look at."""
    return chunks[-1].start + chunks[-1].num_frames + LOOK_AHEAD_FRAMES
