"""Opening media files, so that what is wrong with one is said in plain words."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from math import ceil
from pathlib import Path

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from kit.errors import InputError

TIME_TOLERANCE = Fraction(1, 1000)
"""Containers such as Matroska round times to milliseconds."""


FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2",
    "matroska,webm",
    "avi",
    "gif",
    "wav",
    "flac",
    "mp3",
    "ogg",
    "aac",
    "aiff",
)
"""Containers that are opened, by FFmpeg's names."""


@dataclass(frozen=True)
class MediaInfo:
    """What a video shows, upright and in its own timing.

    Attributes:
        fps: mean frames per second; frames need not be evenly spaced.
        seconds: from the first frame's start to the last frame's end.
        num_frames: frames in the file, whatever their spacing.
    """

    width: int
    height: int
    fps: float
    seconds: float
    has_sound: bool
    num_frames: int

    def count_frames(self, fps: float) -> int:
        """Count the frames that `iter_frames` gives at this rate, at least 1."""
        return count_frames(Fraction(self.seconds), fps)


def probe(path: Path) -> MediaInfo:
    """Measure a video by reading its packets and decoding its first frame.

    Headers are not trusted: a file that was cut short is as long as what is left of it.

    Raises:
        InputError: the file is missing, empty, damaged or holds no video.
    """
    with open_media(path) as container:
        frame = next(container.decode(video_stream(container, path)), None)
        if frame is None:
            raise InputError(f"{path} cannot be read: no frame of it can be decoded")
        width, height = frame.width, frame.height
        if frame.rotation % 180:
            width, height = height, width
    with open_media(path) as container:
        stream = video_stream(container, path)
        seconds, num_frames = _measure(container, stream)
        has_sound = bool(container.streams.audio)
    fps = float(num_frames / seconds)
    return MediaInfo(width, height, fps, float(seconds), has_sound, num_frames)


def count_frames(seconds: Fraction, fps: float) -> int:
    """Count the points of a constant-rate grid that lie before a time, at least 1."""
    return max(1, ceil((seconds - TIME_TOLERANCE) * exact_rate(fps)))


def exact_rate(fps: float) -> Fraction:
    """Turn 29.97 and the like into the fraction that they stand for."""
    return Fraction(fps).limit_denominator(1001)


@contextmanager
def open_media(source: Path | bytes) -> Iterator[InputContainer]:
    """Open a file or its bytes for reading; whatever fails inside the block becomes InputError."""
    # Only plain files of real media: a playlist in disguise would open files that it names.
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(FORMATS)}
    name = "bytes in memory" if isinstance(source, bytes) else str(source)
    # The full path keeps a colon in a relative name from being taken for a protocol.
    place = BytesIO(source) if isinstance(source, bytes) else str(source.absolute())
    try:
        with av.open(place, "r", metadata_errors="replace", options=options) as container:
            yield container
    except av.error.FFmpegError as error:
        raise InputError(f"{name} cannot be read: {_reason(source, error)}") from error


def video_stream(container: InputContainer, source: Path | bytes) -> VideoStream:
    """Find the moving picture; the cover picture of a song is none."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            stream.thread_type = "AUTO"
            return stream
    name = "bytes in memory" if isinstance(source, bytes) else str(source)
    raise InputError(f"{name} has no video")


def _measure(container: InputContainer, stream: VideoStream) -> tuple[Fraction, int]:
    starts, ends = [], []
    unit = stream.time_base or Fraction(1, 1000)
    usual = 1 / (stream.average_rate or Fraction(25))
    for packet in container.demux(stream):
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None or not packet.size or packet.is_discard:
            continue
        starts.append(time * unit)
        ends.append(time * unit + (packet.duration * unit if packet.duration else usual))
    if not starts:
        return usual, 1
    return max(ends) - min(starts), len(starts)


def _reason(source: Path | bytes, error: av.error.FFmpegError) -> str:
    if isinstance(source, Path) and source.is_file() and source.stat().st_size == 0:
        return "it is empty"
    if isinstance(error, av.error.FileNotFoundError):
        return "there is no such file"
    if isinstance(error, av.error.InvalidDataError | av.error.EOFError | av.error.ArgumentError):
        return "it is damaged or not a media file"
    return (error.strerror or str(error)).lower()
