"""Captions in a few wordings; sometimes an attribute is left out."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from kit.studio.characters import EVERYDAY_SKINS, GUESTS, Backdrop, Character, Wall

Speaking = Literal["one", "left", "right", "both", "turns", "nobody", "still"]

_LEFT_OUT = 0.15

_ACTIONS: dict[Speaking, tuple[str, ...]] = {
    "one": ("speaking", "talking", "speaking to the viewer"),
    "left": ("the left one is speaking while the right one listens", "only the left one talks"),
    "right": ("the right one is speaking while the left one listens", "only the right one talks"),
    "both": ("both speaking at the same time", "both are talking"),
    "turns": ("taking turns in speaking", "first the left one speaks, then the right one"),
    "nobody": ("silent, mouth closed", "listening in silence"),
    "still": ("a still picture, mouth closed", "still image, silent"),
}
_BACKDROPS: dict[Backdrop, str] = {
    "plain": "on {} background",
    "gradient": "on {} gradient background",
    "striped": "on {} striped background",
    "window": "before {} wall with a window",
    "room": "in {} room",
}
_TEMPLATES = (
    "{who}, {where}, {framing}, {action}",
    "{framing} of {who}, {where}, {action}",
    "anime drawing of {who} {where}, {framing}, {action}",
    "{action}: {who}, {where}, {framing}",
)


def write_caption(
    characters: Sequence[Character],
    wall: Wall,
    framing: str,
    speaking: Speaking,
    random: np.random.Generator,
) -> str:
    """Describe a scene; characters stand from left to right."""
    people = [describe(character, random) for character in characters]
    if len(people) == 2:
        people = [f"{people[0]} on the left", f"{people[1]} on the right"]
    actions = _ACTIONS[speaking]
    template = _TEMPLATES[random.integers(len(_TEMPLATES))]
    return template.format(
        who=" and ".join(people),
        where=_BACKDROPS[wall.backdrop].format(f"{_article(wall.color)} {wall.color}"),
        framing=framing,
        action=actions[random.integers(len(actions))],
    )


def describe(character: Character, random: np.random.Generator) -> str:
    """Put a character into words, leaving out an attribute now and then; a guest has a name."""
    for name, guest in GUESTS.items():
        if character == guest:
            return name
    keep = random.random(5) >= _LEFT_OUT
    style = f"{character.hair_style} " if random.random() < 0.5 and keep[0] else ""
    is_noun = character.hair_style in ("bun", "ponytail")
    gathered = f"{_article(character.hair)} {character.hair} {style.strip()}"
    features = [gathered if style and is_noun else f"{style}{character.hair} hair"]
    if keep[1]:
        features.append(f"{character.eyes} eyes")
    if character.skin not in EVERYDAY_SKINS and keep[2]:
        features.append(f"{character.skin} skin")
    words = f"a {character.person} with {_listed(features)}"
    if keep[3]:
        words += f" in {_article(character.clothes)} {character.clothes} {character.garment}"
    if character.accessory != "none" and keep[4]:
        article = "" if character.accessory in ("glasses", "earrings") else "a "
        words += f" wearing {article}{character.accessory}"
    return words


def name_framing(head_height: float) -> str:
    """Name how near the camera is; head_height in picture heights."""
    if head_height >= 0.8:
        return "close-up"
    return "medium shot" if head_height >= 0.68 else "half body"


def _listed(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
