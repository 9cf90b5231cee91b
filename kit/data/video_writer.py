"""Writing video: results with sound that survive a crash, and clips for shards."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
import torch
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor

from kit.atomic import atomic_write
from kit.batch import SAMPLE_RATE
from kit.data.container import exact_rate
from kit.data.video_reader import KEYFRAME_INTERVAL

_AUDIO_FRAME = 1024
_AUDIO_BITS_PER_SECOND = 64_000


class VideoWriter:
    """Write frames as they come; a run that breaks off leaves a playable file.

    Frames go to `<name>.partial.mkv` beside `path`. A clean exit copies them into `path` (mp4)
    and removes that file; an exception leaves it. Colours are tagged and coded as BT.709.

    Args:
        path: ends in `.mp4`; its folder is made if need be.
        fps: frames per second.
        height: even.
        width: even.
        speech: at 16 kHz; cut or filled with silence to the video's length. [samples]
    """

    def __init__(
        self, path: Path, *, fps: float, height: int, width: int, speech: Tensor | None = None
    ) -> None:
        self._path = path
        self._partial = path.with_suffix(".partial.mkv")
        self._rate = exact_rate(fps)
        self._size = (height, width)
        self._speech = speech
        self._num_frames = 0

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Short clusters, flushed at once, so that a crash costs less than a second of video.
        options = {"cluster_time_limit": "500", "flush_packets": "1"}
        self._container = av.open(str(self._partial), "w", format="matroska", options=options)
        # Without B-frames packets come in the order of their times, which copying relies on.
        settings = {"crf": "16", "preset": "medium", "bf": "0"}
        self._video = _add_video(self._container, self._rate, self._size, "yuv420p", settings)
        self._sound = _Sound(self._container, self._speech, self._rate)
        return self

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append frames, RGB. [T, H, W, 3]"""
        for picture in frames:
            frame = _frame(picture, self._num_frames, self._rate, "yuv420p")
            self._container.mux(self._video.encode(frame))
            self._num_frames += 1
            self._sound.reach(self._num_frames)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            # The first error is the one to report; the file keeps what it can.
            with suppress(OSError, av.error.FFmpegError):
                self._finish()
            return
        self._finish()
        _remux(self._partial, self._path, self._rate, self._num_frames)
        self._partial.unlink()

    def _finish(self) -> None:
        try:
            self._container.mux(self._video.encode(None))
            self._sound.finish(self._num_frames)
        finally:
            self._container.close()


def join_videos(parts: Sequence[Path], path: Path, *, fps: float, speech: Tensor | None) -> None:
    """Put videos that `VideoWriter` wrote behind each other, without coding them again.

    Args:
        parts: silent mp4 files of one size, at least one.
        path: mp4 to write; it appears when it is complete.
        fps: frames per second of all of them.
        speech: at 16 kHz; cut or filled with silence to the video's length. [samples]
    """
    rate = exact_rate(fps)
    unfinished = path.with_suffix(".partial.mkv")
    try:
        num_frames = _join(parts, unfinished, rate, speech)
        _remux(unfinished, path, rate, num_frames)
    finally:
        unfinished.unlink(missing_ok=True)


def _join(parts: Sequence[Path], path: Path, rate: Fraction, speech: Tensor | None) -> int:
    """Write a Matroska file of all parts; gives the number of its frames."""
    num_frames = 0
    with av.open(str(parts[0])) as first, av.open(str(path), "w", format="matroska") as new:
        video = new.add_stream_from_template(first.streams.video[0])
        sound = _Sound(new, speech, rate)
        for part in parts:
            with av.open(str(part)) as old:
                for packet in old.demux(video=0):
                    if packet.size:
                        _place(packet, num_frames, rate)
                        packet.stream = video
                        new.mux(packet)
                        num_frames += 1
                        sound.reach(num_frames)
        sound.finish(num_frames)
    return num_frames


