"""A video of any length as a row of chunks that share their border frames.

A chunk is one window of the denoiser. Its first frames repeat the end of the chunk before it: they
are given clean and not shown again.
"""

from dataclasses import dataclass

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


def speech_frames_needed(chunks: list[Chunk]) -> int:
    """Count the speech frames that the chunks look at."""
    return chunks[-1].start + chunks[-1].num_frames + LOOK_AHEAD_FRAMES
