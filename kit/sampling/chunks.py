"""A video of any length as a row of chunks that share their border frames.

A chunk is one window of the denoiser. Its first frames repeat the end of the chunk before it: they
are given clean and not shown again.
"""

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


@dataclass(frozen=True)
class Progress:
    """How far a video is, and what the next chunk needs of those before it.

    Attributes:
        next_chunk: number of the chunk to make next.
        tail: the last frames, which become its context. [3, context_frames, height, width]
        waiting: frames of which the next chunk shows its own decoding too. [3, T, height, width]
    """

    next_chunk: int
    tail: Tensor
    waiting: Tensor


def show(
    chunk: Chunk, pixels: Tensor, waiting: Tensor | None, crossfade_frames: int
) -> tuple[Tensor, Tensor]:
    """Cut the frames to show out of a chunk's window.

    Args:
        chunk: which one.
        pixels: its window. [3, num_frames, height, width]
        waiting: what the chunk before left; None in the first.
        crossfade_frames: last shared frames, which turn from one window's into the next one's:
            the same frames decoded twice differ a little, and one behind the other it is seen.

    Returns:
        Frames that no later chunk changes, and those that wait for it. [3, T, height, width] each
    """
    num_waiting = 0 if waiting is None else waiting.shape[1]
    shown = pixels[:, chunk.num_context - num_waiting : chunk.num_context + chunk.num_shown]
    if waiting is not None:
        own, new = shown[:, :num_waiting], shown[:, num_waiting:]
        shown = torch.cat([crossfade(waiting, own), new], dim=1)
    settled = max(shown.shape[1] - crossfade_frames, 0)
    return shown[:, :settled], shown[:, settled:]


def crossfade(before: Tensor, after: Tensor) -> Tensor:
    """Turn from one into the other, frame by frame. [3, T, height, width]"""
    num_frames = before.shape[1]
    share = torch.arange(1, num_frames + 1, device=after.device) / (num_frames + 1)
    return torch.lerp(before.to(after), after, share.to(after)[:, None, None])


def speech_frames_needed(chunks: list[Chunk]) -> int:
    """Count the speech frames that the chunks look at."""
    return chunks[-1].start + chunks[-1].num_frames + LOOK_AHEAD_FRAMES
