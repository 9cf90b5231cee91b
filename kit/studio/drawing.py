"""Painting a scene frame by frame, and telling the truth about every frame."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kit.studio.backdrops import MARGIN, paint_backdrop
from kit.studio.characters import Character, Wall
from kit.studio.figure import Figure, Pose, mouth_outline
from kit.studio.motion import Camera, Motion
from kit.studio.mouth import Mouth
from kit.studio.shapes import Canvas, Place

HEAD_UNITS = 2.36
"""Height of a head in head units, from the top of its hair to the chin."""

_SCALE, _LARGE_SCALE, _LARGE_HEIGHT = 4, 3, 128
_BODY_SHARE = 0.35
_LIP = 0.045


@dataclass(frozen=True)
class Part:
    """A character in a scene.

    Attributes:
        x: middle of the head at rest, in picture heights from the left.
        y: the same, from the top.
        head_height: in picture heights.
    """

    character: Character
    x: float
    y: float
    head_height: float
    motion: Motion
    mouth: Mouth

    @property
    def unit(self) -> float:
        """One head unit, in picture heights."""
        return self.head_height / HEAD_UNITS


@dataclass(frozen=True)
class Scene:
    """All that is seen, at any size.

    Attributes:
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        parts: from left to right.
    """

    height: int
    width: int
    wall: Wall
    parts: tuple[Part, ...]
    camera: Camera

    @property
    def num_frames(self) -> int:
        """Count the frames."""
        return len(self.camera.zoom)


def paint_frames(scene: Scene) -> Iterator[NDArray[np.uint8]]:
    """Paint the frames one after the other. RGB, [height, width, 3] each"""
    scale = _SCALE if scene.height < _LARGE_HEIGHT else _LARGE_SCALE
    figures = [Figure(part.character) for part in scene.parts]
    wall = paint_backdrop(scene.wall, scene.height * scale, scene.width * scale)
    ground, seen = wall, (0.0, 0.0, 0.0)
    for frame in range(scene.num_frames):
        zoom, (right, down) = scene.camera.zoom[frame], scene.camera.pan[frame]
        if (zoom, right, down) != seen:
            ground, seen = _cut(scene, wall, frame, scale), (zoom, right, down)
        canvas = Canvas(ground.copy(), scale)
        for part, figure in zip(scene.parts, figures, strict=True):
            head, body = place_head(scene, part, frame), place_body(scene, part, frame)
            figure.paint(canvas, head, body, pose(part, frame))
        yield canvas.picture()


def place_head(scene: Scene, part: Part, frame: int) -> Place:
    """Locate a head in a frame, in pixels of the picture."""
    motion = part.motion
    moved = np.array([motion.sway[frame], motion.bob[frame]]) * part.unit
    return _place(scene, part, moved, frame, float(motion.tilt[frame]))


def place_body(scene: Scene, part: Part, frame: int) -> Place:
    """Locate a body in a frame, in pixels of the picture."""
    motion = part.motion
    sway = _BODY_SHARE * motion.sway[frame]
    lift = _BODY_SHARE * motion.bob[frame] - motion.breath[frame]
    return _place(scene, part, np.array([sway, lift]) * part.unit, frame, 0.0)


def pose(part: Part, frame: int) -> Pose:
    """Tell what a face does in a frame."""
    horizontal, vertical = part.motion.gaze[frame]
    return Pose(
        opening=float(part.mouth.opening[frame]),
        width=float(part.mouth.width[frame]),
        eyes=float(part.motion.eyes[frame]),
        gaze=(float(horizontal), float(vertical)),
    )


def mouth_shape(part: Part, frame: int) -> NDArray[np.float64]:
    """Trace the lips in a frame, in head units. [N, 2]"""
    now = pose(part, frame)
    return mouth_outline(now.opening, now.width, part.character.smile, _LIP)


def mouth_box(scene: Scene, part: Part, frame: int) -> tuple[float, float, float, float]:
    """Bound the lips in a frame: left, top, right, bottom, in pixels."""
    points = place_head(scene, part, frame).pixels(mouth_shape(part, frame))
    left, top = points.min(axis=0)
    right, bottom = points.max(axis=0)
    return float(left), float(top), float(right), float(bottom)


def frame_truth(scene: Scene, frame: int) -> dict[str, Any]:
    """State where everything is in a frame, for JSON; lengths in pixels, angles in radians."""
    return {
        "zoom": round(float(scene.camera.zoom[frame]), 4),
        "pan": [round(float(v) * scene.height, 3) for v in scene.camera.pan[frame]],
        "characters": [_part_truth(scene, part, frame) for part in scene.parts],
    }


def _part_truth(scene: Scene, part: Part, frame: int) -> dict[str, Any]:
    head, now = place_head(scene, part, frame), pose(part, frame)
    return {
        "mouth_box": [round(v, 2) for v in mouth_box(scene, part, frame)],
        "opening": round(now.opening, 4),
        "width": round(now.width, 4),
        "head": [round(float(v), 2) for v in head.middle],
        "head_unit": round(head.unit, 3),
        "roll": round(head.roll, 4),
        "eyes": round(now.eyes, 3),
        "gaze": [round(v, 3) for v in now.gaze],
    }


def _place(scene: Scene, part: Part, moved: NDArray[np.float64], frame: int, roll: float) -> Place:
    zoom = float(scene.camera.zoom[frame])
    middle = np.array([scene.width / scene.height, 1.0]) / 2
    spot = (np.array([part.x, part.y]) + moved - scene.camera.pan[frame] - middle) * zoom + middle
    return Place(spot * scene.height, part.unit * zoom * scene.height, roll)


def _cut(scene: Scene, wall: Image.Image, frame: int, scale: int) -> Image.Image:
    """Cut what the camera sees out of the wall."""
    height, width = scene.height * scale, scene.width * scale
    zoom, (right, down) = float(scene.camera.zoom[frame]), scene.camera.pan[frame] * height
    border = round(MARGIN * height)
    x, y = border + width / 2 + float(right), border + height / 2 + float(down)
    reach_x, reach_y = width / 2 / zoom, height / 2 / zoom
    box = (x - reach_x, y - reach_y, x + reach_x, y + reach_y)
    return wall.resize((width, height), Image.Resampling.BILINEAR, box=box)
