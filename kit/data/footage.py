"""A source's moving picture on the kit's frame grid, whatever it is stored as."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kit.data.container import count_frames, probe
from kit.data.media import iter_frames, load_image
from kit.data.sources import Source
from kit.errors import InputError

Frames = Iterator[NDArray[np.uint8]]


@dataclass(frozen=True)
class Footage:
    """What can be filmed off a source.

    Attributes:
        num_frames: frames on the grid.
        has_sound: whether the file itself has a sound track.
        play: starts the frames from the beginning, RGB. [H, W, 3] each
    """

    height: int
    width: int
    num_frames: int
    has_sound: bool
    play: Callable[[], Frames]


def open_footage(source: Source, *, fps: int, sequence_fps: float) -> Footage:
    """Measure a video or a sequence of pictures.

    Args:
        source: no still.
        fps: rate of the grid.
        sequence_fps: rate at which a sequence of pictures was drawn or filmed.

    Raises:
        InputError: it cannot be read, or is one frame long.
    """
    if source.kind == "sequence":
        return _open_sequence(source, fps, sequence_fps)
    info = probe(source.path)
    if info.num_frames == 1:
        raise InputError(f"{source.path} is one frame long; save it as an image")
    return Footage(
        info.height,
        info.width,
        info.count_frames(fps),
        info.has_sound,
        lambda: iter_frames(source.path, fps),
    )


def _open_sequence(source: Source, fps: int, sequence_fps: float) -> Footage:
    height, width = load_image(source.pictures[0]).shape[:2]
    num_frames = count_frames(Fraction(len(source.pictures)) / Fraction(sequence_fps), fps)

    def play() -> Frames:
        shown, picture = -1, np.zeros(0, np.uint8)
        for number in range(num_frames):
            wanted = int(number / Fraction(fps) * Fraction(sequence_fps))
            if wanted != shown:
                shown, picture = wanted, _load_like(source.pictures[wanted], height, width)
            yield picture

    return Footage(height, width, num_frames, False, play)


def _load_like(path: Path, height: int, width: int) -> NDArray[np.uint8]:
    picture = load_image(path)
    if picture.shape[:2] != (height, width):
        raise InputError(
            f"{path} is {picture.shape[1]}x{picture.shape[0]} pixels, "
            f"but its sequence began with {width}x{height}"
        )
    return picture
