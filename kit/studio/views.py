"""Scenes with depth, seen by a camera that moves through them.

Everything stands on planes that face the first camera, one behind another: the wall with what hangs
on it, a lamp, and the character, whose distance is the unit of length. Outlines are laid out as the
first camera sees them, and a homography of their plane carries them to any other camera, so that
pictures, depth and motion are exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kit.draws import seed_of
from kit.studio.backdrops import SKY
from kit.studio.captions import name_framing, write_caption
from kit.studio.characters import CLOTHES, INK, RARE, WALLS, Color, Wall, shaded
from kit.studio.drawing import Part, mouth_shape, place_body, place_head, pose
from kit.studio.figure import Figure
from kit.studio.motion import Camera
from kit.studio.scenes import Take, World, draw_clip
from kit.studio.shapes import Canvas, Floats, Place, Shape, oval
from kit.studio.voices import Corpus

FOCAL = 1.1
"""Focal length of the first camera, in picture heights: about 49 degrees across a square."""

_SCALE = 4
_HEAD_HEIGHTS, _HEAD_MIDDLE = (0.54, 0.64), 0.5
_WALL_DISTANCES = (1.7, 2.6)
_REACH, _CELL = 1.3, 0.32
_FACES = np.array([0.0, 0.0, 1.0])


class Lens(NamedTuple):
    """Where a camera is and how it sees.

    Attributes:
        intrinsics: focal lengths and centre, in pixels. [3, 3]
        from_first: from the coordinates of the first camera to its own. [4, 4]
    """

    intrinsics: Floats
    from_first: Floats


@dataclass(frozen=True)
class Layer:
    """Things at one distance.

    Attributes:
        distance: from the first camera; the character's is 1.
        shapes: as the first camera sees them, in picture heights.
    """

    distance: float
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class View:
    """A take with one character, and the room around it.

    Attributes:
        take: its own camera stands still.
        layers: of the room, from far to near, all behind the character; the first is the wall.
    """

    take: Take
    layers: tuple[Layer, ...]

    @property
    def part(self) -> Part:
        """The character."""
        return self.take.scene.parts[0]

    @property
    def intrinsics(self) -> Tensor:
        """Intrinsics of the first camera, in pixels. [3, 3]"""
        scene = self.take.scene
        focal = FOCAL * scene.height
        return torch.tensor([[focal, 0, scene.width / 2], [0, focal, scene.height / 2], [0, 0, 1]])


@dataclass(frozen=True)
class Projected:
    """A place on a plane, where another camera sees it.

    Attributes:
        place: where the first camera sees it, in pixels.
        homography: from its pixels to the other's. [3, 3]
    """

    place: Place
    homography: Floats

    @property
    def unit(self) -> float:
        """Pixels in one head unit around the middle."""
        depth = (self.homography @ [*self.place.middle, 1.0])[2]
        return float(self.place.unit * np.sqrt(abs(np.linalg.det(self.homography) / depth**3)))

    def pixels(self, points: Floats) -> Floats:
        """Turn head units into pixels. [N, 2]"""
        placed = self.place.pixels(points)
        seen = placed @ self.homography[:, :2].T + self.homography[:, 2]
        projected: Floats = seen[:, :2] / seen[:, 2:]
        return projected


def draw_view(world: World, index: int, num_frames: int, corpus: Corpus) -> View:
    """Make the index-th view of a world without pairs; num_frames is 4n + 1."""
    take = draw_clip(replace(world, two_speakers=0.0), index, num_frames, corpus)
    random = np.random.default_rng(seed_of("view", world.seed, world.split, index))
    head_height = random.uniform(*_HEAD_HEIGHTS)
    part = replace(take.scene.parts[0], y=_HEAD_MIDDLE, head_height=head_height)
    wall = Wall(take.scene.wall.color, "room", take.scene.wall.seed)
    still = Camera(np.ones(num_frames), np.zeros((num_frames, 2)))
    scene = replace(take.scene, wall=wall, parts=(part,), camera=still)
    framing = name_framing(part.head_height)
    caption = write_caption([part.character], wall, framing, take.speaking, random)
    take = replace(take, key=f"view-{take.key}", scene=scene, caption=caption)
    return View(take, _room(wall, random))


def lenses(intrinsics: Tensor, w2c: Tensor) -> list[Lens]:
    """Express cameras in the coordinates of the first.

    Args:
        intrinsics: in pixels. [n, 3, 3]
        w2c: from the world to each camera. [n, 4, 4]
    """
    first = torch.linalg.inv(w2c[0].double())
    poses = (w2c.double() @ first).numpy()
    return [Lens(*pair) for pair in zip(intrinsics.double().numpy(), poses, strict=True)]


def first_lens(view: View) -> Lens:
    """The camera for which the view was laid out."""
    return Lens(view.intrinsics.double().numpy(), np.eye(4))


def homography(view: View, distance: float, lens: Lens) -> Floats:
    """Map pixels of the first camera to those of another, for what lies on one plane. [3, 3]"""
    turn, shift = lens.from_first[:3, :3], lens.from_first[:3, 3]
    plane = turn + np.outer(shift, _FACES) / distance
    mapped: Floats = lens.intrinsics @ plane @ np.linalg.inv(first_lens(view).intrinsics)
    return mapped


def paint_view(view: View, seen: list[Lens], start: int = 0) -> Iterator[NDArray[np.uint8]]:
    """Paint frames one after the other, each with its camera. RGB, [height, width, 3] each

    Args:
        view: what to paint.
        seen: camera of each frame.
        start: frame of the take that the first one shows.
    """
    figure = Figure(view.part.character)
    for frame, lens in enumerate(seen, start=start):
        canvas = Canvas(_ground(view, WALLS[view.take.scene.wall.color]), _SCALE)
        for layer in view.layers:
            canvas.paint(layer.shapes, _first_picture(view, layer.distance, lens))
        _paint_character(view, figure, canvas, frame, lens)
        yield canvas.picture()


def depth_of(view: View, lens: Lens, frame: int = 0) -> Tensor:
    """Tell the depth of each pixel along the camera's axis. float32 [height, width]"""
    numbers = np.asarray(_painted_numbers(view, lens, frame))
    middle = _SCALE // 2
    nearest = numbers[middle::_SCALE, middle::_SCALE, 0]
    distances = np.array([*(layer.distance for layer in view.layers), 1.0])
    height, width = nearest.shape
    y, x = np.mgrid[:height, :width] + 0.5
    rays = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.linalg.inv(lens.intrinsics).T
    turn, shift = lens.from_first[:3, :3], lens.from_first[:3, 3]
    towards = _FACES @ turn.T
    depth = (distances[nearest] + towards @ shift) / (rays @ towards)
    return torch.from_numpy(depth.astype(np.float32))


