"""The base under measurement, loaded once in each process, and what it films."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kit.data.media import VideoWriter
from kit.models.base import Base, Denoiser, Encoders
from kit.run.processes import Place, load_for_sampling
from kit.run.recipes import SAMPLE, read_as
from kit.run.sample import build_sample
from kit.sampling.frames import to_pictures
from kit.sampling.hooks import Hooks
from kit.sampling.pipeline import TalkSampler, no_progress
from kit.sampling.plugin import Plugin
from kit.sampling.scene import Scene
from kit.studio.mouth import FPS

FROM_PORTRAIT, FROM_WORDS = "recipes/studio/talk.yaml", "recipes/studio/from_words.yaml"


@dataclass(frozen=True)
class Studio:
    """A base with its sampler, ready to film."""

    base: Base
    sampler: TalkSampler
    denoiser: Denoiser
    encoders: Encoders


@dataclass(frozen=True)
class Film:
    """What was made.

    Attributes:
        frames: uint8 [T, height, width, 3].
        chunk_starts: first frame that each chunk adds.
    """

    frames: Tensor
    chunk_starts: list[int]

    def beginning(self, num_chunks: int) -> "Film":
        """Keep the first chunks."""
        if num_chunks >= len(self.chunk_starts):
            return self
        stop = self.chunk_starts[num_chunks]
        return replace(self, frames=self.frames[:stop], chunk_starts=self.chunk_starts[:num_chunks])


@lru_cache(maxsize=4)
def open_studio(overrides: tuple[str, ...], recipe: str = FROM_PORTRAIT) -> Studio:
    """Load what a sample recipe names; overrides are `key=value` words."""
    torch.set_num_threads(1)
    checked = read_as(recipe, overrides, SAMPLE)
    base, sampler = build_sample(checked)
    device = torch.device("cpu")
    denoiser = load_for_sampling(base, checked["adapter"], Place(0, 1, device))
    return Studio(base, sampler, denoiser, base.load_encoders(device))


def with_plugins(studio: Studio, plugins: Mapping[str, Plugin]) -> Studio:
    """Use plugins in a studio, in this order."""
    sampler = copy(studio.sampler)
    sampler.hooks = Hooks(plugins)
    return replace(studio, sampler=sampler)


def film(studio: Studio, scene: Scene, seed: int) -> Film:
    """Sample a scene."""
    made = studio.sampler.sample(studio.denoiser, studio.encoders, scene, seed, no_progress)
    frames = torch.from_numpy(np.concatenate([to_pictures(pixels) for pixels, _ in made]))
    return Film(frames, [chunk.first_shown for chunk in studio.sampler.plan(len(frames))])


def save(path: Path, made: Film, speech: Tensor) -> None:
    """Save a film with its sound. [samples]"""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = made.frames.shape[1:3]
    with VideoWriter(path, fps=FPS, height=height, width=width, speech=speech) as writer:
        writer.write(np.asarray(made.frames))
