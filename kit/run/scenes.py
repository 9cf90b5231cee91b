"""From files to what the sampler makes a video of."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kit.batch import SAMPLE_RATE
from kit.data.buckets import nearest_bucket, parse_buckets
from kit.data.media import load_image, load_speech, normalize_loudness, probe
from kit.errors import InputError
from kit.metrics.settings import MeasureSettings
from kit.metrics.video_report import Measure, open_measure
from kit.models.base import Geometry
from kit.recipe import Recipe
from kit.sampling.frames import StillSource, VideoSource, to_pictures
from kit.sampling.scene import Scene, Source

Size = tuple[int, int]
"""Height and width of a video in pixels."""


def load_portrait(path: Path, buckets: int | str | Sequence[str]) -> tuple[Source, Size]:
    """Load a portrait and choose the video's size after it."""
    picture = load_image(path)
    size = nearest_bucket(picture.shape[0], picture.shape[1], parse_buckets(buckets))
    return StillSource(picture, size), size


def open_video(path: Path, buckets: int | str | Sequence[str], fps: int) -> tuple[Source, Size]:
    """Open a source video and choose the new video's size after it."""
    info = probe(path)
    size = nearest_bucket(info.height, info.width, parse_buckets(buckets))
    return VideoSource(path, size, fps), size


def no_reference(size: str) -> tuple[Source, Size]:
    """Choose a size, HEIGHTxWIDTH, for a video from text and speech alone."""
    ((height, width),) = parse_buckets([size]).values()
    return StillSource(np.full((height, width, 3), 128, np.uint8), (height, width)), (height, width)


def load_track(path: Path, fps: int, seconds: float | None = None) -> Tensor:
    """Load speech at 16 kHz and -23 LUFS, all of it or its beginning. [samples].

    Raises:
        InputError: the file cannot be read, or holds less sound than one frame lasts.
    """
    waveform, _ = normalize_loudness(load_speech(path))
    if seconds is not None:
        waveform = waveform[: round(seconds * SAMPLE_RATE)]
    if len(waveform) * fps < SAMPLE_RATE:
        raise InputError(f"{path}: holds less sound than one frame lasts")
    return waveform


def one_speaker(text: str, track: Tensor, source: Source, size: Size, base: Geometry) -> Scene:
    """Put a scene together in which one speaker fills the picture."""
    mask = torch.ones(1, size[0] // base.pixel_stride, size[1] // base.pixel_stride)
    return Scene(text, track[None], source, mask)


def build_measure(recipe: Recipe, size: Size, source: Source | None) -> Measure:
    """Load what the `measure` section names; without one, nothing is known of the videos.

    Args:
        recipe: of `kit fit` or `kit sample`.
        size: of the videos.
        source: its first picture is what the character should look like, unless the section names
            another.

    Raises:
        InputError: lists all that is wrong.
    """
    settings = recipe.build("measure") if "measure" in recipe else MeasureSettings()
    if settings.reference is not None:
        source = StillSource(load_image(Path(settings.reference)), size)
    reference = None
    if source is not None:
        (picture,) = to_pictures(source.frame(0)[None])
        reference = torch.from_numpy(picture)  # [height, width, 3]
    return open_measure(settings, size, reference)