class _Sound:
    """The sound of a video, written as its frames come; without speech there is none."""

    def __init__(self, container: OutputContainer, speech: Tensor | None, rate: Fraction) -> None:
        self._container = container
        self._speech = speech
        self._rate = rate
        self._num_samples = 0
        self._stream: AudioStream | None = None
        if speech is not None:
            self._stream = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
            self._stream.bit_rate = _AUDIO_BITS_PER_SECOND

    def reach(self, num_frames: int, *, smallest: int = _AUDIO_FRAME) -> None:
        """Write what sounds until the end of the last of so many frames."""
        if self._stream is None or self._speech is None:
            return
        due = round(num_frames / self._rate * SAMPLE_RATE)
        while due - self._num_samples >= smallest:
            count = min(_AUDIO_FRAME, due - self._num_samples)
            piece = self._speech[self._num_samples : self._num_samples + count]
            frame = _sound_frame(piece, count, self._num_samples)
            self._container.mux(self._stream.encode(frame))
            self._num_samples += count

    def finish(self, num_frames: int) -> None:
        """Write the rest."""
        self.reach(num_frames, smallest=1)
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))


def encode_clip(frames: Iterable[NDArray[np.uint8]], fps: float) -> bytes:
    """Encode a clip for a shard: H.264 without visible loss, a keyframe each second, no sound.

    The same frames give the same bytes.

    Args:
        frames: RGB, all of one size, at least one; taken one by one. [T, H, W, 3]
        fps: frames per second.
    """
    rate, file = exact_rate(fps), BytesIO()
    # A fixed number of threads: the encoder's choices depend on it.
    settings = {"crf": "6", "preset": "veryfast", "g": str(KEYFRAME_INTERVAL), "threads": "4"}
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream: VideoStream | None = None
        for number, picture in enumerate(frames):
            if stream is None:
                stream = _add_video(container, rate, picture.shape[:2], "yuv444p", settings)
            container.mux(stream.encode(_frame(picture, number, rate, "yuv444p")))
        if stream is None:
            raise ValueError("a clip needs at least one frame")
        container.mux(stream.encode(None))
    return file.getvalue()


def _add_video(
    container: OutputContainer,
    rate: Fraction,
    size: tuple[int, ...],
    pixel_format: str,
    settings: dict[str, str],
) -> VideoStream:
    stream = container.add_stream("libx264", rate=rate, options=settings)
    stream.height, stream.width = size
    stream.pix_fmt = pixel_format
    context = stream.codec_context
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    context.colorspace = Colorspace.ITU709
    context.color_range = ColorRange.MPEG
    return stream


def _frame(
    picture: NDArray[np.uint8], number: int, rate: Fraction, pixel_format: str
) -> VideoFrame:
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(
        format=pixel_format,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        dst_color_trc=ColorTrc.BT709,
        dst_color_primaries=ColorPrimaries.BT709,
    )
    frame.pts, frame.time_base = number, 1 / rate
    return frame


def _sound_frame(piece: Tensor, num_samples: int, start: int) -> av.AudioFrame:
    samples = torch.zeros(1, num_samples)
    samples[0, : len(piece)] = piece.detach().float().cpu()
    frame = av.AudioFrame.from_ndarray(samples.numpy(), format="fltp", layout="mono")
    frame.sample_rate = SAMPLE_RATE
    frame.pts, frame.time_base = start, Fraction(1, SAMPLE_RATE)
    return frame


def _place(packet: "Packet[Any]", number: int, rate: Fraction) -> None:
    """Let a packet hold the frame of this number."""
    packet.pts = packet.dts = number
    packet.duration, packet.time_base = 1, 1 / rate


def _remux(source: Path, target: Path, rate: Fraction, num_frames: int) -> None:
    """Copy packets into an mp4 that can be played while it loads, then put it in its place."""
    options = {"movflags": "+faststart"}
    with (
        atomic_write(target) as unfinished,
        av.open(str(source)) as old,
        av.open(str(unfinished), "w", format="mp4", options=options) as new,
    ):
        copies = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        number = 0
        for packet in old.demux():
            if not packet.size:
                continue
            if packet.stream.type == "video":
                # Matroska rounded the times to milliseconds.
                _place(packet, number, rate)
                number += 1
            elif packet.pts is not None and packet.time_base and packet.duration:
                # The sound's last packet is filled up to 1024 samples; it ends with the video.
                left = num_frames / rate / packet.time_base - packet.pts
                packet.duration = min(packet.duration, round(left))
            packet.stream = copies[packet.stream.index]
            new.mux(packet)
