"""Write encoded views of the drawn world: talking characters, a moving camera, and its renders.

Run: python data/prepare_studio_views.py runs/studio/views/train --views 2400
"""

import argparse
import importlib
import logging
import multiprocessing
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kit.data.clips import RawSample
from kit.data.encode import ClipEncoder, to_video
from kit.draws import seed_of
from kit.errors import InputError
from kit.shipped import shipped
from kit.studio.characters import SPLITS
from kit.studio.scenes import World
from kit.studio.views import depth_of, draw_view, lenses, paint_view
from kit.studio.voices import Corpus

cameras: Any = importlib.import_module("kit.plugins.uni3c.cameras")
examples: Any = importlib.import_module("kit.plugins.uni3c.examples")
points: Any = importlib.import_module("kit.plugins.uni3c.points")

log = logging.getLogger("prepare_studio_views")

WINDOW, CONTEXT = 33, 9
STRIDE = WINDOW - CONTEXT
PER_FILE, TEXT_LENGTH = 50, 64
STILL_SHARE = 0.2

RANGES = {
    "x_offset": (-0.18, 0.18),
    "y_offset": (-0.12, 0.12),
    "distance": (0.78, 1.3),
    "azimuth": (-12.0, 12.0),
    "elevation": (-9.0, 6.0),
    "zoom": (0.8, 1.25),
}
"""How far a camera goes at most; distances in units of the character's."""


@dataclass(frozen=True)
class Job:
    """What every process needs to make any file."""

    out: Path
    world: World
    speech: Path
    base: Path


@dataclass(frozen=True)
class Shot:
    """Which frames of a video are seen, and from where its render is made.

    Attributes:
        start: first frame of the window.
        num_frames: of the whole video.
        anchor: frame whose picture is the reference and is rendered: the window's first, or the
            video's.
        route: of the camera.
    """

    start: int
    num_frames: int
    anchor: int
    route: Any


def main(words: list[str]) -> None:
    """Read the command line and write the files that are missing."""
    options = _read(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    job = Job(options.out, World(options.split, options.seed), options.speech, options.base)
    starts = range(0, options.views, PER_FILE)
    chunks = [range(start, min(start + PER_FILE, options.views)) for start in starts]
    # A fork of a process in which torch has computed may hang.
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for count, _ in enumerate(pool.imap_unordered(partial(write, job), chunks), start=1):
            log.info("%d of %d files", count, len(chunks))


def write(job: Job, numbers: range) -> None:
    """Write one file of views, unless it is there."""
    torch.set_num_threads(1)
    file = job.out / examples.PATTERN.replace("*", f"{numbers.start:05d}")
    if not file.exists():
        made = [make(job, number) for number in numbers]
        examples.write_examples(file, dict(made))


@torch.no_grad()
def make(job: Job, number: int) -> tuple[str, Mapping[str, Tensor]]:
    """Make the key and the tensors of one view."""
    shot = draw_shot(job.world, number)
    view = draw_view(job.world, number, shot.num_frames, _corpus(job.speech, job.world))
    way = cameras.follow(shot.route, shot.num_frames, view.intrinsics, radius=1.0)
    window = slice(shot.start, shot.start + WINDOW)
    seen = lenses(*way)
    pixels = np.stack(list(paint_view(view, seen[window], shot.start)))
    anchor = next(paint_view(view, [seen[shot.anchor]], shot.anchor))
    raw = RawSample(
        key=view.take.key,
        epoch=0,
        index=number,
        start=shot.start,
        pixels=pixels,
        reference=anchor,
        tracks=view.take.tracks,
        caption=view.take.caption,
        speaker_masks=torch.ones(1, *(side // 8 for side in anchor.shape[:2])),
        num_context_frames=CONTEXT if shot.start else 1,
    )
    depth = depth_of(view, seen[shot.anchor], shot.anchor)
    told = cameras.Cameras(way.intrinsics[0], way.w2c[window])
    render = render_from(anchor, depth, shot, way, window)
    return raw.key, examples.encode_example(_encoder(job.base), raw, render, told)


def render_from(picture: Any, depth: Tensor, shot: Shot, way: Any, window: slice) -> Any:
    """Render the window from the picture and the depth of its anchor, as the sampler does."""
    image, size = to_video(picture[None])[:, 0], tuple(depth.shape)
    camera = way.intrinsics[shot.anchor], way.w2c[shot.anchor]
    cloud = points.lift(image, points.contract_depth(depth), *camera)
    filmed = points.film(cloud, cameras.Cameras(*(part[window] for part in way)), size)
    return points.begin_with(image, filmed) if shot.anchor == shot.start else filmed


def draw_shot(world: World, number: int) -> Shot:
    """Draw a window: of each two one begins a video, the other goes on with it."""
    random = np.random.default_rng(seed_of("shot", world.seed, world.split, number))
    num_chunks = int(random.choice([1, 2, 3], p=[0.5, 0.3, 0.2])) + number % 2
    start = STRIDE * int(random.integers(1, num_chunks)) if number % 2 else 0
    anchor = start if random.random() < 0.5 else 0
    return Shot(start, WINDOW + STRIDE * (num_chunks - 1), anchor, draw_route(random))


def draw_route(random: np.random.Generator) -> Any:
    """Draw where a camera goes: nowhere, or in one to three ways at once."""
    if random.random() < STILL_SHARE:
        return cameras.Trajectory()
    count = int(random.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))
    ways = random.choice(list(RANGES), size=count, replace=False)
    return cameras.Trajectory(**{str(way): float(random.uniform(*RANGES[way])) for way in ways})


@lru_cache(maxsize=1)
def _corpus(folder: Path, world: World) -> Corpus:
    return Corpus(folder, world.split)


@lru_cache(maxsize=1)
def _encoder(base: Path) -> ClipEncoder:
    encoder: ClipEncoder = examples.open_encoder(base, TEXT_LENGTH)
    return encoder


def _read(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write encoded views of the drawn world.")
    parser.add_argument("out", type=Path, help="folder for the files")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--views", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0, help="of the world")
    parser.add_argument("--base", type=Path, default=shipped("data") / "studio_base")
    parser.add_argument("--speech", type=Path, default=shipped("data") / "sample" / "voices")
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
