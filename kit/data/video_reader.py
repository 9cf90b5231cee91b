"""Reading pictures: video on a constant-rate grid, chosen frames of a shard's clip, stills."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image, ImageOps

from kit.data.container import count_frames, open_media, video_stream
from kit.errors import InputError

KEYFRAME_INTERVAL = 25
"""Frames between two entry points of a clip in a shard."""

_UNSPECIFIED = 2


def iter_frames(path: Path, fps: float) -> Iterator[NDArray[np.uint8]]:
    """Give the frame that is visible at each time k / fps, counted from the first frame.

    Frames may be unevenly spaced. Memory does not grow with the video's length.

    Yields:
        RGB, upright. [H, W, 3]

    Raises:
        InputError: the file is missing, empty, damaged or holds no video.
    """
    number, end = 0, Fraction(0)
    shown: VideoFrame | None = None
    for frame, start, stop in _timed_frames(path):
        if shown is not None:
            due = count_frames(start, fps)
            yield from _held(shown, due - number)
            number = max(number, due)
        shown, end = frame, stop
    if shown is None:
        raise InputError(f"{path} cannot be read: no frame of it can be decoded")
    yield from _held(shown, count_frames(end, fps) - number)


def read_frames(source: Path | bytes, indices: Sequence[int]) -> NDArray[np.uint8]:
    """Read frames of a clip written by `encode_clip`, by frame number, in the order asked for.

    Returns:
        RGB. [N, H, W, 3]

    Raises:
        InputError: the clip is damaged or has no such frame.
    """
    found: dict[int, NDArray[np.uint8]] = {}
    with open_media(source) as container:
        stream = video_stream(container, source)
        rate, unit = stream.average_rate or Fraction(25), stream.time_base or Fraction(1, 1000)
        for run in _runs(sorted(set(indices))):
            container.seek(int(run[0] / rate / unit), stream=stream)
            for frame in container.decode(stream):
                number = round((frame.pts or 0) * unit * rate)
                if number in run:
                    found[number] = _upright(frame)
                if number >= run[-1]:
                    break
    missing = sorted(set(indices) - set(found))
    if missing:
        raise InputError(f"the clip has no frame {missing[0]}")
    return np.stack([found[index] for index in indices])


def load_image(path: Path) -> NDArray[np.uint8]:
    """Load a still picture, upright; what is transparent becomes white.

    Returns:
        RGB. [H, W, 3]

    Raises:
        InputError: the file is missing, empty, damaged or no picture.
    """
    with open_image(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            layer = upright.convert("RGBA")
            paper = Image.new("RGBA", layer.size, "white")
            upright = Image.alpha_composite(paper, layer)
        return np.array(upright.convert("RGB"))


def open_image(path: Path) -> Image.Image:
    """Open a picture with its pixels loaded.

    Raises:
        InputError: the file is missing, empty, damaged or no picture.
    """
    try:
        with path.open("rb") as file:
            image = Image.open(file)
            image.load()
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} cannot be read: it has too many pixels") from error
    # A damaged PNG raises SyntaxError, which means the same to the user as the others.
    except (OSError, ValueError, SyntaxError) as error:
        empty = path.is_file() and path.stat().st_size == 0
        missing = "there is no such file" if not path.exists() else "it is damaged or no picture"
        reason = "it is empty" if empty else missing
        raise InputError(f"{path} cannot be read: {reason}") from error
    return image


def _timed_frames(path: Path) -> Iterator[tuple[VideoFrame, Fraction, Fraction]]:
    """Give each frame with its start and end, in seconds after the first frame's start."""
    with open_media(path) as container:
        stream = video_stream(container, path)
        unit = stream.time_base or Fraction(1, 1000)
        usual = 1 / (stream.average_rate or Fraction(25))
        origin, end = None, Fraction(0)
        # AVI stores no display times, and those made up for it are out of order.
        is_avi = container.format.name == "avi"
        for frame in container.decode(stream):
            stamp = frame.dts if is_avi else frame.pts
            # A frame without a time follows where the one before it ended.
            time = stamp * unit if stamp is not None else end + (origin or 0)
            origin = time if origin is None else origin
            start = max(time - origin, Fraction(0))
            end = start + (frame.duration * unit if frame.duration else usual)
            yield frame, start, end


def _held(frame: VideoFrame, count: int) -> Iterator[NDArray[np.uint8]]:
    if count > 0:
        picture = _upright(frame)
        yield from (picture for _ in range(count))


def _upright(frame: VideoFrame) -> NDArray[np.uint8]:
    matrix = None
    if frame.colorspace == _UNSPECIFIED:
        matrix = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
    picture = frame.to_ndarray(
        format="rgb24", src_colorspace=matrix, dst_color_range=ColorRange.JPEG
    )
    # The display matrix counts counterclockwise, as rot90 does.
    turned = np.rot90(picture, k=round(frame.rotation / 90) % 4)
    return np.ascontiguousarray(turned, dtype=np.uint8)


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number - runs[-1][-1] <= 2 * KEYFRAME_INTERVAL:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs
