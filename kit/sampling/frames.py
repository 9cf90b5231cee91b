"""Between pictures as files hold them and pixels as the encoders see them."""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kit.data.buckets import fit
from kit.data.encode import to_video
from kit.data.media import iter_frames
from kit.sampling.scene import Source


def to_pixels(picture: np.ndarray) -> Tensor:
    """Turn 0 to 255, uint8 [height, width, 3], into -1 to 1, float32 [3, height, width]."""
    return to_video(picture[None])[:, 0]


def to_pictures(pixels: Tensor) -> np.ndarray:
    """Turn -1 to 1, [T, 3, height, width], into 0 to 255, uint8 [T, height, width, 3]."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round()
    return levels.to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()


class StillSource:
    """A portrait: the same reference for every chunk.

    Args:
        picture: 0 to 255, any size. uint8 [h, w, 3]
        size: height and width of the video.
    """

    def __init__(self, picture: np.ndarray, size: tuple[int, int]) -> None:
        self._pixels = to_pixels(fit(picture, *size))

    def frame(self, index: int) -> Tensor:
        """Give the portrait, -1 to 1. [3, height, width]."""
        return self._pixels

    def again(self) -> "StillSource":
        """Give the same, which has no beginning."""
        return self


class VideoSource:
    """A source video, read forward once; only one frame is held.

    Args:
        path: video file.
        size: height and width of the video to make.
        fps: of the video to make.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: int) -> None:
        self._frames: Iterator[np.ndarray] = iter_frames(path, fps)
        self._path, self._size, self._fps = path, size, fps
        self._next = 0
        self._picture = np.zeros((0, 0, 3), np.uint8)

    def frame(self, index: int) -> Tensor:
        """Give the frame at that time, -1 to 1; the last one behind the end. [3, height, width]."""
        while self._next <= index:
            picture = next(self._frames, None)
            if picture is None:
                break
            self._picture, self._next = picture, self._next + 1
        return to_pixels(fit(self._picture, *self._size))

    def again(self) -> "VideoSource":
        """Open the video anew."""
        return VideoSource(self._path, self._size, self._fps)


class Clips:
    """Windows of a source, each beginning behind the one before, perhaps within it.

    Args:
        source: asked for each frame once.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._held: deque[Tensor] = deque()
        self._first = 0

    def window(self, start: int, num_frames: int) -> Tensor:
        """Give frames from `start` on, -1 to 1. [3, num_frames, height, width]"""
        while self._held and self._first < start:
            self._held.popleft()
            self._first += 1
        if not self._held:
            self._first = start
        for index in range(self._first + len(self._held), start + num_frames):
            self._held.append(self._source.frame(index))
        return torch.stack([*islice(self._held, num_frames)], dim=1)
