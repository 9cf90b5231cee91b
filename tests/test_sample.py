"""`kit sample`: portrait or video, speech of any length, to a video as long as the speech."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kit.adapters.files import AdapterInfo, load_adapter, write_adapter
from kit.adapters.lora import Lora, trained_parameters
from kit.data.media import VideoWriter, encode_wav, iter_frames, load_speech, probe
from kit.draws import draw_normal
from kit.errors import InputError
from kit.models.wan_base import WanBase
from kit.run.sample import sample
from kit.sampling.chunks import Progress
from kit.sampling.pipeline import TalkSampler

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "tests" / "recipes" / "tiny_talk.yaml"


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def words(**more: Any) -> list[str]:
    speech(0.8)
    values = {
        "adapter": "null",
        "audio": "speech.wav",
        "out": "talk.mp4",
        "sampling.num_frames": 9,
        "sampling.context_frames": 5,
        "sampling.steps": 1,
        **more,
    }
    return [f"{key}={value}" for key, value in values.items()]


def speech(seconds: float) -> Path:
    path = Path("speech.wav")
    path.write_bytes(encode_wav(0.1 * draw_normal((1, round(seconds * 16_000)), 7, "speech")))
    return path


def frames(path: Path) -> np.ndarray:
    return np.stack(list(iter_frames(path, 25)))


@pytest.mark.parametrize(("seconds", "num_frames"), [(0.8, 20), (0.1, 2), (0.36, 9)])
def test_video_is_as_long_as_the_speech(seconds: float, num_frames: int) -> None:
    arguments = words()
    speech(seconds)
    out = sample(str(RECIPE), arguments, print_nothing)
    assert probe(out).num_frames == num_frames
    assert abs(len(load_speech(out)) - num_frames * 640) <= 1024
    assert not list(Path().glob("*.partial*"))


def test_a_seed_names_a_video() -> None:
    first = frames(sample(str(RECIPE), words(out="first.mp4"), print_nothing))
    again = frames(sample(str(RECIPE), words(out="again.mp4"), print_nothing))
    other = frames(sample(str(RECIPE), words(out="other.mp4", seed=8), print_nothing))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_source_video_gives_each_chunk_its_reference() -> None:
    with VideoWriter(Path("source.mp4"), fps=25, height=80, width=80) as writer:
        writer.write(np.full((10, 80, 80, 3), 40, np.uint8))
        writer.write(np.full((30, 80, 80, 3), 220, np.uint8))
    still = {"image": ROOT / "data" / "sample" / "portrait.png"}
    portrait = frames(sample(str(RECIPE), words(**still), print_nothing))
    moving = {"image": "null", "video": "source.mp4"}
    dubbed = frames(sample(str(RECIPE), words(**moving), print_nothing))
    assert dubbed.shape == portrait.shape and not np.array_equal(dubbed, portrait)


def test_an_adapter_has_an_effect(tiny_adapter: Path) -> None:
    plain = frames(sample(str(RECIPE), words(), print_nothing))
    adapted = frames(sample(str(RECIPE), words(adapter=tiny_adapter), print_nothing))
    assert not np.array_equal(plain, adapted)


def test_an_adapter_of_another_base_is_refused(tiny_adapter: Path) -> None:
    tensors, info = load_adapter(tiny_adapter)
    wider = {name: torch.nn.functional.pad(t, (0, 1)) for name, t in tensors.items()}
    write_adapter(Path("wider.safetensors"), wider, info)
    with pytest.raises(InputError, match="do not fit this base"):
        sample(str(RECIPE), words(adapter="wider.safetensors"), print_nothing)
    assert not Path("talk.mp4").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "null"}, "image, video, size: give one"),
        ({"out": "talk.avi"}, "does not end in .mp4"),
        ({"audio": "missing.wav"}, "missing.wav"),
        ({"sampling.num_frames": 10}, "4n"),
        ({"adapter": ROOT / "README.md"}, "cannot be read"),
        ({"audio": ROOT / "README.md"}, "audio: .*cannot be read"),
        ({"image": ROOT / "README.md", "audio": ROOT / "README.md"}, "image: .*\n.*audio: "),
        ({"size": "64x64"}, "image, video, size: give one"),
        ({"image": "null", "size": "64x65"}, "64x65"),
    ],
)
def test_unfit_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample(str(RECIPE), words(**change), print_nothing)


def test_an_input_is_never_overwritten() -> None:
    with VideoWriter(Path("source.mp4"), fps=25, height=64, width=64) as writer:
        writer.write(np.full((10, 64, 64, 3), 40, np.uint8))
    before = Path("source.mp4").read_bytes()
    arguments = words(image="null", video="source.mp4", out="./source.mp4")
    with pytest.raises(InputError, match="out: source.mp4 is one of the inputs"):
        sample(str(RECIPE), arguments, print_nothing)
    assert Path("source.mp4").read_bytes() == before


def test_text_and_speech_alone_make_a_video() -> None:
    arguments = words(image="null", size="48x80", out="new/folder/alone.mp4")
    info = probe(sample(str(RECIPE), arguments, print_nothing))
    assert (info.height, info.width, info.num_frames) == (48, 80, 20)


def test_a_recipe_of_another_command_is_one_line() -> None:
    with pytest.raises(InputError, match="tiny.yaml is a recipe for `kit fit`") as error:
        sample(str(ROOT / "tests" / "recipes" / "tiny.yaml"), [], print_nothing)
    assert "\n" not in str(error.value)


def test_silence_of_no_length_is_refused() -> None:
    arguments = words()
    speech(0.01)
    with pytest.raises(InputError, match="less sound than one frame"):
        sample(str(RECIPE), arguments, print_nothing)


def stop_in_chunk_three(patch: pytest.MonkeyPatch, reason: BaseException) -> None:
    whole = TalkSampler.sample

    def breaks(self: TalkSampler, *arguments: Any) -> Iterator[tuple[torch.Tensor, Progress]]:
        for number, made in enumerate(whole(self, *arguments)):
            if number == 2:
                raise reason
            yield made

    patch.setattr(TalkSampler, "sample", breaks)


@pytest.mark.parametrize("crossfade", [0, 3])
def test_a_stopped_video_goes_on_behind_its_finished_chunks(crossfade: int) -> None:
    more = {"sampling.crossfade_frames": crossfade}
    whole = frames(sample(str(RECIPE), words(**more), print_nothing))
    Path("talk.mp4").unlink()
    with pytest.MonkeyPatch.context() as patch:
        stop_in_chunk_three(patch, RuntimeError("the machine caught fire"))
        with pytest.raises(RuntimeError, match="fire"):
            sample(str(RECIPE), words(**more), print_nothing)
    assert not Path("talk.mp4").exists()
    names = sorted(path.name for path in Path("talk.partial").iterdir())
    assert names == ["chunk-00000.mp4", "chunk-00001.mp4", "progress.safetensors"]

    told: list[str] = []
    out = sample(str(RECIPE), words(**more), told.append)
    assert "talk.partial: 2 of 4 chunks are there" in told
    assert np.array_equal(frames(out), whole)
    assert not Path("talk.partial").exists()


def test_ctrl_c_leaves_a_video_of_the_finished_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_in_chunk_three(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match="so_far.mp4 holds the finished chunks"):
        sample(str(RECIPE), words(), print_nothing)
    so_far = Path("talk.partial/so_far.mp4")
    assert len(frames(so_far)) == 9 + 4
    assert abs(len(load_speech(so_far)) - 13 * 640) <= 1024


def test_chunks_of_another_video_are_not_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_in_chunk_three(patch, RuntimeError("fire"))
        with pytest.raises(RuntimeError):
            sample(str(RECIPE), words(), print_nothing)
    told: list[str] = []
    other = sample(str(RECIPE), words(seed=8), told.append)
    assert not any("are there" in line for line in told)
    again = sample(str(RECIPE), words(seed=8, out="again.mp4"), print_nothing)
    assert np.array_equal(frames(other), frames(again))


@pytest.fixture
def tiny_adapter(tiny_base: WanBase) -> Path:
    """An adapter whose factors are not the identity."""
    denoiser = tiny_base.load_denoiser(torch.device("cpu"))
    lora = Lora(rank=4, parts=["attention", "audio"])
    lora.inject(denoiser, seed=0)
    tensors = {
        name: draw_normal(tuple(parameter.shape), 1, name)
        for name, parameter in trained_parameters(denoiser).items()
    }
    info = AdapterInfo("tiny", "wan", "lora", ("attention", "audio"), (), 1, "name: tiny\n")
    write_adapter(Path("tiny.safetensors"), tensors, info)
    return Path("tiny.safetensors")


def print_nothing(line: str) -> None:
    """Tell nobody."""
