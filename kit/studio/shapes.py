"""Outlines in head units, and painting them: large, then reduced, so that edges become smooth.

Head units: x runs from -1 to 1 across the face, y downwards from the eyes' height to 1 at the chin.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from kit.studio.characters import INK, Color

Floats = NDArray[np.float64]

LINE = 0.05
"""Width of outlines, in head units."""


@dataclass(frozen=True)
class Shape:
    """A filled outline, or a line where there is no fill.

    Attributes:
        points: [N, 2]
        fill: None paints the line alone, open at its ends.
        line: width in head units; 0 paints none.
        color: of the line.
    """

    points: Floats
    fill: Color | None
    line: float = LINE
    color: Color = INK


@dataclass(frozen=True)
class Place:
    """Where head units lie on a canvas.

    Attributes:
        middle: of the head, in pixels. [2]
        unit: pixels in one head unit.
        roll: clockwise, in radians.
    """

    middle: Floats
    unit: float
    roll: float = 0.0

    def pixels(self, points: Floats) -> Floats:
        """Turn head units into pixels. [N, 2]"""
        cosine, sine = np.cos(self.roll), np.sin(self.roll)
        turn: Floats = np.array([[cosine, sine], [-sine, cosine]])
        return points @ turn * self.unit + self.middle


class Spot(Protocol):
    """Where head units lie on a canvas, by any rule."""

    @property
    def unit(self) -> float:
        """Pixels in one head unit."""

    def pixels(self, points: Floats) -> Floats:
        """Turn head units into pixels. [N, 2]"""


class Canvas:
    """A picture under the brush, `scale` times larger than it will be.

    Args:
        ground: what is painted on.
        scale: how much larger it is.
        only: a colour in place of all others.
    """

    def __init__(self, ground: Image.Image, scale: int, only: Color | None = None) -> None:
        self._image = ground
        self._scale = scale
        self._only = only
        self._draw = ImageDraw.Draw(ground)

    def paint(self, shapes: Sequence[Shape], place: Spot) -> None:
        """Paint shapes in their order."""
        # One product for all of them: the calls cost more than the numbers.
        points = place.pixels(np.concatenate([shape.points for shape in shapes])) * self._scale
        start = 0
        for shape in shapes:
            stop = start + len(shape.points)
            outline = points[start:stop].ravel().tolist()
            start = stop
            if shape.fill is not None:
                self._draw.polygon(outline, fill=self._only or shape.fill)
                outline += outline[:2]
            if shape.line:
                width = max(1, round(shape.line * place.unit * self._scale))
                self._draw.line(outline, fill=self._only or shape.color, width=width)

    def picture(self) -> NDArray[np.uint8]:
        """Reduce to the final size. RGB, [H, W, 3]"""
        return np.asarray(self._image.reduce(self._scale))


def oval(x: float, y: float, width: float, height: float, num_points: int = 28) -> Floats:
    """Lay points around an ellipse; width and height are half axes."""
    angle = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
    return np.stack([x + width * np.cos(angle), y + height * np.sin(angle)], axis=1)


def curve(*knots: tuple[float, float], closed: bool = False, steps: int = 6) -> Floats:
    """Lay a smooth line through points (Catmull-Rom)."""
    points = np.array(knots, float)
    before, after = (points[-1:], points[:2]) if closed else (points[:1], points[-1:])
    padded = np.vstack([before, points, after])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    pieces = []
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        cubic = (d - a + 3 * (b - c)) * t**3 + (2 * a - 5 * b + 4 * c - d) * t**2 + (c - a) * t
        pieces.append(b + 0.5 * cubic)
    last = [] if closed else [points[-1:]]
    return np.vstack([*pieces, *last])


def mirrored(points: Floats) -> Floats:
    """Swap left and right."""
    return points * [-1, 1]
