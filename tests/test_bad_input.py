"""What users get wrong: one clear message, exit code 2, and nothing lost. And what must work."""

import errno
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from kit.cli import main
from kit.data.media import VideoWriter, encode_wav, probe
from kit.draws import draw_normal

ROOT = Path(__file__).parents[1]
FIT, TALK = (str(ROOT / "tests/recipes" / name) for name in ("tiny.yaml", "tiny_talk.yaml"))
PREPARE = ["prepare", "clips", "--out", "shards", "--window", "9", "--buckets", "64x64"]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must end with exit code 2, and give what it says."""
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def clip(name: str = "a.mp4", frames: int = 20, *, sound: bool = True, caption: str = "a") -> Path:
    path = Path("clips") / name
    speech = 0.1 * draw_normal((frames * 640,), 1, "speech") if sound else None
    with VideoWriter(path, fps=25, height=64, width=64, speech=speech) as writer:
        writer.write(np.full((frames, 64, 64, 3), 100, np.uint8))
    if caption:
        path.with_suffix(".txt").write_text(caption)
    return path


def cut_in_half() -> None:
    path = clip()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_zero_byte_wav() -> None:
    clip(sound=False).with_suffix(".wav").touch()


CLIPS: dict[str, tuple[Callable[[], Any], str]] = {
    "empty folder": (lambda: None, "no media|nothing"),
    "no sound": (lambda: clip(sound=False), "has no sound"),
    "cut in half": (cut_in_half, "damaged|cannot be read"),
    "zero-byte wav": (with_zero_byte_wav, "empty"),
    "one frame": (lambda: clip(frames=1), "one frame"),
    "shorter than a window": (lambda: clip(frames=8), "8 frames|shorter"),
}


@pytest.mark.parametrize("case", CLIPS)
def test_unusable_clips_are_named(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = CLIPS[case]
    make()
    before = sorted(path.name for path in Path("clips").iterdir())
    said = refused(capsys, *PREPARE)
    assert any(word in said for word in words.split("|")), said
    assert not list(Path().glob("shards/*.tar"))
    assert sorted(path.name for path in Path("clips").iterdir()) == before


def test_one_bad_clip_does_not_cost_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    cut_in_half()
    clip("b.mp4")
    assert main(PREPARE) == 0
    census = json.loads(Path("shards/census.json").read_text())
    assert len(census["kept"]) == 1 and "a.mp4" in census["dropped"][0]["reason"]


def test_stereo_at_44100_and_no_caption_work(capsys: pytest.CaptureFixture[str]) -> None:
    path = clip(sound=False, caption="")
    with av.open(str(path.with_suffix(".wav")), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=44_100, layout="stereo")
        noise = np.random.default_rng(0).integers(-3000, 3000, (1, 2 * 44_100), np.int16)
        frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="stereo")
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert main(PREPARE) == 0
    census = json.loads(Path("shards/census.json").read_text())
    assert len(census["kept"]) == 1
    assert any("caption" in warning for warning in census["warnings"])


def fit_words(shards: Path | str, *more: str) -> list[str]:
    sizes = ["data.window_frames=9", "data.windows_per_clip=2", "data.context_frames=5"]
    short = ["data.first_chunk=0.5", "data.num_workers=0", "trainer.max_steps=2", "preview=null"]
    return ["fit", FIT, f"data.path={shards}", *sizes, *short, *more]


def test_a_shard_cut_in_half(raw_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("cut").mkdir()
    for file in raw_shards.iterdir():
        (Path("cut") / file.name).write_bytes(file.read_bytes())
    tar = Path("cut/shard-000000.tar")
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    said = refused(capsys, *fit_words("cut"))
    assert "shard-000000.tar is cut" in said
    assert not Path("runs").exists()


def test_a_shard_that_reaches_outside(capsys: pytest.CaptureFixture[str]) -> None:
    Path("evil").mkdir()
    with tarfile.open("evil/shard-000000.tar", "w") as tar:
        member = tarfile.TarInfo("../../x.json")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"{}"))
    assert "../../x.json" in refused(capsys, *fit_words("evil"))
    assert "../../x.json" in refused(capsys, "check", "evil")


def test_all_mistakes_of_a_recipe_at_once(
    encoded_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["adapter.rnak=4", "optimizer.lr=fast", "base.type=wann", "objective.shift=-1"]
    said = refused(capsys, *fit_words(encoded_shards, *wrong))
    assert "did you mean 'rank'" in said and "did you mean 'wan'" in said
    assert "optimizer.lr" in said and "objective.shift" in said
    assert not Path("runs").exists()


def test_a_checkpoint_of_another_recipe(
    encoded_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_words(encoded_shards)) == 0
    adapter = Path("runs/tiny/adapter.safetensors").read_bytes()
    assert "optimizer.lr" in refused(capsys, *fit_words(encoded_shards, "optimizer.lr=1e-5"))
    assert Path("runs/tiny/adapter.safetensors").read_bytes() == adapter


def test_shards_of_another_plan(encoded_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [w for w in fit_words(encoded_shards) if not w.startswith("data.windows_per_clip")]
    said = refused(capsys, *words)
    assert "data.windows_per_clip: the shards were encoded with 2" in said


def test_a_full_disk_while_preparing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip()

    def full(file: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shards/shard-000000.partial")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        said = refused(capsys, *PREPARE)
    assert "the disk is full" in said and "shard-000000" in said
    assert not list(Path("shards").glob("*.tar"))
    assert main(PREPARE) == 0


def test_speech_shorter_than_a_chunk_works(capsys: pytest.CaptureFixture[str]) -> None:
    Path("short.wav").write_bytes(encode_wav(0.1 * draw_normal((1, 8000), 1, "speech")))
    words = ["adapter=null", "audio=short.wav", "out=talk.mp4", "sampling.steps=1"]
    assert main(["sample", TALK, *words]) == 0
    assert probe(Path("talk.mp4")).num_frames == 12


def test_an_adapter_that_does_not_fit(
    encoded_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kit.adapters.files import load_adapter, write_adapter

    assert main(fit_words(encoded_shards)) == 0
    tensors, info = load_adapter(Path("runs/tiny/adapter.safetensors"))
    wide = {name: torch.cat([t, t], dim=1) if t.ndim else t for name, t in tensors.items()}
    write_adapter(Path("wide.safetensors"), wide, info)
    said = refused(capsys, "sample", TALK, "adapter=wide.safetensors")
    assert "do not fit this base" in said
    said = refused(capsys, "export", "wide.txt", "--to", "diffusers")
    assert "no file wide.txt" in said
    write_adapter(Path("other.safetensors"), tensors, replace(info, base="hunyuan"))
    said = refused(capsys, "export", "other.safetensors", "--to", "diffusers")
    assert "unknown base 'hunyuan'" in said and not Path("diffusers").exists()
    said = refused(capsys, "export", "wide.safetensors", "--to", "difusers")
    assert "did you mean 'diffusers'" in said


def test_prepare_and_encode_go_on_with_the_same_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kit.data.encode import ClipEncoder

    clip(frames=40)
    words = [*PREPARE, "--recipe", FIT, "--encode", "--window", "33"]
    with monkeypatch.context() as patched:
        patched.setattr(ClipEncoder, "latents", interrupted)
        assert main(words) == 130
    assert not list(Path("shards/encoded").glob("*.tar"))
    before = Path("shards/shard-000000.tar").stat().st_mtime_ns
    assert main(words) == 0
    assert Path("shards/shard-000000.tar").stat().st_mtime_ns == before
    assert main(["check", FIT, "data.path=shards", "preview=null"]) == 0
    assert "1 clips (encoded)" in capsys.readouterr().out
    # Other clips at the same place leave nothing encoded of the old ones.
    clip("b.mp4", frames=40)
    assert main([*PREPARE, "--overwrite", "--window", "33"]) == 0
    assert main(["check", FIT, "data.path=shards", "preview=null"]) == 0
    assert "2 clips (raw)" in capsys.readouterr().out


def interrupted(*arguments: Any) -> Any:
    raise KeyboardInterrupt


def test_a_base_that_is_not_there_is_told_before_any_clip_is_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clip(frames=90)
    recipe = str(ROOT / "recipes" / "my_character.yaml")
    said = refused(capsys, *PREPARE, "--recipe", recipe, "--encode")
    assert "base.audio_weights" in said
    assert not Path("shards").exists()


def test_side_files_in_capitals_and_other_encodings(capsys: pytest.CaptureFixture[str]) -> None:
    path = clip(caption="")
    path.with_suffix(".TXT").write_bytes("ein Mädchen spricht".encode("utf-16"))
    other = clip("b.mp4", caption="")
    other.with_suffix(".txt").write_bytes("ein Mädchen".encode("latin-1"))
    Path("clips/photo.heic").touch()
    assert main(PREPARE) == 0
    census = json.loads(Path("shards/census.json").read_text())
    assert [Path(kept["source"]).name for kept in census["kept"]] == ["a.mp4"]
    assert "b.txt is not text in UTF-8" in census["dropped"][0]["reason"]
    assert any("photo.heic" in warning for warning in census["warnings"])
    with tarfile.open("shards/shard-000000.tar") as tar:
        name = next(name for name in tar.getnames() if name.endswith(".txt"))
        member = tar.extractfile(name)
        assert member is not None and member.read().decode() == "ein Mädchen spricht"


def test_shards_are_not_taken_for_clips(
    raw_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "prepare", str(raw_shards), "--out", "again")
    assert "holds shards, no clips" in said


def test_what_the_system_refuses_is_one_line(
    encoded_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs").write_text("a file in the way")
    assert "runs" in refused(capsys, *fit_words(encoded_shards))
    said = refused(capsys, "check", "--schema", "fit", "--out", "nowhere/x.json")
    assert "nowhere/x.json: No such file" in said


def test_text_on_the_command_line_is_taken_as_it_is() -> None:
    from kit.recipe.document import parse_overrides

    texts = {
        "text": 'a girl, "q" #1 yes',
        "out": "a #b.mp4",
        "name": "say: x",
        "audio": "*sighs* hi",
    }
    read = parse_overrides([f"{key}={value}" for key, value in texts.items()])
    assert read.values == texts and not read.problems
    numbers = parse_overrides(["seed=7", "lr=1e-4", "on=true", "list=[a, b]", "none=null"])
    assert numbers.values == {"seed": 7, "lr": 1e-4, "on": True, "list": ["a", "b"], "none": None}
