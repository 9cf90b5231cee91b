"""Cutting a source into clips of one length and size, encoded as shards hold them."""

from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, zeros

from kit.batch import SAMPLE_RATE
from kit.data.buckets import Buckets, fit, fit_mask, nearest_bucket
from kit.data.census import NO_CAPTION, Census
from kit.data.contact_sheet import strip_frames
from kit.data.fields import Meta
from kit.data.footage import Footage, Frames, open_footage
from kit.data.media import encode_clip, encode_wav, load_image
from kit.data.sources import Source
from kit.data.speakers import find_speakers, load_masks, load_tracks
from kit.errors import InputError
from kit.masks import check_speaker_masks, latent_masks

PIXEL_STRIDE = 8
"""Pixels in a latent position of every base so far: masks are judged at that size."""

_NOTABLE_GAP_SECONDS = 0.2
_NOTABLE_ENLARGEMENT = 1.5


@dataclass(frozen=True)
class Cutting:
    """How sources become clips.

    Attributes:
        buckets: sizes to choose from.
        window_frames: what a clip must last for, 4n + 1.
        clip_seconds: longest clip.
        sequence_fps: rate of image sequences.
        fps: rate of the clips.
    """

    buckets: Buckets
    window_frames: int
    clip_seconds: float
    sequence_fps: float
    fps: int


@dataclass(frozen=True)
class Clip:
    """A sample on its way to the shards, with what the census shows of it.

    Attributes:
        members: all but `json`, by extension.
        thumbs: a few frames, RGB. [height, width, 3] each
        tracks: speech at 16 kHz; no tracks for a still. [S, samples]
    """

    meta: Meta
    members: dict[str, bytes]
    thumbs: Sequence[NDArray[np.uint8]]
    tracks: Tensor


