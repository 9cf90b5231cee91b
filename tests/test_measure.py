"""`kit sample --report` and previews: what is known comes from the recipe, numbers are written."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.models import save_for_hf
from torch import Tensor

from kit.cli import main
from kit.data.media import encode_wav, load_image
from kit.draws import draw_normal
from kit.errors import InputError
from kit.metrics.mouth import box_regions, opening_by_motion
from kit.metrics.report import Known, talking_report
from kit.metrics.settings import MeasureSettings
from kit.metrics.video_report import VideoReport, open_measure
from kit.recipe import json_schema
from kit.run.fit import fit
from kit.run.parts import build_fit
from kit.run.processes import Place, load_for_sampling
from kit.run.recipes import FIT, SAMPLE, read_as
from kit.run.sample import build_sample, sample
from kit.run.scenes import load_portrait, load_track, one_speaker
from kit.sampling.frames import to_pictures
from kit.sampling.pipeline import no_progress

ROOT = Path(__file__).parents[1]
TALK, QUICK = (str(ROOT / "tests/recipes" / name) for name in ("tiny_talk.yaml", "tiny.yaml"))
PORTRAIT = ROOT / "data" / "sample" / "portrait.png"
CPU = torch.device("cpu")
SIZE = 64

BOX, MOUTH = [16, 32, 48, 56], (130, 20, 40)
NAMES = {
    "sync_r",
    "lag_frames",
    "silence_opening",
    "cross_talk",
    "seam_ratio",
    "color_drift",
    "motion_energy",
    "color_share_error",
    "color_distance",
    "feature_identity",
}
SHORT = {"sampling.num_frames": 9, "sampling.context_frames": 5, "sampling.steps": 1}


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wave = 0.1 * draw_normal((1, 6400), 7, "speech")
    Path("speech.wav").write_bytes(encode_wav(wave))


def as_words(values: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def talk_words(**more: Any) -> list[str]:
    return as_words({"adapter": "null", "audio": "speech.wav", "out": "talk.mp4", **SHORT, **more})


def fit_words(shards: Path, **more: Any) -> list[str]:
    sizes = {"data.window_frames": 9, "data.windows_per_clip": 2, "data.context_frames": 5}
    short = {"data.first_chunk": 0.5, "data.num_workers": 0, "trainer.max_steps": 1}
    preview = {"preview.every": 1, "preview.audio": "speech.wav"}
    named = {"name": "run", "data.path": shards}
    return as_words({**named, **sizes, **short, **preview, **SHORT, **more})


def known_words(known: Known) -> dict[str, Any]:
    """Say the same as a recipe: the box, the mouth's colour and those of the character."""
    colors = {f"measure.colors.{name}": list(color) for name, color in known.colors.items()}
    return {"measure.region": BOX, "measure.mouth_color": list(MOUTH), **colors}


@pytest.fixture
def known() -> Known:
    """What is known of a video of the shipped portrait; its corner is taken for a part."""
    picture = torch.from_numpy(load_image(PORTRAIT))
    red, green, blue = picture[0, 0].tolist()
    return Known(
        region=box_regions(torch.tensor(BOX), SIZE, SIZE),
        mouth_color=MOUTH,
        reference=first_picture(),
        colors={"wall": (red, green, blue)},
    )


def first_picture() -> Tensor:
    source, _ = load_portrait(PORTRAIT, [f"{SIZE}x{SIZE}"])
    return torch.from_numpy(to_pictures(source.frame(0)[None])[0])


def frames_by_hand(words: Sequence[str]) -> Tensor:
    """Sample as a recipe says, without writing a video. [T, height, width, 3]"""
    recipe = read_as(TALK, words, SAMPLE)
    base, sampler = build_sample(recipe)
    source, size = load_portrait(Path(recipe["image"]), recipe["buckets"])
    track = load_track(Path(recipe["audio"]), base.geometry.fps)
    scene = one_speaker(recipe["text"], track, source, size, base.geometry)
    denoiser = load_for_sampling(base, recipe["adapter"], Place(0, 1, CPU))
    made = sampler.sample(denoiser, base.load_encoders(CPU), scene, recipe["seed"], no_progress)
    return torch.from_numpy(np.concatenate([to_pictures(pixels) for pixels, _ in made]))


