"""A character's figure: what stays the same is laid out once, face and mouth for every frame."""

from dataclasses import dataclass

import numpy as np

from kit.studio.characters import CLOTHES, EYES, INK, MOUTH, SKINS, Character, blended, shaded
from kit.studio.hair import accessory_color, back_hair, front_hair, worn_on_hair
from kit.studio.shapes import LINE, Canvas, Floats, Shape, Spot, curve, mirrored, oval

WHITE = (255, 255, 255)

_LIP_LINE = 0.045
_MOUTH_Y = 0.56
_HALF_ROUND = np.linspace(0, np.pi, 13)


@dataclass(frozen=True)
class Pose:
    """What changes from frame to frame.

    Attributes:
        opening: of the mouth, 0 to 1.
        width: of the mouth, 0 rounded to 1 spread.
        eyes: 0 closed to 1 open.
        gaze: right and down, -1 to 1.
    """

    opening: float
    width: float
    eyes: float = 1.0
    gaze: tuple[float, float] = (0.0, 0.0)


class Figure:
    """Paints one character."""

    def __init__(self, character: Character) -> None:
        self._character = character
        self._back = back_hair(character)
        self._body = _body(character)
        self._face = _face(character)
        self._eyes = [_eye_whites(character, side) for side in (-1, 1)]
        self._front = [
            *front_hair(character),
            *_brows(character),
            *worn_on_hair(character.accessory, accessory_color(character)),
            *_worn_on_face(character),
        ]

    def paint(self, canvas: Canvas, head: Spot, body: Spot, pose: Pose) -> None:
        """Paint the character with its head and body where they are in this frame."""
        canvas.paint(self._back, head)
        canvas.paint(self._body, body)
        eyes = [
            shape
            for side, whites in zip((-1, 1), self._eyes, strict=True)
            for shape in _eye(self._character, side, whites, pose)
        ]
        mouth = mouth_shapes(pose, self._character.smile)
        canvas.paint([*self._face, *eyes, *mouth, *self._front], head)


def mouth_shapes(pose: Pose, smile: float) -> list[Shape]:
    """Lay out the mouth: dark lips, and inside them an area proportional to its opening."""
    lips = Shape(mouth_outline(pose.opening, pose.width, smile, _LIP_LINE), INK, line=0)
    if pose.opening == 0:
        return [lips]
    return [lips, Shape(mouth_outline(pose.opening, pose.width, smile), MOUTH, line=0)]


def mouth_outline(opening: float, width: float, smile: float, margin: float = 0.0) -> Floats:
    """Trace the opening of a mouth in head units, enlarged by a margin. [N, 2]"""
    half = 0.3 + 0.12 * width + margin
    up, down = 0.12 * opening + margin, 0.4 * opening + margin
    x, y = half * np.cos(_HALF_ROUND), np.sin(_HALF_ROUND)
    upper = np.stack([x, -up * y], axis=1)
    lower = np.stack([-x, down * y], axis=1)
    points = np.vstack([upper, lower])
    # The smile fades as the mouth opens, or its corners would leave the oval.
    points[:, 1] += _MOUTH_Y - smile * (1 - opening) * 0.7 * points[:, 0] ** 2
    return points


def _face(character: Character) -> list[Shape]:
    skin = SKINS[character.skin]
    dark = shaded(skin)
    face = curve(
        (-0.93, -0.3), (-0.9, 0.3), (-0.6, 0.8), (0, 1.06), (0.6, 0.8), (0.9, 0.3), (0.93, -0.3),
        (0.5, -0.9), (-0.5, -0.9), closed=True,
    )  # fmt: skip
    brow_shadow = curve(
        (-0.9, -0.25), (-0.5, -0.9), (0.5, -0.9), (0.9, -0.25), (0.45, -0.16), (-0.45, -0.16),
        closed=True,
    )  # fmt: skip
    blush = blended(skin, (255, 120, 150), 0.35)
    nose = curve((-0.03, 0.34), (0.04, 0.4), (-0.02, 0.43))
    ear = oval(0.95, 0.12, 0.15, 0.24)
    return [
        Shape(ear, skin),
        Shape(mirrored(ear), skin),
        Shape(face, skin),
        Shape(brow_shadow, dark, line=0),
        Shape(oval(-0.62, 0.48, 0.16, 0.08), blush, line=0),
        Shape(oval(0.62, 0.48, 0.16, 0.08), blush, line=0),
        Shape(nose, None, color=blended(dark, INK, 0.3)),
    ]


