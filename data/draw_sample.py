"""Draw the sample: a few clips of a character that the studio base never saw, a portrait, speech.

Run: python data/draw_sample.py data/sample
Speech is recorded with espeak-ng first, beside the sample's folder, unless `--speech` names a
folder where it is recorded.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from kit.batch import SAMPLE_RATE
from kit.data.media import normalize_loudness
from kit.data.writer import ShardWriter
from kit.draws import seed_of
from kit.errors import InputError
from kit.studio.characters import GUESTS
from kit.studio.drawing import paint_frames
from kit.studio.mouth import NEUTRAL_WIDTH, Mouth
from kit.studio.scenes import World, draw_clip, draw_still, encode_take, stage
from kit.studio.views import draw_view, first_lens, paint_view, save_depth
from kit.studio.voices import Corpus, build_corpus, draw_speech, write_flac

GUEST = "mika"
SEED = 1
NUM_FRAMES = 101
PORTRAIT_HEIGHT = 256
SPEECH_SECONDS = 12.8
SPEAKER = 3
ROOM = 10


def main(words: list[str]) -> None:
    """Read the command line and draw everything."""
    parser = argparse.ArgumentParser(description="Draw the sample.")
    parser.add_argument("out", type=Path, help="folder for the sample")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--stills", type=int, default=4)
    parser.add_argument("--frames", type=int, default=NUM_FRAMES, help="of a clip, 4n + 1")
    parser.add_argument("--speech", type=Path, help="its folder; default: `speech` beside OUT")
    options = parser.parse_args(words)
    if options.speech is None:
        options.speech = options.out.absolute().parent / "speech"
        build_corpus(options.speech, "test", 300.0)
    corpus = Corpus(options.speech, "test")
    write_shards(options.out / "shards", corpus, options.clips, options.stills, options.frames)
    draw_portrait(options.out / "portrait.png")
    draw_room(options.out, corpus)
    save_speech(options.out / "speech.flac", corpus)


def write_shards(out: Path, corpus: Corpus, clips: int, stills: int, num_frames: int) -> None:
    """Write raw shards of the guest."""
    world = World("test", SEED, guest=GUEST)
    takes = [draw_clip(world, number, num_frames, corpus) for number in range(clips)]
    takes += [draw_still(world, number) for number in range(stills)]
    with ShardWriter(out, "raw", max_samples=64) as writer:
        for take in takes:
            writer.write(take.key, encode_take(take))


def draw_portrait(path: Path) -> None:
    """Draw the guest with a closed mouth, in a scene that is not in the shards."""
    random = np.random.default_rng(seed_of("portrait", GUEST))
    closed = Mouth(np.zeros(1), np.full(1, NEUTRAL_WIDTH))
    scene = stage(PORTRAIT_HEIGHT, [GUESTS[GUEST]], [closed], random)
    Image.fromarray(next(paint_frames(scene))).save(path)


def draw_room(out: Path, corpus: Corpus) -> None:
    """Draw a character in a room, and the depth of that picture, for a camera to move through."""
    view = draw_view(World("test", SEED), ROOM, 1, corpus)
    # Speech that is recorded anew may open the mouth otherwise.
    part = replace(view.part, mouth=Mouth(np.zeros(1), np.full(1, NEUTRAL_WIDTH)))
    scene = replace(view.take.scene, parts=(part,))
    view = replace(view, take=replace(view.take, scene=scene))
    Image.fromarray(next(paint_view(view, [first_lens(view)]))).save(out / "room.png")
    save_depth(view, out / "room_depth.npz")


def save_speech(path: Path, corpus: Corpus) -> None:
    """Save what the guest is to say, in a voice of the test split."""
    random = np.random.default_rng(seed_of("speech", GUEST))
    voice = list(corpus.voices)[SPEAKER % len(corpus.voices)]
    track = draw_speech(corpus, voice, round(SPEECH_SECONDS * SAMPLE_RATE), random)
    write_flac(path, normalize_loudness(track)[0])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
