"""The sample clips can be drawn anew, their mouths follow the sound, and they can be prepared."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.data.media import load_image, load_speech, probe
from kit.data.prepare import prepare

DATA = Path(__file__).parents[1] / "data"
SCRIPT = DATA / "draw_sample.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_sample_has_nothing_to_complain_about(tmp_path: Path) -> None:
    lines: list[str] = []
    clips = DATA / "sample" / "clips"
    census = prepare(clips, tmp_path / "out", buckets=["64x64"], report=lines.append)
    assert len(census.kept) == len(list(clips.glob("*.mp4"))) > 0
    assert not census.dropped
    assert not census.warnings
    assert sum(path.stat().st_size for path in (DATA / "sample").rglob("*.*")) < 1.5e6


def test_script_draws_clips_portrait_and_speech(tmp_path: Path) -> None:
    options = ["--clips", "1", "--seconds", "0.4", "--size", "32"]
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path), *options], check=True)
    info = probe(tmp_path / "clips" / "clip1.mp4")
    assert (info.height, info.width, info.num_frames, info.has_sound) == (32, 32, 10, True)
    assert "violet" in (tmp_path / "clips" / "clip1.txt").read_text()
    assert load_image(tmp_path / "portrait.png").shape == (64, 64, 3)
    assert len(load_speech(tmp_path / "speech.wav")) == 8 * 16_000


def test_voice_is_a_function_of_its_seed(script: dict[str, Any]) -> None:
    first, again, other = (
        script["draw_voice"](0.5, 200, np.random.default_rng(seed))[0] for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.abs(first).max() == pytest.approx(0.7)


def test_mouth_follows_the_sound_and_never_precedes_it(script: dict[str, Any]) -> None:
    speech = np.zeros(25 * 640)
    speech[10 * 640 : 15 * 640] = 0.5
    openings = script["mouth_openings"](speech, 25)
    assert (openings[:10] == 0).all()
    assert (openings[10:15] > 0.7).all()
    assert openings[-1] < 0.1


def test_mouth_and_blink_change_the_picture(script: dict[str, Any]) -> None:
    look, pose = script["LOOKS"][0], script["Pose"]
    still, talking, blinking = (
        script["draw_character"](look, pose(mouth, 0, eyes, 0, 0), 64).astype(int)
        for mouth, eyes in ((0, 1), (1, 1), (0, 0.1))
    )
    assert np.abs(still - talking)[:32].max() == 0 < np.abs(still - talking)[32:].max()
    assert np.abs(still - blinking)[45:].max() == 0 < np.abs(still - blinking)[:45].max()
