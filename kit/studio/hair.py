"""Hair, ribbons and hats in head units: what lies behind the face, and what falls over it."""

import numpy as np

from kit.studio.characters import HAIR, WALLS, Accessory, Character, Color, blended, shaded
from kit.studio.shapes import Shape, curve, mirrored, oval

_CROWN = (
    (-1.06, 0.12), (-1.2, -0.45), (-0.86, -1.06), (0.0, -1.3), (0.86, -1.06), (1.2, -0.45),
    (1.06, 0.12),
)  # fmt: skip


def back_hair(character: Character) -> list[Shape]:
    """List what is painted before the face."""
    color = HAIR[character.hair]
    dark = shaded(color)
    cap = Shape(oval(0, -0.12, 1.16, 1.14), dark)
    match character.hair_style:
        case "short":
            return [Shape(oval(0, -0.2, 1.12, 1.06), dark)]
        case "bobbed":
            return [cap, Shape(_bob(), dark)]
        case "long":
            return [cap, Shape(_curtain(), dark)]
        case "twin-tailed":
            return [*_both(_tail(), color, dark), cap]
        case "bun":
            return [Shape(oval(0, -1.38, 0.44, 0.38), color), *_bun_lines(dark), cap]
        case "ponytail":
            return [*_ponytail(color, dark), cap]
        case "spiky":
            return [Shape(_spikes(), color), cap]


def front_hair(character: Character) -> list[Shape]:
    """List what is painted over the face: fringe, side locks, shine."""
    color = HAIR[character.hair]
    shine = blended(color, (255, 255, 255), 0.5)
    gleam = curve((-0.66, -0.78), (-0.36, -0.94), (-0.02, -0.98), (0.24, -0.96))
    shapes = [Shape(_fringe(character), color), Shape(gleam, None, 0.09, shine)]
    if character.hair_style in ("bobbed", "long", "twin-tailed"):
        lock = curve((0.98, -0.3), (1.18, 0.2), (1.1, 0.84), (0.92, 0.3), closed=True)
        shapes += [Shape(lock, color), Shape(mirrored(lock), color)]
    return shapes


def worn_on_hair(accessory: Accessory, color: Color) -> list[Shape]:
    """List the ribbon or the hat, if there is one."""
    if accessory == "ribbon":
        wing = curve((0.0, 0.0), (0.5, -0.34), (0.56, 0.28), closed=True)
        knot = np.array([0.62, -1.12])
        return [
            Shape(wing + knot, color),
            Shape(mirrored(wing) + knot, color),
            Shape(oval(0.62, -1.12, 0.13, 0.14), shaded(color)),
        ]
    if accessory == "hat":
        dome = curve((-1.02, -0.72), (-0.86, -1.34), (0, -1.56), (0.86, -1.34), (1.02, -0.72))
        brim = curve((-1.3, -0.66), (0, -0.98), (1.3, -0.66), (0, -0.72), closed=True)
        return [Shape(dome, color), Shape(brim, shaded(color))]
    return []


def accessory_color(character: Character) -> Color:
    """Choose the wall colour that is farthest from the hair, so that both are seen."""
    hair = np.array(HAIR[character.hair])
    names = ("yellow", "purple", "pink", "white")
    name = max(names, key=lambda name: float(np.linalg.norm(np.array(WALLS[name]) - hair)))
    return blended(WALLS[name], (255, 255, 255), 0.1)


def _fringe(character: Character) -> np.ndarray:
    edges: dict[str, tuple[tuple[float, float], ...]] = {
        "straight": ((0.9, -0.2), (0.5, -0.32), (0, -0.34), (-0.5, -0.32), (-0.9, -0.2)),
        "swept": ((0.94, -0.24), (0.72, -0.7), (0.3, -0.4), (-0.3, -0.26), (-0.86, -0.06)),
        "pointed": (
            (0.86, -0.46), (0.62, -0.22), (0.48, -0.62), (0.2, -0.28), (-0.02, -0.66),
            (-0.34, -0.22), (-0.5, -0.62), (-0.7, -0.2), (-0.86, -0.46),
        ),
    }  # fmt: skip
    short = character.hair_style in ("short", "spiky")
    crown = tuple((x, min(y, -0.1) if short else y) for x, y in _CROWN)
    return curve(*crown, *edges[character.fringe], closed=True)


def _both(outline: np.ndarray, color: Color, dark: Color) -> list[Shape]:
    strand = curve((1.24, -0.4), (1.46, 0.1), (1.44, 0.7))
    right = [Shape(outline, color), Shape(strand, None, color=dark)]
    left = [Shape(mirrored(outline), color), Shape(mirrored(strand), None, color=dark)]
    return right + left


def _tail() -> np.ndarray:
    return curve(
        (1.0, -0.75), (1.44, -0.68), (1.7, 0.1), (1.52, 1.2), (1.32, 0.6), (1.0, 0.0), closed=True
    )


def _bob() -> np.ndarray:
    return curve(
        (-1.12, -0.3), (-1.26, 0.5), (-0.98, 1.02), (0, 1.0), (0.98, 1.02), (1.26, 0.5),
        (1.12, -0.3), closed=True,
    )  # fmt: skip


def _curtain() -> np.ndarray:
    return curve(
        (-1.14, -0.3), (-1.32, 0.8), (-1.24, 2.1), (0, 2.3), (1.24, 2.1), (1.32, 0.8),
        (1.14, -0.3), closed=True,
    )  # fmt: skip


def _ponytail(color: Color, dark: Color) -> list[Shape]:
    tail = curve(
        (0.5, -1.1), (1.1, -1.4), (1.66, -0.8), (1.62, 0.3), (1.3, 0.9), (1.3, 0.1), (0.95, -0.5),
        closed=True,
    )  # fmt: skip
    strand = curve((1.1, -1.1), (1.42, -0.6), (1.46, 0.2))
    return [Shape(tail, color), Shape(strand, None, color=dark)]


def _bun_lines(dark: Color) -> list[Shape]:
    return [Shape(curve((-0.22, -1.46), (0.04, -1.58), (0.26, -1.44)), None, color=dark)]


def _spikes() -> np.ndarray:
    tips = np.radians(np.linspace(168, 372, 8))
    valleys = (tips[:-1] + tips[1:]) / 2
    angles = np.empty(len(tips) + len(valleys))
    angles[0::2], angles[1::2] = tips, valleys
    radii = np.where(np.arange(len(angles)) % 2 == 0, 1.5, 1.16)
    points = np.stack([radii * np.cos(angles), radii * 0.98 * np.sin(angles) - 0.1], axis=1)
    return np.vstack([points, [[0.9, 0.5], [-0.9, 0.5]]])
