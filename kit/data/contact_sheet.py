"""One picture of what went into the shards: a strip of frames per clip, its sound below."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from kit.atomic import atomic_write

SHEET_NAME = "census.png"
STRIP_FRAMES = 6
MAX_STRIPS = 12

_THUMB_WIDTH, _THUMB_HEIGHT = 160, 120
_WAVE_HEIGHT, _TITLE_HEIGHT, _GAP = 36, 18, 8
_STRIP_WIDTH = _THUMB_WIDTH * STRIP_FRAMES
_STRIP_HEIGHT = _TITLE_HEIGHT + _THUMB_HEIGHT + _WAVE_HEIGHT + _GAP
_PAPER, _INK, _WAVE = (250, 250, 248), (40, 40, 40), (70, 110, 170)


class ContactSheet:
    """Collects strips until there are 12; later clips are left out."""

    def __init__(self) -> None:
        self._strips: list[Image.Image] = []

    @property
    def is_full(self) -> bool:
        """True when no more strips are taken."""
        return len(self._strips) >= MAX_STRIPS

    def add(self, title: str, frames: Sequence[NDArray[np.uint8]], tracks: Tensor) -> None:
        """Add a clip.

        Args:
            title: stands above the strip.
            frames: up to 6 pictures, RGB. [H, W, 3] each
            tracks: the clip's speech; no tracks for a still. [S, samples]
        """
        if self.is_full:
            return
        strip = Image.new("RGB", (_STRIP_WIDTH, _STRIP_HEIGHT), _PAPER)
        draw = ImageDraw.Draw(strip)
        draw.text((2, 2), title, fill=_INK, font=ImageFont.load_default(12))
        for place, frame in enumerate(frames):
            thumb = ImageOps.contain(Image.fromarray(frame), (_THUMB_WIDTH, _THUMB_HEIGHT))
            strip.paste(thumb, (place * _THUMB_WIDTH, _TITLE_HEIGHT))
        if tracks.numel():
            _draw_wave(draw, tracks)
        self._strips.append(strip)

    def save(self, folder: Path) -> None:
        """Write `census.png`."""
        height = _STRIP_HEIGHT * len(self._strips)
        sheet = Image.new("RGB", (_STRIP_WIDTH + 2 * _GAP, height + _GAP), _PAPER)
        for place, strip in enumerate(self._strips):
            sheet.paste(strip, (_GAP, _GAP + place * _STRIP_HEIGHT))
        with atomic_write(folder / SHEET_NAME) as partial:
            sheet.save(partial, format="PNG", optimize=True)


def strip_frames(num_frames: int) -> list[int]:
    """Choose which frames of a clip a strip shows, evenly spread."""
    count = min(STRIP_FRAMES, num_frames)
    return [round((i + 0.5) * num_frames / count - 0.5) for i in range(count)]


def _draw_wave(draw: ImageDraw.ImageDraw, tracks: Tensor) -> None:
    """Draw the loudest sample under each column of pixels, all tracks together."""
    loudest = tracks.abs().amax(dim=0)  # [samples]
    columns = torch.nn.functional.adaptive_max_pool1d(loudest[None], _STRIP_WIDTH)[0]
    middle = _TITLE_HEIGHT + _THUMB_HEIGHT + _WAVE_HEIGHT // 2
    # Speech at -23 LUFS seldom rises above half of full scale.
    for x, level in enumerate((2 * columns).clamp(max=1).tolist()):
        reach = level * (_WAVE_HEIGHT // 2 - 1)
        draw.line([(x, middle - reach), (x, middle + reach)], fill=_WAVE)