def test_a_report_lies_beside_the_video(known: Known, capsys: pytest.CaptureFixture[str]) -> None:
    words = talk_words(out="new/talk.mp4", **known_words(known))
    assert main(["sample", TALK, *words, "--report"]) == 0
    written = json.loads(Path("new/talk.report.json").read_text())
    assert (written["num_frames"], written["fps"]) == (10, 25)
    assert written["chunk_starts"] == [0, 9]
    assert written["known"]["region"] == BOX
    assert written["known"]["mouth_color"] == list(MOUTH)
    assert list(written["known"]["colors"]) == ["wall"]
    (numbers,) = written["tracks"]
    assert numbers.keys() == NAMES
    track = load_track(Path("speech.wav"), 25)
    assert numbers == talking_report(frames_by_hand(words), track, 25, [0, 9], known)
    shown = capsys.readouterr().out
    assert f"  motion_energy     {numbers['motion_energy']:8.3f}\n" in shown
    assert "  cross_talk               -\n" in shown


def test_nothing_needs_to_be_known() -> None:
    Path("speech.wav").write_bytes(encode_wav(0.1 * draw_normal((1, 640), 7, "speech")))
    sample(TALK, talk_words(image="null", size="48x80"), print_nothing, is_measured=True)
    written = json.loads(Path("talk.report.json").read_text())
    assert written["num_frames"] == 1 and written["tracks"][0].keys() == NAMES
    Path("talk.report.json").unlink()
    sample(TALK, talk_words(), print_nothing)
    assert not Path("talk.report.json").exists()


def test_a_network_compares_with_the_portrait() -> None:
    save_network(Path("network"))
    words = talk_words(**{"measure.features": "network"})
    sample(TALK, words, print_nothing, is_measured=True)
    (numbers,) = json.loads(Path("talk.report.json").read_text())["tracks"]
    assert -1 <= numbers["feature_identity"] <= 1


def save_network(folder: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, depth=1)
    save_for_hf(model, str(folder), model_args={"depth": 1}, safe_serialization=True)


def test_previews_are_measured_as_samples_are(encoded_shards: Path, known: Known) -> None:
    folder = fit(QUICK, fit_words(encoded_shards, **known_words(known)), print_nothing)
    written = json.loads((folder / "previews" / "step-00000001.json").read_text())
    assert written["chunk_starts"] == [0, 9]
    (numbers,) = written["tracks"]
    # At the last step a preview has the weights that become the adapter.
    frames = frames_by_hand(talk_words(adapter=folder / "adapter.safetensors"))
    expected = talking_report(frames, load_track(Path("speech.wav"), 25), 25, [0, 9], known)
    assert numbers == expected
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    logged = {f"preview/{name}" for name, value in numbers.items() if value is not None}
    assert logged == {tag for tag in events.Tags()["scalars"] if tag.startswith("preview/")}
    (energy,) = events.Scalars("preview/motion_energy")
    assert (energy.step, energy.value) == (1, pytest.approx(numbers["motion_energy"]))


def test_another_measure_does_not_stop_a_run_from_going_on(encoded_shards: Path) -> None:
    fit(QUICK, fit_words(encoded_shards), print_nothing)
    more = {"trainer.max_steps": 2, "measure.region": BOX}
    folder = fit(QUICK, fit_words(encoded_shards, **more), print_nothing)
    names = [path.name for path in sorted((folder / "previews").glob("*.json"))]
    assert names == ["step-00000001.json", "step-00000002.json"]


