"""Test scenes of the drawn world, made ready for the sampler, with what is known of them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kit.masks import latent_masks
from kit.metrics.mouth import box_regions, opening_by_color
from kit.metrics.report import Known
from kit.models.base import Geometry
from kit.sampling.frames import StillSource
from kit.sampling.scene import Scene
from kit.studio.captions import Speaking
from kit.studio.characters import MOUTH
from kit.studio.drawing import paint_frames
from kit.studio.mouth import NEUTRAL_WIDTH, Mouth
from kit.studio.scenes import Take, World, draw_clip, speaker_mask, truth
from kit.studio.voices import Corpus

SPEECH = Path("runs/studio/shards/speech")

_MARGIN = 4.0
"""Pixels around all places of the drawn mouth: the made head moves in its own way."""

_WHOLE_SEED = 77
"""World seed of the evaluation; the data that the base saw have another."""


def takes(
    speaking: Sequence[Speaking], count: int, num_frames: int, guest: str | None = None
) -> Iterator[Take]:
    """Draw takes of the test split in which these speak.

    Args:
        speaking: who may speak.
        count: takes.
        num_frames: of each.
        guest: the one character of all; None draws test characters.
    """
    is_pair = not {"one", "nobody"} & set(speaking)
    world = World("test", _WHOLE_SEED, two_speakers=float(is_pair), guest=guest)
    corpus = Corpus(SPEECH, "test")
    index = 0
    while count:
        take = draw_clip(world, index, num_frames, corpus)
        index += 1
        if take.speaking in speaking:
            count -= 1
            yield take


def portrait(take: Take) -> np.ndarray:
    """Paint the first frame. uint8 [height, width, 3]"""
    return next(iter(paint_frames(take.scene)))


def to_scene(take: Take, geometry: Geometry) -> Scene:
    """Make what the sampler is given: the first frame, the caption, the sound, the places."""
    picture = portrait(take)
    numbers = range(len(take.scene.parts))
    masks = np.stack([speaker_mask(take.scene, number) for number in numbers])
    if len(masks) == 1:
        masks = np.full_like(masks, 255)
    return Scene(
        take.caption,
        take.tracks,
        StillSource(picture, (take.scene.height, take.scene.width)),
        latent_masks(torch.from_numpy(masks), geometry.pixel_stride),
    )


def known(take: Take, number: int, colors: Sequence[str] = ()) -> Known:
    """Tell what is known of a character: where its mouth is, how it looks closed and wide open."""
    facts = truth(take)
    boxes = torch.tensor([frame["characters"][number]["mouth_box"] for frame in facts["frames"]])
    around = torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])
    region = box_regions(around, take.scene.height, take.scene.width, _MARGIN)
    closed, full = (_area(take, number, opening, region) for opening in (0.0, 1.0))
    rgb = facts["characters"][number]["rgb"]
    return Known(
        region=region,
        mouth_color=MOUTH,
        full_opening=full,
        closed_opening=closed,
        reference=torch.from_numpy(portrait(take)),
        colors={name: tuple(rgb[name]) for name in colors},
    )


def _area(take: Take, number: int, opening: float, region: Tensor) -> float:
    parts = list(take.scene.parts)
    shape = np.ones(take.scene.num_frames)
    parts[number] = replace(parts[number], mouth=Mouth(opening * shape, NEUTRAL_WIDTH * shape))
    picture = next(iter(paint_frames(replace(take.scene, parts=tuple(parts)))))
    return opening_by_color(torch.from_numpy(picture)[None], region, MOUTH).item()
