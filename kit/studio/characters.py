"""Who is drawn: every attribute of a character follows from a seed.

Character seeds are split once and for all by their last digit: 8 is `val`, 9 is `test`, the
others are `train`. Colours have names, and those of one palette lie far apart. A few are left to
guests, characters with a name that no seed draws: whoever learns from seeds never sees them.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from kit.draws import seed_of

Color = tuple[int, int, int]
Split = Literal["train", "val", "test"]
HairStyle = Literal["short", "bobbed", "long", "twin-tailed", "bun", "ponytail", "spiky"]
Fringe = Literal["straight", "swept", "pointed"]
Garment = Literal["hoodie", "shirt", "dress", "sweater"]
Accessory = Literal["none", "glasses", "ribbon", "hat", "earrings"]
Backdrop = Literal["plain", "gradient", "striped", "window", "room"]

SPLITS: tuple[Split, ...] = get_args(Split)

MOUTH: Color = (130, 20, 40)
"""Inside of every mouth, and of nothing else."""

INK: Color = (38, 40, 78)
"""All outlines."""

# fmt: off
SKINS: dict[str, Color] = {
    "fair": (255, 226, 206), "tan": (234, 184, 144), "brown": (188, 132, 96),
    "dark": (128, 88, 70), "blue": (150, 190, 240), "green": (164, 222, 160),
    "lilac": (216, 176, 240),
}
HAIR: dict[str, Color] = {
    "black": (60, 62, 84), "brown": (128, 84, 52), "blonde": (246, 212, 96),
    "orange": (240, 132, 48), "pink": (248, 142, 190), "blue": (62, 106, 222),
    "green": (62, 166, 88), "white": (238, 238, 246), "teal": (34, 200, 196),
}
EYES: dict[str, Color] = {
    "blue": (54, 122, 236), "green": (46, 174, 92), "brown": (134, 88, 48),
    "purple": (150, 84, 214), "amber": (244, 172, 32), "pink": (244, 112, 178),
    "lime": (170, 226, 40),
}
CLOTHES: dict[str, Color] = {
    "red": (238, 92, 88), "orange": (248, 168, 56), "yellow": (250, 222, 88),
    "green": (84, 178, 104), "blue": (74, 122, 222), "purple": (150, 98, 206),
    "white": (244, 244, 250), "black": (70, 72, 92), "magenta": (222, 52, 178),
}
WALLS: dict[str, Color] = {
    "pink": (250, 184, 206), "yellow": (252, 234, 138), "green": (166, 224, 158),
    "blue": (146, 200, 248), "purple": (188, 154, 244), "orange": (250, 176, 108),
    "grey": (148, 152, 160), "white": (248, 247, 242),
}
# fmt: on
RARE = ("teal", "lime", "magenta")
"""Colours that only guests have."""

EVERYDAY_SKINS = ("fair", "tan", "brown", "dark")
PEOPLE = ("girl", "boy", "woman", "man")

_FANTASTIC_SHARE = 0.15
_DIGITS: dict[Split, tuple[int, ...]] = {"train": tuple(range(8)), "val": (8,), "test": (9,)}


@dataclass(frozen=True)
class Character:
    """One character; colours are names in the palettes above.

    Attributes:
        seed: where everything else comes from.
        smile: how far the corners of the mouth are raised, 0 to 1.
        brow: slant of the brows, -1 worried to 1 stern.
        eye_height: 0.85 to 1.1.
    """

    seed: int
    person: str
    skin: str
    hair: str
    hair_style: HairStyle
    fringe: Fringe
    eyes: str
    clothes: str
    garment: Garment
    accessory: Accessory
    smile: float
    brow: float
    eye_height: float


@dataclass(frozen=True)
class Wall:
    """What is behind the characters: a colour of `WALLS`, and how it is used."""

    color: str
    backdrop: Backdrop
    seed: int


def character_seed(split: Split, number: int) -> int:
    """Give the number-th character seed of a split; splits share none."""
    digits = _DIGITS[split]
    return 10 * (number // len(digits)) + digits[number % len(digits)]


def split_of(seed: int) -> Split:
    """Tell which split a character belongs to."""
    return next(split for split, digits in _DIGITS.items() if seed % 10 in digits)


def draw_character(seed: int) -> Character:
    """Make the character of a seed."""
    random = np.random.default_rng(seed_of("character", seed))
    is_fantastic = random.random() < _FANTASTIC_SHARE
    skins = [skin for skin in SKINS if (skin not in EVERYDAY_SKINS) == is_fantastic]
    return Character(
        seed=seed,
        person=PEOPLE[random.integers(len(PEOPLE))],
        skin=skins[random.integers(len(skins))],
        hair=_common(HAIR, random),
        hair_style=get_args(HairStyle)[random.integers(len(get_args(HairStyle)))],
        fringe=get_args(Fringe)[random.integers(len(get_args(Fringe)))],
        eyes=_common(EYES, random),
        clothes=_common(CLOTHES, random),
        garment=get_args(Garment)[random.integers(len(get_args(Garment)))],
        accessory=get_args(Accessory)[random.integers(len(get_args(Accessory)))],
        smile=float(random.uniform(0.2, 1)),
        brow=float(random.uniform(-1, 1)),
        eye_height=float(random.uniform(0.85, 1.1)),
    )


GUESTS = {
    "mika": Character(
        seed=9,
        person="girl",
        skin="fair",
        hair="teal",
        hair_style="twin-tailed",
        fringe="pointed",
        eyes="lime",
        clothes="magenta",
        garment="hoodie",
        accessory="ribbon",
        smile=0.8,
        brow=-0.3,
        eye_height=1.05,
    )
}
"""Characters by name, to fine-tune on."""


def draw_wall(seed: int) -> Wall:
    """Make the background of a seed."""
    random = np.random.default_rng(seed_of("wall", seed))
    backdrops = get_args(Backdrop)
    color = list(WALLS)[random.integers(len(WALLS))]
    return Wall(color, backdrops[random.integers(len(backdrops))], seed)


def shaded(color: Color) -> Color:
    """Give a colour where no light falls: darker and bluer, so that red never nears `MOUTH`."""
    return blended(color, (58, 52, 118), 0.24)


def blended(color: Color, other: Color, share: float) -> Color:
    """Mix two colours; share is the other one's, 0 to 1."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(color, other, strict=True))
    return red, green, blue


def _common(palette: dict[str, Color], random: np.random.Generator) -> str:
    names = [name for name in palette if name not in RARE]
    return names[random.integers(len(names))]