def cut_evenly(num_frames: int, window_frames: int, max_frames: int) -> tuple[list[int], int]:
    """Cut a length into equal clips.

    Returns:
        First frame of each clip, and the length of all, 4n + 1 and at most max_frames; no clips
        if num_frames is less than a window.
    """
    if num_frames < window_frames:
        return [], 0
    count = max(1, min(-(-num_frames // max_frames), num_frames // window_frames))
    share = num_frames // count
    length = (min(share, max_frames) - 1) // 4 * 4 + 1
    return [number * share for number in range(count)], length


def cut_still(source: Source, cutting: Cutting, census: Census) -> Iterator[Clip]:
    """Give the one sample that a picture makes.

    Raises:
        InputError: the picture cannot be read.
    """
    picture = load_image(source.path)
    height, width = _choose_size(source, picture.shape[0], picture.shape[1], cutting, census)
    fitted = fit(picture, height, width)
    caption = _caption(source, census)
    meta = Meta(
        kind="image",
        num_frames=1,
        height=height,
        width=width,
        fps=cutting.fps,
        num_speakers=0,
        num_masks=0,
        has_caption=bool(caption),
        source=source.path.name,
        start_seconds=0.0,
        loudness=[],
    )
    yield Clip(meta, {"png": _png(fitted), "txt": caption}, [fitted], zeros(0, 0))


def cut_video(source: Source, cutting: Cutting, census: Census) -> Iterator[Clip]:
    """Give the clips that a video or a sequence of pictures makes, one after the other.

    Raises:
        InputError: it must be dropped; or, after some clips, the rest of it must.
    """
    footage = open_footage(source, fps=cutting.fps, sequence_fps=cutting.sequence_fps)
    speakers = find_speakers(source)
    tracks, loudness = load_tracks(source, speakers, has_sound=footage.has_sound)
    masks = load_masks(source, speakers, footage.height, footage.width)
    if source.missing_numbers:
        census.warnings.append(
            f"{source.path} lacks {len(source.missing_numbers)} pictures between its first and its "
            f"last, such as number {source.missing_numbers[0]}; it plays without them"
        )
    usable = _usable_frames(source, footage, tracks, cutting, census)
    max_frames = int(cutting.clip_seconds * cutting.fps)
    starts, length = cut_evenly(usable, cutting.window_frames, max_frames)
    height, width = _choose_size(source, footage.height, footage.width, cutting, census)
    constant = _masks_as_members(source, masks, height, width)
    constant["txt"] = _caption(source, census)
    if all(level is None for level in loudness):
        census.warnings.append(f"{source.path} is silent")
    for reel in _reels(source, footage, starts, length, (height, width)):
        video = encode_clip(reel, cutting.fps)
        reel.check_length()
        speech = _slice(tracks, reel.start, length, cutting.fps)
        meta = Meta(
            kind="video",
            num_frames=length,
            height=height,
            width=width,
            fps=cutting.fps,
            num_speakers=len(tracks),
            num_masks=len(masks),
            has_caption=bool(constant["txt"]),
            source=source.path.name,
            start_seconds=reel.start / cutting.fps,
            loudness=loudness,
        )
        members = constant | {"mp4": video, "wav": encode_wav(speech)}
        yield Clip(meta, members, reel.thumbs, speech)


class _Reel:
    """Frames of one clip, brought to size as they are taken; keeps the few for the census."""

    def __init__(
        self, source: Source, frames: Frames, start: int, length: int, size: tuple[int, int]
    ) -> None:
        self.start = start
        self.thumbs: list[NDArray[np.uint8]] = []
        self._source = source
        self._frames = frames
        self._length = length
        self._size = size
        self._shown = set(strip_frames(length))
        self._num_frames = 0

    def __iter__(self) -> Frames:
        for frame in islice(self._frames, self._length):
            fitted = fit(frame, *self._size)
            if self._num_frames in self._shown:
                self.thumbs.append(fitted)
            self._num_frames += 1
            yield fitted

    def check_length(self) -> None:
        if self._num_frames < self._length:
            place = self.start + self._num_frames
            raise InputError(f"{self._source.path} is damaged: it ends after {place} frames")


def _reels(
    source: Source, footage: Footage, starts: Sequence[int], length: int, size: tuple[int, int]
) -> Iterator[_Reel]:
    """Play the footage once, in clips; frames that are in none of them are passed over."""
    frames, played = footage.play(), 0
    for start in starts:
        for _ in islice(frames, start - played):
            pass
        yield _Reel(source, frames, start, length, size)
        played = start + length


def _usable_frames(
    source: Source, footage: Footage, tracks: Tensor, cutting: Cutting, census: Census
) -> int:
    speech_frames = tracks.shape[1] * cutting.fps // SAMPLE_RATE
    missing = (footage.num_frames - speech_frames) / cutting.fps
    if missing > _NOTABLE_GAP_SECONDS:
        census.warnings.append(
            f"{source.path}: the sound ends {missing:.1f} s before the video, which is cut there"
        )
    usable = min(footage.num_frames, speech_frames)
    if usable < cutting.window_frames:
        raise InputError(
            f"{source.path} has {usable} frames of video with sound, fewer than a window: "
            f"{cutting.window_frames} ({cutting.window_frames / cutting.fps:.2f} s)"
        )
    return usable


def _choose_size(
    source: Source, height: int, width: int, cutting: Cutting, census: Census
) -> tuple[int, int]:
    chosen = nearest_bucket(height, width, cutting.buckets)
    name = f"{width}x{height}"
    census.source_sizes[name] = census.source_sizes.get(name, 0) + 1
    scale = max(chosen[0] / height, chosen[1] / width)
    if scale > _NOTABLE_ENLARGEMENT:
        census.warnings.append(
            f"{source.path}: {width}x{height} pixels are enlarged {scale:.1f} times"
        )
    return chosen


def _masks_as_members(
    source: Source, masks: Sequence[NDArray[np.uint8]], height: int, width: int
) -> dict[str, bytes]:
    members = {}
    for number, mask in enumerate(masks):
        fitted = fit_mask(mask, height, width)
        if not fitted.any():
            raise InputError(
                f"{source.path}: the mask of speaker {number + 1} is empty "
                f"after the cut to {width}x{height} pixels"
            )
        members[f"speaker{number}.png"] = _png(fitted)
    if masks:
        stacked = np.stack([fit_mask(mask, height, width) for mask in masks])
        check_speaker_masks(latent_masks(torch.from_numpy(stacked), PIXEL_STRIDE), str(source.path))
    return members


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8; save it so") from error


def _caption(source: Source, census: Census) -> bytes:
    path = source.beside(".txt")
    text = _read_text(path).strip() if path.is_file() else ""
    if not text:
        census.warnings.append(f"{source.path} {NO_CAPTION}; write one into {path.name}")
    return text.encode()


def _slice(tracks: Tensor, start: int, length: int, fps: int) -> Tensor:
    first, stop = (round(frame * SAMPLE_RATE / fps) for frame in (start, start + length))
    return tracks[:, first:stop]


def _png(picture: NDArray[np.uint8]) -> bytes:
    file = BytesIO()
    Image.fromarray(picture).save(file, format="png")
    return file.getvalue()