def save_depth(view: View, file: Path) -> None:
    """Save the depth of the first picture and the focal length, as Depth Pro writes them (npz)."""
    depth = depth_of(view, first_lens(view)).numpy()
    np.savez(file, depth=depth, focallength_px=np.float32(view.intrinsics[0, 0]))


def mouth_boxes(view: View, seen: list[Lens], start: int = 0) -> Tensor:
    """Bound the lips in each frame: left, top, right, bottom, in pixels. [T, 4]"""
    boxes = []
    for frame, lens in enumerate(seen, start=start):
        place = Projected(
            place_head(view.take.scene, view.part, frame), homography(view, 1.0, lens)
        )
        points = place.pixels(mouth_shape(view.part, frame))
        boxes.append([*points.min(axis=0), *points.max(axis=0)])
    return torch.tensor(boxes, dtype=torch.float32)


def _painted_numbers(view: View, lens: Lens, frame: int) -> Image.Image:
    """Paint each layer in its number; the character's is the last."""
    image = _ground(view, (0, 0, 0))
    for number, layer in enumerate(view.layers):
        canvas = Canvas(image, _SCALE, only=(number, number, number))
        canvas.paint(layer.shapes, _first_picture(view, layer.distance, lens))
    number = len(view.layers)
    canvas = Canvas(image, _SCALE, only=(number, number, number))
    _paint_character(view, Figure(view.part.character), canvas, frame, lens)
    return image


