"""Between pictures as files hold them and pixels as the encoders see them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kit.data.buckets import fit
from kit.data.encode import to_video
from kit.data.media import iter_frames


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


class VideoSource:
    """A source video, read forward once; only one frame is held.

    Args:
        path: video file.
        size: height and width of the video to make.
        fps: of the video to make.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: int) -> None:
        self._frames: Iterator[np.ndarray] = iter_frames(path, fps)
        self._size = size
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
