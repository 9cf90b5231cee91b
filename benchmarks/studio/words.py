"""Captions whose colours can be told apart in a picture, and who tells them."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kit.draws import seed_of
from kit.metrics.identity import NEAR
from kit.studio.characters import CLOTHES, HAIR, RARE, SKINS, WALLS, Color

_APART = 95.0
"""RGB distance at which two colours of a caption are not taken for each other."""

_PALETTES = {"hair": HAIR, "clothes": CLOTHES, "wall": WALLS}


@dataclass(frozen=True)
class Order:
    """What a caption asks for: names of colours.

    Attributes:
        person: such as girl.
        colors: of hair, clothes and wall.
    """

    person: str
    colors: dict[str, str]

    @property
    def caption(self) -> str:
        """Put the order into words, as the base was trained on them."""
        hair, clothes, wall = (self.colors[part] for part in _PALETTES)
        return (
            f"medium shot of a {self.person} with short {hair} hair in a {clothes} hoodie, "
            f"on a {wall} background, talking"
        )


def draw_order(index: int) -> Order:
    """Draw the index-th order, its colours far from each other and from the skin."""
    random = np.random.default_rng(seed_of("order", index))
    while True:
        colors = {part: _draw(palette, random) for part, palette in _PALETTES.items()}
        seen = [SKINS["fair"], *(_PALETTES[part][name] for part, name in colors.items())]
        if all(_distance(*pair) >= _APART for pair in itertools.combinations(seen, 2)):
            return Order(("girl", "boy", "woman", "man")[random.integers(4)], colors)


def obeyed(frames: Tensor, order: Order) -> dict[str, bool]:
    """Tell for each part whether no other colour of its palette covers more of the pictures.

    A colour that looks like what another part was asked to be is not counted against a part.

    Args:
        frames: uint8 [T, height, width, 3].
        order: what was asked for.
    """
    answers = {}
    for part, name in order.colors.items():
        palette = _PALETTES[part]
        others = [_PALETTES[other][order.colors[other]] for other in _PALETTES if other != part]
        others.append(SKINS["fair"])
        rivals = [
            rival
            for rival, color in palette.items()
            if rival not in RARE and all(_distance(color, other) >= _APART for other in others)
        ]
        shares = {rival: _share(frames, palette[rival]) for rival in {*rivals, name}}
        answers[part] = max(shares, key=lambda rival: shares[rival]) == name
    return answers


def _draw(palette: dict[str, Color], random: np.random.Generator) -> str:
    names = [name for name in palette if name not in RARE]
    return names[random.integers(len(names))]


def _distance(one: Color, other: Color) -> float:
    return float(np.linalg.norm(np.subtract(one, other)))


def _share(frames: Tensor, color: Color) -> float:
    distance = (frames.float() - torch.tensor(color)).norm(dim=-1)
    return torch.exp(distance.square() / (-2 * NEAR**2)).mean().item()