def test_a_video_without_portrait_is_compared_with_a_picture(known: Known) -> None:
    given = {"image": "null", "size": "64x64", **known_words(known)}
    with pytest.raises(InputError, match="measure.colors: there is no portrait"):
        sample(TALK, talk_words(**given), print_nothing, is_measured=True)
    words = talk_words(**given, **{"measure.reference": PORTRAIT})
    sample(TALK, words, print_nothing, is_measured=True)
    track = json.loads(Path("talk.report.json").read_text())["tracks"][0]
    assert track["color_distance"] > 0


def test_what_cannot_be_measured_costs_neither_video_nor_run(
    encoded_shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The colours of each chunk are brought to the portrait's, so all of it looks like the mouth.
    Image.new("RGB", (SIZE, SIZE), MOUTH).save("red.png")
    color = {"measure.mouth_color": list(MOUTH)}
    with pytest.raises(InputError, match=r"talk.mp4 is finished, but not measured: region: it"):
        sample(TALK, talk_words(image="red.png", **color), print_nothing, is_measured=True)
    assert Path("talk.mp4").exists() and not Path("talk.report.json").exists()
    words = fit_words(encoded_shards, **{"preview.image": "red.png"}, **color)
    with caplog.at_level(logging.WARNING, "kit"):
        folder = fit(QUICK, words, print_nothing)
    assert "step-00000001.mp4 is not measured: region: it holds nothing but" in caplog.text
    assert [path.suffix for path in (folder / "previews").iterdir()] == [".mp4"]


BAD_VALUES = [
    ({"region": "[16, 32]"}, r"region: \[16.0, 32.0\] is not left, top, right, bottom"),
    ({"region": "[48, 32, 16, 56]"}, r"region: \[48, 32, 16, 56\] is not .* picture of 64x64"),
    ({"region": "[16, 32, 65, 56]"}, r"region: \[16, 32, 65, 56\] is not"),
    ({"region": "[-1, 32, 16, 56]"}, r"region: \[-1, 32, 16, 56\] is not"),
    ({"region": "[16.6, 32, 16.9, 56]"}, r"region: \[16.6, 32, 16.9, 56\] is not"),
    ({"region": "5"}, "region: 5 should be a valid"),
    ({"region": "missing.png"}, "region: missing.png cannot be read: there is no such file"),
    ({"region": "damaged.png"}, "region: damaged.png cannot be read: it is damaged"),
    ({"region": "black.png"}, "region: black.png is white nowhere"),
    ({"regoin": "black.png"}, "regoin: unknown 'regoin'; did you mean 'region'"),
    ({"mouth_color": "[1, 2, 300]"}, "mouth_color.2: 300 should be less than or equal to 255"),
    ({"mouth_color": "[1, 2]"}, "mouth_color.2: missing"),
    ({"full_opening": 0.1}, "full_opening: 0.1 is an area .* give mouth_color"),
    (
        {"mouth_color": "[1, 2, 3]", "full_opening": 0.1, "closed_opening": 0.2},
        "closed_opening: 0.2 is not below full_opening, 0.1",
    ),
    ({"colors.hair": "[255, 0, 255]"}, r"colors.hair: no pixel .* near \(255, 0, 255\)"),
    ({"colors.hair": "blue"}, 'colors.hair: "blue" should be'),
    ({"features": "missing"}, "features: 'missing' does not exist"),
    ({"features": "empty"}, "features: empty: config.json and model.safetensors missing"),
    ({"features": "damaged"}, "features: damaged: timm cannot load this network"),
]


@pytest.mark.parametrize(("values", "message"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_bad_values_are_named_before_any_work(values: dict[str, Any], message: str) -> None:
    make_bad_files()
    named = {f"measure.{key}": value for key, value in values.items()}
    with pytest.raises(InputError, match=f"measure.{message}"):
        build_sample(read_as(TALK, talk_words(**named), SAMPLE))
    with pytest.raises(InputError, match=f"measure.{message}"):
        build_fit(read_as(QUICK, fit_words(Path("missing"), **named), FIT))


def make_bad_files() -> None:
    Path("damaged.png").write_bytes(PORTRAIT.read_bytes()[:200])
    Image.new("RGB", (SIZE, SIZE)).save("black.png")
    Path("empty").mkdir()
    Path("damaged").mkdir()
    (Path("damaged") / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    (Path("damaged") / "model.safetensors").write_bytes(b"damaged")


def test_all_bad_values_are_named_at_once() -> None:
    values = {"measure.region": "missing.png", "measure.colors.hair": "[255, 0, 255]"}
    with pytest.raises(InputError) as error:
        build_sample(read_as(TALK, talk_words(audio=PORTRAIT, **values), SAMPLE))
    places = [line.split(": ")[0] for line in str(error.value).splitlines()]
    assert places == ["measure.colors.hair", "measure.region", "audio"]


def test_without_a_picture_there_is_nothing_to_compare_with() -> None:
    words = talk_words(image="null", size="64x64", **{"measure.colors.hair": "[1, 2, 3]"})
    with pytest.raises(InputError, match=r"measure.colors: there is no portrait or source video"):
        build_sample(read_as(TALK, words, SAMPLE))


def test_a_portrait_that_cannot_be_read_is_named_once() -> None:
    shutil.copy(ROOT / "README.md", "portrait.png")
    words = fit_words(Path("missing"), **{"preview.image": "portrait.png", "measure.region": BOX})
    with pytest.raises(InputError, match=r"preview.image: portrait.png cannot be read"):
        build_fit(read_as(QUICK, words, FIT))


def test_a_mask_is_fitted_as_the_portrait_is() -> None:
    mask = np.zeros((64, 128), np.uint8)
    mask[10:20, 30:50] = 255
    Image.fromarray(mask).save("mask.png")
    measure = open_measure(MeasureSettings(region="mask.png"), (32, 32), None)
    # Half the size, then 16 columns less on each side.
    expected = box_regions(torch.tensor([0, 5, 9, 10]), 32, 32)
    assert measure.known.region is not None and torch.equal(measure.known.region, expected)


def test_each_track_has_its_numbers() -> None:
    frames = (draw_normal((12, 16, 16, 3), 1) * 60 + 128).clamp(0, 255).to(torch.uint8)
    tracks = 0.1 * draw_normal((2, 12 * 640), 2)
    measure = open_measure(MeasureSettings(), (16, 16), None)
    report = measure.report(frames, tracks, 25, [0])
    expected = [talking_report(frames, track, 25, [0], Known()) for track in tracks]
    assert report.tracks == expected


def test_the_table_is_aligned() -> None:
    report = VideoReport(1, 25, [0], {}, [{"sync_r": 0.5, "motion_energy": None}])
    assert report.lines() == ["  sync_r           0.500", "  motion_energy        -"]


def test_large_pictures_show_the_same_motion_as_small_ones() -> None:
    opening = draw_normal((20,), 3).clamp(-1, 1)
    frames = torch.full((20, 96, 96, 3), 200.0)
    frames[:, 60:80, 30:60] -= 80 * (1 + opening)[:, None, None, None]
    small = frames.round().to(torch.uint8)
    large = small.repeat_interleave(3, 1).repeat_interleave(3, 2)
    torch.testing.assert_close(opening_by_motion(large, None), opening_by_motion(small, None))


def test_a_recipe_with_the_section_says_the_same_again() -> None:
    values = {"measure.region": BOX, "measure.colors.hair": "[250, 220, 190]"}
    recipe = read_as(TALK, talk_words(**values), SAMPLE)
    Path("again.yaml").write_text(recipe.text)
    assert read_as("again.yaml", [], SAMPLE).sha256 == recipe.sha256
    plain = read_as(TALK, talk_words(), SAMPLE)
    assert "measure" not in plain.values
    assert all("measure" in json_schema(schema)["properties"] for schema in (FIT, SAMPLE))


def print_nothing(line: str) -> None:
    """Tell nobody."""