def _body(character: Character) -> list[Shape]:
    skin, cloth = SKINS[character.skin], CLOTHES[character.clothes]
    dark = shaded(cloth)
    shoulders = curve(
        (0, 1.1), (0.62, 1.2), (1.22, 1.5), (1.5, 2.4), (1.6, 4.6), (-1.6, 4.6), (-1.5, 2.4),
        (-1.22, 1.5), (-0.62, 1.2), closed=True,
    )  # fmt: skip
    neck = Shape(np.array([(-0.3, 0.7), (0.3, 0.7), (0.34, 1.3), (0, 1.48), (-0.34, 1.3)]), skin)
    throat = Shape(
        np.array([(-0.3, 0.8), (0.3, 0.8), (0.3, 1.0), (0, 1.2), (-0.3, 1.0)]), shaded(skin), line=0
    )
    arm = curve((0.98, 2.0), (1.06, 3.0), (1.02, 4.5))
    folds = [Shape(arm, None, color=INK), Shape(mirrored(arm), None, color=INK)]
    top = Shape(shoulders, skin if character.garment == "dress" else cloth)
    match character.garment:
        case "hoodie":
            hood = curve((-0.9, 1.3), (-0.4, 1.05), (0, 1.6), (0.4, 1.05), (0.9, 1.3), (0, 1.95),
                         closed=True)  # fmt: skip
            cord = np.array([(0.2, 1.75), (0.2, 2.3)])
            cords = [Shape(points, None, color=WHITE) for points in (cord, mirrored(cord))]
            return [top, *folds, neck, throat, Shape(hood, dark), *cords]
        case "shirt":
            collar = np.array([(0.3, 1.1), (0, 1.55), (0.26, 1.9), (0.56, 1.3)])
            seam = Shape(np.array([(0.0, 1.6), (0.0, 4.6)]), None)
            light = blended(cloth, WHITE, 0.45)
            collars = [Shape(collar, light), Shape(mirrored(collar), light)]
            return [top, *folds, seam, neck, throat, *collars]
        case "dress":
            front = np.array(
                [(-0.95, 1.95), (-0.6, 2.05), (0, 1.9), (0.6, 2.05), (0.95, 1.95), (1.1, 4.6),
                 (-1.1, 4.6)]
            )  # fmt: skip
            strap = np.array([(0.62, 1.22), (0.72, 2.0)])
            straps = [Shape(points, None, 0.14, dark) for points in (strap, mirrored(strap))]
            return [top, *folds, neck, throat, *straps, Shape(front, cloth)]
        case "sweater":
            roll = curve((-0.42, 1.02), (0, 1.16), (0.42, 1.02), (0.5, 1.38), (0, 1.54),
                         (-0.5, 1.38), closed=True)  # fmt: skip
            bands = [
                Shape(np.array([(-0.94, y), (0.94, y)]), None, 0.16, dark) for y in (2.1, 2.6, 3.1)
            ]
            return [top, *bands, *folds, neck, throat, Shape(roll, dark)]


def _eye_whites(character: Character, side: int) -> list[Shape]:
    return [Shape(oval(0.43 * side, 0.08, 0.25, 0.31 * character.eye_height), WHITE, line=0)]


def _eye(character: Character, side: int, whites: list[Shape], pose: Pose) -> list[Shape]:
    x, y, tall = 0.43 * side, 0.08, 0.31 * character.eye_height * pose.eyes
    if pose.eyes < 0.2:
        closed = curve((x - 0.26, y + 0.08), (x, y + 0.2), (x + 0.26, y + 0.08))
        return [Shape(closed, None, 0.08)]
    color = EYES[character.eyes]
    iris_x, iris_y = x + 0.07 * pose.gaze[0], y + 0.06 * pose.gaze[1] * pose.eyes
    arch = ((-0.3, 0.35), (-0.18, 0.86), (0, 1.06), (0.18, 0.86), (0.3, 0.35))
    lid = curve(*((x + across, y - up * tall) for across, up in arch), steps=3)
    white = whites[0] if pose.eyes == 1 else Shape(oval(x, y, 0.25, tall), WHITE, line=0)
    return [
        white,
        Shape(oval(iris_x, iris_y, 0.19, 0.92 * tall), color, line=0),
        Shape(oval(iris_x, iris_y - 0.1 * tall, 0.085, 0.5 * tall, 14), INK, line=0),
        Shape(oval(iris_x - 0.07, iris_y - 0.4 * tall, 0.07, 0.24 * tall, 10), WHITE, line=0),
        Shape(lid, None, 0.09),
    ]


def _brows(character: Character) -> list[Shape]:
    slant = 0.07 * character.brow
    brow = np.array([(0.2, -0.36 + slant), (0.44, -0.43), (0.66, -0.36 - slant)])
    return [Shape(points, None, 0.06) for points in (brow, mirrored(brow))]


def _worn_on_face(character: Character) -> list[Shape]:
    if character.accessory == "glasses":
        rims = [Shape(_closed(oval(0.44 * s, 0.1, 0.37, 0.37, 20)), None, 0.07) for s in (-1, 1)]
        return [*rims, Shape(np.array([(-0.07, 0.06), (0.07, 0.06)]), None, LINE)]
    if character.accessory == "earrings":
        color = accessory_color(character)
        return [Shape(oval(1.02 * side, 0.5, 0.13, 0.17, 14), color) for side in (-1, 1)]
    return []


def _closed(points: Floats) -> Floats:
    return np.vstack([points, points[:1]])