def _paint_character(view: View, figure: Figure, canvas: Canvas, frame: int, lens: Lens) -> None:
    scene, part, plane = view.take.scene, view.part, homography(view, 1.0, lens)
    head = Projected(place_head(scene, part, frame), plane)
    body = Projected(place_body(scene, part, frame), plane)
    figure.paint(canvas, head, body, pose(part, frame))


def _first_picture(view: View, distance: float, lens: Lens) -> Projected:
    """Where picture heights lie."""
    place = Place(np.zeros(2), float(view.take.scene.height))
    return Projected(place, homography(view, distance, lens))


def _ground(view: View, color: Color) -> Image.Image:
    scene = view.take.scene
    return Image.new("RGB", (scene.width * _SCALE, scene.height * _SCALE), color)


def _room(wall: Wall, random: np.random.Generator) -> tuple[Layer, ...]:
    distance = float(random.uniform(*_WALL_DISTANCES))
    between = 1 + (distance - 1) * random.uniform(0.35, 0.65)
    return Layer(distance, _on_wall(wall, random)), Layer(between, _lamp(random))


def _on_wall(wall: Wall, random: np.random.Generator) -> tuple[Shape, ...]:
    """Hang pictures and windows in rows, and lay a floor."""
    shade, floor = shaded(WALLS[wall.color]), random.uniform(0.75, 0.95)
    shapes = [_box(-_REACH - 1, floor, 2 * _REACH + 3, 2 * _REACH, shade)]
    for row in np.arange(floor - _CELL, -_REACH, -_CELL):
        for column in np.arange(-_REACH + random.uniform(0, _CELL), 1 + _REACH, _CELL):
            x, y = random.uniform(-0.03, 0.03, size=2) + (column, row)
            shapes += _thing(float(x), float(y), random)
    return tuple(shapes)


def _thing(x: float, y: float, random: np.random.Generator) -> list[Shape]:
    """Draw a disc, a window or a picture, or leave the place empty."""
    color, chance = _bright(random), random.random()
    width, height = random.uniform(0.5, 0.75, size=2) * _CELL
    if chance < 0.15:
        return []
    if chance < 0.4:
        return [Shape(oval(x, y, width / 2, width / 2), color, line=0.02)]
    box = _box(x - width / 2, y - height / 2, width, height, color, line=0.02)
    if chance < 0.8:
        return [box]
    pane = _box(x - width / 3, y - height / 3, width / 1.5, height / 1.5, SKY)
    return [box, pane]


def _lamp(random: np.random.Generator) -> tuple[Shape, ...]:
    """Stand a lamp beside the character, at either side."""
    x = 0.5 + random.choice([-1, 1]) * random.uniform(0.3, 0.5)
    top, half = random.uniform(0.1, 0.4), random.uniform(0.09, 0.13)
    shade = np.array(
        [(x - half, top + 0.2), (x - 0.6 * half, top), (x + 0.6 * half, top), (x + half, top + 0.2)]
    )
    pole = _box(x - 0.03, top + 0.15, 0.06, 2.5, shaded(_bright(random)))
    return pole, Shape(shade, _bright(random), line=0.02)


def _box(
    left: float, top: float, width: float, height: float, color: Color, line: float = 0.0
) -> Shape:
    right, bottom = left + width, top + height
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    return Shape(corners, color, line=line, color=INK)


def _bright(random: np.random.Generator) -> Color:
    names = [name for name in CLOTHES if name not in RARE]
    return CLOTHES[names[random.integers(len(names))]]
