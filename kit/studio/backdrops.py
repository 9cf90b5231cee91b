"""What is behind the characters, larger than the picture so that the camera may move."""

import numpy as np
from PIL import Image, ImageDraw

from kit.draws import seed_of
from kit.studio.characters import WALLS, Color, Wall, blended, shaded

MARGIN = 0.2
"""How far the backdrop reaches beyond the picture on each side, in picture heights."""

SKY: Color = (206, 232, 252)


def paint_backdrop(wall: Wall, height: int, width: int) -> Image.Image:
    """Paint a wall.

    Args:
        wall: what to paint.
        height: of the picture, without the margin.
        width: of the picture, without the margin.
    """
    border = round(MARGIN * height)
    image = Image.new("RGB", (width + 2 * border, height + 2 * border), WALLS[wall.color])
    draw = ImageDraw.Draw(image)
    random = np.random.default_rng(seed_of("backdrop", wall.seed))
    light, dark = _tones(WALLS[wall.color])
    match wall.backdrop:
        case "plain":
            pass
        case "gradient":
            ends = np.linspace(0, 1, image.height)
            for row, share in enumerate(ends):
                draw.line([0, row, image.width, row], fill=blended(light, dark, float(share)))
        case "striped":
            _stripe(draw, image, height * random.uniform(0.1, 0.18), light)
        case "window":
            _window(draw, image, height, random, light)
        case "room":
            floor = image.height - border - height * random.uniform(0.2, 0.35)
            draw.rectangle([0, floor, image.width, image.height], fill=dark)
            _picture(draw, image, height, random, light)
    return image


def _tones(color: Color) -> tuple[Color, Color]:
    return blended(color, (255, 255, 255), 0.4), blended(color, shaded(color), 0.6)


def _stripe(draw: ImageDraw.ImageDraw, image: Image.Image, pitch: float, light: Color) -> None:
    for left in np.arange(0, image.width, 2 * pitch):
        draw.rectangle([left, 0, left + pitch, image.height], fill=light)


def _window(
    draw: ImageDraw.ImageDraw,
    image: Image.Image,
    height: int,
    random: np.random.Generator,
    frame: Color,
) -> None:
    side = height * 0.5
    left, top = random.uniform(0.1, 0.9) * (image.width - side), random.uniform(0.15, 0.3) * height
    bar = height * 0.03
    draw.rectangle([left - bar, top - bar, left + side + bar, top + side + bar], fill=frame)
    for column in (0, 1):
        for row in (0, 1):
            x, y = left + column * (side + bar) / 2, top + row * (side + bar) / 2
            draw.rectangle([x, y, x + (side - bar) / 2, y + (side - bar) / 2], fill=SKY)


def _picture(
    draw: ImageDraw.ImageDraw,
    image: Image.Image,
    height: int,
    random: np.random.Generator,
    light: Color,
) -> None:
    side = height * random.uniform(0.18, 0.28)
    left, top = random.uniform(0.15, 0.85) * (image.width - side), height * 0.3
    draw.rectangle([left, top, left + side, top + side * 0.8], fill=light)
