"""Write raw shards of the drawn world, whose every mouth, head and colour is known.

Run: python data/prepare_studio.py shards/studio --split train --clips 600 --stills 200
"""

import argparse
import logging
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kit.data.fields import INDEX_NAME
from kit.data.writer import ShardWriter
from kit.draws import seed_of
from kit.errors import InputError
from kit.studio.characters import GUESTS, SPLITS
from kit.studio.drawing import paint_frames
from kit.studio.mouth import FPS
from kit.studio.scenes import Take, World, draw_clip, draw_still, encode_take
from kit.studio.voices import Corpus, build_corpus

log = logging.getLogger("prepare_studio")

# Pictures with two characters are half as wide again, and bases want multiples of 16.
_SIZE_STEP = 32
_SHEET_COLUMNS = 8
_SHEET_SCALE = 3


@dataclass(frozen=True)
class Job:
    """What every process needs to make any sample."""

    world: World
    num_frames: int
    speech: Path

    def take(self, kind: str, index: int) -> Take:
        """Make a clip or a still."""
        if kind == "still":
            return draw_still(self.world, index)
        return draw_clip(self.world, index, self.num_frames, _corpus(self.speech, self.world))


def main(words: list[str]) -> None:
    """Read the command line and write the shards."""
    options = _read(words)
    _check(options)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    world = World(options.split, options.seed, options.height, options.two_speakers, options.guest)
    num_frames = max(1, round(options.seconds * FPS / 4)) * 4 + 1
    speech = options.speech or options.out.absolute().parent / "speech"
    # A corpus that was named is used as it is: it may be one of the shipped ones.
    if options.speech is None or not (speech / options.split).exists():
        build_corpus(speech, options.split, options.speech_seconds)
    job = Job(world, num_frames, speech)
    wanted = [("clip", options.first + number) for number in range(options.clips)]
    wanted += [("still", options.first + number) for number in range(options.stills)]
    if options.sheet is not None:
        save_sheet(job, wanted, options.sheet)
    with ShardWriter(options.out, "raw", max_samples=64) as writer:
        for count, (key, members) in enumerate(_made(job, wanted, options.processes), start=1):
            writer.write(key, members)
            if count % 50 == 0 or count == len(wanted):
                log.info("%d of %d", count, len(wanted))


def make(job: Job, place: tuple[str, int]) -> tuple[str, dict[str, bytes]]:
    """Make the key and the members of one sample."""
    torch.set_num_threads(1)
    take = job.take(*place)
    return take.key, encode_take(take)


def save_sheet(job: Job, wanted: list[tuple[str, int]], path: Path, count: int = 48) -> None:
    """Save one frame of each of some samples, enlarged without smoothing, for the eye."""
    random = np.random.default_rng(seed_of("sheet"))
    height, cell = job.world.height * _SHEET_SCALE, job.world.height * _SHEET_SCALE * 3 // 2
    chosen = random.permutation(len(wanted))[:count]
    rows = -(-len(chosen) // _SHEET_COLUMNS)
    sheet = Image.new("RGB", (cell * min(_SHEET_COLUMNS, len(chosen)), height * rows), "white")
    for number, place in enumerate(chosen):
        scene = job.take(*wanted[place]).scene
        frame = int(random.integers(scene.num_frames))
        picture = Image.fromarray(next(islice(paint_frames(scene), frame, None)))
        size = (scene.width * _SHEET_SCALE, height)
        spot = (number % _SHEET_COLUMNS * cell, number // _SHEET_COLUMNS * height)
        sheet.paste(picture.resize(size, Image.Resampling.NEAREST), spot)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _check(options: argparse.Namespace) -> None:
    if options.height < _SIZE_STEP or options.height % _SIZE_STEP:
        raise InputError(f"--height: {options.height} is not a multiple of {_SIZE_STEP}")
    if not 0 <= options.two_speakers <= 1:
        raise InputError(f"--two-speakers: {options.two_speakers} is not from 0 to 1")
    if (options.out / INDEX_NAME).exists():
        raise InputError(f"{options.out} already holds shards; give another folder")


def _made(
    job: Job, wanted: list[tuple[str, int]], num_processes: int
) -> Iterator[tuple[str, dict[str, bytes]]]:
    if num_processes == 1:
        yield from map(partial(make, job), wanted)
        return
    # A fork of a process in which torch has computed may hang.
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        yield from pool.imap(partial(make, job), wanted, chunksize=4)


@lru_cache(maxsize=1)
def _corpus(folder: Path, world: World) -> Corpus:
    return Corpus(folder, world.split)


def _read(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write raw shards of the drawn world.")
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--clips", type=int, default=600)
    parser.add_argument("--stills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each clip")
    parser.add_argument("--height", type=int, default=64, help="of the pictures, in pixels")
    parser.add_argument("--two-speakers", type=float, default=0.25, help="their share, 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="of the world")
    parser.add_argument("--guest", choices=tuple(GUESTS), help="the one character of all samples")
    parser.add_argument(
        "--from", type=int, default=0, dest="first", help="number of the first clip and still"
    )
    parser.add_argument("--speech", type=Path, help="its folder; default: `speech` beside OUT")
    parser.add_argument("--speech-seconds", type=float, default=1200.0, help="to record if need be")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sheet", type=Path, help="save a contact sheet here")
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
