"""From clips to a dubbed video with a base in Wan2.1's own layout, by the commands alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from kit.cli import main
from kit.data.media import VideoWriter, encode_wav, iter_frames, load_speech
from kit.draws import draw_normal
from tests.originals import draw_states, write_original
from tests.outside import media

ROOT = Path(__file__).parents[1]
SECONDS = 1.4
SETTINGS = """
base: {path: wan, audio_weights: wan/infinitetalk.safetensors, random_weights: null,
       dtype: bfloat16}
sampling: {num_frames: 9, context_frames: 5, steps: 1}
"""
TRAINING = """
name: own
data: {path: shards, window_frames: 9, context_frames: 5, windows_per_clip: 2}
trainer: {max_steps: 2}
preview: null
"""
TALKING = """
adapter: runs/own/adapter.safetensors
audio: speech.wav
image: portrait.png
out: talk.mp4
"""


def drawn_material() -> None:
    """Draw a noisy clip, a picture and sound."""
    sound = 0.1 * draw_normal((round(SECONDS * 16_000),), "speech")
    pictures = draw_pixels(round(SECONDS * 25))
    with VideoWriter(Path("clips/a.mp4"), fps=25, height=64, width=64, speech=sound) as writer:
        writer.write(pictures)
    Path("clips/a.txt").write_text("noise that hisses")
    Image.fromarray(pictures[0]).save("portrait.png")
    Path("speech.wav").write_bytes(encode_wav(sound[None]))


def draw_pixels(count: int) -> NDArray[np.uint8]:
    """Draw coarse pictures. [count, 64, 64, 3]"""
    coarse = (40 * draw_normal((count, 8, 8, 3), "pictures") + 128).clamp(0, 255).byte()
    return coarse.numpy().repeat(8, axis=1).repeat(8, axis=2)


def real_material() -> None:
    """Take a filmed person, a portrait with an alpha channel, and stereo speech."""
    shutil.copy(media("ref_video.mp4"), "clips/ref_video.mp4")
    Path("clips/ref_video.txt").write_text("a man in a dark suit is talking to the camera")
    shutil.copy(media("ref_image.png"), "portrait.png")
    shutil.copy(media("speech.wav"), "speech.wav")


@pytest.mark.parametrize("material", [drawn_material, real_material])
def test_clips_to_dubbed_video(
    material: Callable[[], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("clips", "wan"):
        Path(folder).mkdir()
    material()
    write_original(Path("wan"), draw_states(3))

    def run(*words: str) -> str:
        assert main(words) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    fit, talk = write_recipe("tiny.yaml", TRAINING), write_recipe("tiny_talk.yaml", TALKING)
    said = run("check", "wan")
    assert "Wan2.1" in said and "missing" not in said
    run("prepare", "clips", "--out", "shards", "--recipe", fit, "--encode")
    run("check", fit)
    run("fit", fit)
    (clip,) = Path("clips").glob("*.mp4")
    run("sample", talk)
    run("sample", talk, "image=null", f"video={clip}", "out=dub.mp4")
    run("export", "runs/own/adapter.safetensors", "--to", "comfyui")

    expected = len(load_speech(Path("speech.wav"))) * 25 // 16_000
    for made in ("talk.mp4", "dub.mp4"):
        frames = list(iter_frames(Path(made), 25))
        assert len(frames) == expected
        assert min(frame.std() for frame in frames) > 1
        assert abs(len(load_speech(Path(made))) - expected * 640) < 1280


def write_recipe(extended: str, values: str) -> str:
    """Write a recipe for the base in the folder `wan`, and give its name."""
    text = f"extends: {ROOT / 'tests/recipes' / extended}\n{SETTINGS}{values}"
    Path(extended).write_text(text)
    return extended
