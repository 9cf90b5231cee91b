"""The shipped sample can be drawn anew, and the base cannot have seen its character."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kit.data.clips import read_caption
from kit.data.media import VideoWriter, load_image, load_speech
from kit.data.shards import Shards
from kit.draws import seed_of
from kit.run.quickstart import SCALE, show_side_by_side
from kit.studio.captions import describe
from kit.studio.characters import (
    CLOTHES,
    EYES,
    GUESTS,
    HAIR,
    RARE,
    draw_character,
    split_of,
)
from kit.studio.scenes import World, draw_clip, draw_still
from kit.studio.voices import Corpus

DATA = Path(__file__).parents[1] / "data"
SAMPLE = DATA / "sample"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A short video with sound."""
    path, rng = tmp_path / "clip.mp4", np.random.default_rng(0)
    sound = rng.normal(0, 0.1, 640 * 10).astype(np.float32)
    with VideoWriter(path, fps=25, height=32, width=32, speech=torch.from_numpy(sound)) as writer:
        writer.write(rng.integers(0, 255, (10, 32, 32, 3), dtype=np.uint8))
    return path


def test_the_sample_is_small_and_shows_one_guest() -> None:
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*.*")) < 5e6
    shards = Shards(SAMPLE / "shards")
    kinds = [shards.meta(number)["kind"] for number in range(len(shards))]
    assert (kinds.count("video"), kinds.count("image")) == (8, 4)
    for number in range(len(shards)):
        facts = json.loads(shards.read(number, "truth.json"))
        assert [person["hair"] for person in facts["characters"]] == ["teal"]
        assert "mika" in read_caption(shards, number)
    assert load_image(SAMPLE / "portrait.png").shape == (256, 256, 3)
    assert len(load_speech(SAMPLE / "speech.flac")) >= 12 * 16_000


def test_no_seed_draws_what_guests_have() -> None:
    for seed in range(500):
        character = draw_character(seed)
        assert not {character.hair, character.eyes, character.clothes} & set(RARE)
    for name, guest in GUESTS.items():
        assert guest.hair in HAIR and guest.eyes in EYES and guest.clothes in CLOTHES
        assert {guest.hair, guest.eyes, guest.clothes} & set(RARE)
        assert split_of(guest.seed) == "test"
        assert describe(guest, np.random.default_rng(seed_of("words"))) == name


def test_a_world_with_a_guest_has_no_one_else() -> None:
    corpus = Corpus(SAMPLE / "voices", "test")
    world = World("test", two_speakers=1.0, guest="mika")
    takes = [*(draw_clip(world, n, 9, corpus) for n in range(4)), draw_still(world, 0)]
    for take in takes:
        assert [part.character for part in take.scene.parts] == [GUESTS["mika"]]
        assert take.key.startswith("mika-")


def test_the_script_draws_shards_portrait_and_speech(tmp_path: Path) -> None:
    options = ["--clips", "1", "--stills", "1", "--frames", "9"]
    options += ["--speech", str(SAMPLE / "voices")]
    command = [sys.executable, str(DATA / "draw_sample.py"), str(tmp_path), *options]
    subprocess.run(command, check=True)
    shards = Shards(tmp_path / "shards")
    assert [shards.meta(number)["num_frames"] for number in range(len(shards))] == [9, 1]
    drawn = load_image(tmp_path / "portrait.png")
    assert np.array_equal(drawn, load_image(SAMPLE / "portrait.png"))
    assert len(load_speech(tmp_path / "speech.flac")) == round(12.8 * 16_000)
    assert np.array_equal(load_image(tmp_path / "room.png"), load_image(SAMPLE / "room.png"))
    depths = [np.load(folder / "room_depth.npz")["depth"] for folder in (tmp_path, SAMPLE)]
    assert np.array_equal(*depths) and depths[0].shape == (64, 64)


def test_videos_are_shown_side_by_side(clip: Path, tmp_path: Path) -> None:
    for name in ("without", "talk"):
        shutil.copy(clip, tmp_path / f"{name}.mp4")
    show_side_by_side(tmp_path)
    strip = load_image(tmp_path / "side_by_side.png")
    assert strip.shape[0] == 2 * SCALE * 32
    assert strip.shape[1] % (SCALE * 32) == 0
    assert len(load_speech(tmp_path / "side_by_side.mp4")) > 0


def test_a_script_without_speech_says_what_is_missing(tmp_path: Path) -> None:
    words = [str(tmp_path), "--speech", str(tmp_path / "nothing")]
    command = [sys.executable, str(DATA / "draw_sample.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "corpus.json is missing" in done.stderr and "Traceback" not in done.stderr
