"""A folder of media becomes shards, and all that is not usable is said in plain words."""

import io
import json
import tarfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kit.data.census import Census
from kit.data.cutting import cut_evenly
from kit.data.fields import IndexedSample
from kit.data.media import VideoWriter, decode_wav, encode_wav, normalize_loudness, read_frames
from kit.data.prepare import prepare
from kit.data.windows import WindowPlan, plan_windows
from kit.data.writer import read_index
from kit.errors import InputError

HEIGHT, WIDTH = 32, 48


def speech(seconds: float, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(round(seconds * 16_000), generator=random)


def write_video(path: Path, num_frames: int, sound: Tensor | None = None, fps: int = 25) -> None:
    with VideoWriter(path, fps=fps, height=HEIGHT, width=WIDTH, speech=sound) as video:
        for number in range(num_frames):
            video.write(np.full((1, HEIGHT, WIDTH, 3), 4 * number + 10, np.uint8))


def write_wav(path: Path, waveform: Tensor) -> None:
    path.write_bytes(encode_wav(waveform[None]))


def write_image(path: Path, value: int = 100, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    Image.new("RGB", size, (value,) * 3).save(path)


def ignore(line: str) -> None:
    """Take a line of the report and forget it."""


def run(
    source: Path, out: Path, report: Callable[[str], None] = ignore, **changes: object
) -> Census:
    settings: dict[str, Any] = {"buckets": ["32x48", "48x32"], "window_frames": 9} | changes
    return prepare(source, out, report=report, **settings)


def read(out: Path, entry: IndexedSample, member: str) -> bytes:
    (shard,) = read_index(out)["shards"]
    offset, size = entry["members"][member]
    return (out / shard["file"]).read_bytes()[offset : offset + size]


def samples(out: Path) -> list[IndexedSample]:
    return [entry for shard in read_index(out)["shards"] for entry in shard["samples"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds one good clip of 26 frames with sound and caption."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_video(folder / "good.mp4", 26, speech(1.04))
    (folder / "good.txt").write_text("a grey square\n", encoding="utf-8")
    return folder


def test_clip_becomes_a_sample(folder: Path, tmp_path: Path) -> None:
    census = run(folder, tmp_path / "out")
    (entry,) = samples(tmp_path / "out")
    meta = entry["meta"]
    assert meta["num_frames"] == 25
    assert (meta["height"], meta["width"], meta["fps"]) == (HEIGHT, WIDTH, 25)
    assert (meta["num_speakers"], meta["num_masks"]) == (1, 0)
    assert meta["has_caption"]
    assert meta["source"] == "good.mp4"
    assert read(tmp_path / "out", entry, "txt") == b"a grey square"
    frames = read_frames(read(tmp_path / "out", entry, "mp4"), range(25))
    greys = frames.mean(axis=(1, 2, 3))
    assert np.abs(greys - (4 * np.arange(25) + 10)).max() <= 2.5
    wav = decode_wav(read(tmp_path / "out", entry, "wav"))
    assert wav.shape == (1, 25 * 640)
    assert normalize_loudness(wav[0])[1] == pytest.approx(-23, abs=0.3)
    assert meta["loudness"][0] == pytest.approx(normalize_loudness(speech(1.04))[1], abs=1)
    assert not census.dropped
    assert not census.warnings


def test_windows_of_a_prepared_clip(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out")
    (entry,) = samples(tmp_path / "out")
    plan = WindowPlan(9, windows_per_clip=3, references="m0", references_per_window=1)
    windows = plan_windows(entry["key"], entry["meta"]["num_frames"], plan)
    assert [window.start for window in windows] == [0, 8, 16]


def test_same_folder_gives_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_image(folder / "still.png")
    for name in ("a", "b"):
        run(folder, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["begun.txt", "census.json", "census.png", "index.json", "shard-000000.tar"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_long_clips_are_cut_evenly(folder: Path, tmp_path: Path) -> None:
    write_video(folder / "long.mp4", 56, speech(2.24))
    census = run(folder, tmp_path / "out", clip_seconds=1.04)
    metas = [entry["meta"] for entry in samples(tmp_path / "out")][1:]
    assert [meta["num_frames"] for meta in metas] == [17, 17, 17]
    assert [meta["start_seconds"] for meta in metas] == pytest.approx([0, 0.72, 1.44])
    assert census.cut == {str(folder / "long.mp4"): 3}
    last = samples(tmp_path / "out")[-1]
    first_frame = read_frames(read(tmp_path / "out", last, "mp4"), [0])
    assert first_frame.mean() == pytest.approx(4 * 36 + 10, abs=2.5)


@pytest.mark.parametrize(
    ("num_frames", "window", "longest", "expected"),
    [
        (80, 81, 375, ([], 0)),
        (81, 81, 375, ([0], 81)),
        (84, 81, 375, ([0], 81)),
        (376, 81, 375, ([0, 188], 185)),
        (101, 81, 100, ([0], 97)),
        (1000, 81, 375, ([0, 333, 666], 333)),
    ],
)
def test_cut_evenly(
    num_frames: int, window: int, longest: int, expected: tuple[list[int], int]
) -> None:
    assert cut_evenly(num_frames, window, longest) == expected


def test_other_rates_are_resampled(tmp_path: Path) -> None:
    write_video(tmp_path / "fast.mp4", 40, speech(0.8), fps=50)
    run(tmp_path / "fast.mp4", tmp_path / "out")
    (entry,) = samples(tmp_path / "out")
    frames = read_frames(read(tmp_path / "out", entry, "mp4"), range(17))
    greys = frames.mean(axis=(1, 2, 3))
    assert np.abs(greys - (8 * np.arange(17) + 10)).max() <= 2.5


def test_sound_beside_takes_the_place_of_the_own(folder: Path, tmp_path: Path) -> None:
    write_wav(folder / "good.wav", torch.cat([torch.zeros(8000), speech(0.2, seed=3)]))
    lines: list[str] = []
    census = run(folder, tmp_path / "out", lines.append)
    (entry,) = samples(tmp_path / "out")
    assert entry["meta"]["num_frames"] == 17
    wav = decode_wav(read(tmp_path / "out", entry, "wav"))
    assert wav[0, :7900].abs().max() == 0
    assert any("the sound ends 0.4 s before the video" in warning for warning in census.warnings)


def test_stills_and_missing_captions(folder: Path, tmp_path: Path) -> None:
    write_image(folder / "still.jpg", size=(300, 200))
    census = run(folder, tmp_path / "out")
    entry = samples(tmp_path / "out")[1]
    assert entry["meta"]["kind"] == "image"
    assert (entry["meta"]["num_frames"], entry["meta"]["num_speakers"]) == (1, 0)
    assert not entry["meta"]["has_caption"]
    assert set(entry["members"]) == {"json", "png", "txt"}
    picture = Image.open(io.BytesIO(read(tmp_path / "out", entry, "png")))
    assert picture.size == (WIDTH, HEIGHT)
    still = folder / "still.jpg"
    assert census.warnings == [f"{still} has no caption; write one into still.txt"]


def test_numbered_pictures_are_one_video(folder: Path, tmp_path: Path) -> None:
    drawn = folder / "drawn"
    drawn.mkdir()
    for number in range(12):
        write_image(drawn / f"frame{number}.png", 10 * number + 20)
    write_wav(folder / "drawn.wav", speech(1))
    run(folder, tmp_path / "out", sequence_fps=12.5)
    entry = samples(tmp_path / "out")[0]
    assert entry["meta"]["source"] == "drawn"
    greys = read_frames(read(tmp_path / "out", entry, "mp4"), range(21)).mean(axis=(1, 2, 3))
    assert np.abs(greys - (10 * (np.arange(21) // 2) + 20)).max() <= 2.5


def test_numbered_pictures_with_captions_are_stills(folder: Path, tmp_path: Path) -> None:
    stills = folder / "stills"
    stills.mkdir()
    for number in range(2):
        write_image(stills / f"{number}.png")
        (stills / f"{number}.txt").write_text("a still")
    run(folder, tmp_path / "out")
    assert [e["meta"]["kind"] for e in samples(tmp_path / "out")] == ["video", "image", "image"]


def write_two_speakers(folder: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for number, columns in ((1, slice(0, 24)), (2, slice(24, 48))):
        mask[:] = 0
        mask[:, columns] = 255
        Image.fromarray(mask).save(folder / f"good.speaker{number}.png")
        write_wav(folder / f"good.speaker{number}.wav", speech(1.04 - 0.2 * number, seed=number))


def test_two_speakers(folder: Path, tmp_path: Path) -> None:
    write_two_speakers(folder)
    run(folder, tmp_path / "out")
    (entry,) = samples(tmp_path / "out")
    assert (entry["meta"]["num_speakers"], entry["meta"]["num_masks"]) == (2, 2)
    wav = decode_wav(read(tmp_path / "out", entry, "wav"))
    assert wav.shape[0] == 2
    assert wav[1, 16_000 * 64 // 100 :].abs().max() == 0
    masks = [
        np.asarray(Image.open(io.BytesIO(read(tmp_path / "out", entry, f"speaker{i}.png"))))
        for i in range(2)
    ]
    assert (masks[0][:, :24] == 255).all() and (masks[0][:, 24:] == 0).all()
    assert np.array_equal(masks[0], 255 - masks[1])


def test_speakers_from_json(folder: Path, tmp_path: Path) -> None:
    write_two_speakers(folder)
    for number in (1, 2):
        (folder / f"good.speaker{number}.png").rename(folder / f"m{number}.png")
        (folder / f"good.speaker{number}.wav").rename(folder / f"s{number}.wav")
    speakers = [{"mask": "m1.png", "audio": "s1.wav"}, {"box": [24, 0, 48, 32]}]
    (folder / "good.json").write_text(json.dumps({"speakers": speakers}))
    run(folder, tmp_path / "out")
    entries = {entry["meta"]["source"]: entry for entry in samples(tmp_path / "out")}
    # The mask that is named is no still of its own; the other one is named by nobody.
    assert set(entries) == {"good.mp4", "m2.png"}
    entry = entries["good.mp4"]
    assert entry["meta"]["loudness"][1] is None
    second = np.asarray(Image.open(io.BytesIO(read(tmp_path / "out", entry, "speaker1.png"))))
    assert (second[:, 24:] == 255).all() and (second[:, :24] == 0).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "good.json: Invalid JSON"),
        ("{}", "good.json: speakers: Field required"),
        ('{"speakers": []}', "good.json: speakers: List should have at least 1"),
        ('{"speakers": [{"boxes": [0, 0, 1, 1]}]}', "good.json: speakers.0.boxes: Extra"),
        ('{"speakers": [{"box": [0, 0, 9]}]}', "good.json: speakers.0.box.3: Field required"),
        ('{"speakers": [{"box": [0, 0, 49, 32]}]}', r"speaker 1: the box \[0, 0, 49, 32\] is not"),
        ('{"speakers": [{"mask": "../m.png"}]}', "'../m.png' leads out of the folder"),
        ('{"speakers": [{"audio": "/etc/a.wav"}]}', "'/etc/a.wav' leads out of the folder"),
        ('{"speakers": [{"mask": "no.png"}]}', "no.png cannot be read: there is no such file"),
    ],
)
def test_unfit_json_drops_the_clip(folder: Path, tmp_path: Path, text: str, message: str) -> None:
    (folder / "good.json").write_text(text)
    with pytest.raises(InputError, match=message):
        run(folder, tmp_path / "out")


def no_sound(folder: Path) -> None:
    write_video(folder / "bad.mp4", 20)


def zero_bytes(folder: Path) -> None:
    (folder / "bad.mp4").touch()


def corrupted(folder: Path) -> None:
    data = (folder / "good.mp4").read_bytes()
    (folder / "bad.mp4").write_bytes(data[: len(data) // 3])


def zero_byte_wav(folder: Path) -> None:
    write_video(folder / "bad.mp4", 20)
    (folder / "bad.wav").touch()


def one_frame(folder: Path) -> None:
    write_video(folder / "bad.mp4", 1, speech(0.04))


def one_frame_gif(folder: Path) -> None:
    write_image(folder / "bad.gif")


def too_short(folder: Path) -> None:
    write_video(folder / "bad.mp4", 7, speech(0.28))


def empty_image(folder: Path) -> None:
    (folder / "bad.png").touch()


def damaged_image(folder: Path) -> None:
    write_image(folder / "bad.png", size=(400, 300))
    data = (folder / "bad.png").read_bytes()
    (folder / "bad.png").write_bytes(data[: len(data) // 2])


def no_masks(folder: Path) -> None:
    write_video(folder / "bad.mp4", 20)
    for number in (1, 2):
        write_wav(folder / f"bad.speaker{number}.wav", speech(1))


def empty_mask(folder: Path) -> None:
    no_masks(folder)
    for number, value in ((1, 255), (2, 0)):
        write_image(folder / f"bad.speaker{number}.png", value)


def unreadable_mask(folder: Path) -> None:
    empty_mask(folder)
    (folder / "bad.speaker2.png").write_bytes(b"no picture")


def mask_of_another_size(folder: Path) -> None:
    empty_mask(folder)
    write_image(folder / "bad.speaker2.png", 255, size=(10, 10))


def masks_without_tracks(folder: Path) -> None:
    empty_mask(folder)
    for number in (1, 2):
        (folder / f"bad.speaker{number}.wav").unlink()


def uneven_sequence(folder: Path) -> None:
    (folder / "bad").mkdir()
    for number in range(20):
        write_image(folder / f"bad/{number}.png", size=(WIDTH + number, HEIGHT))
    write_wav(folder / "bad.wav", speech(1))


def silent_sequence(folder: Path) -> None:
    (folder / "bad").mkdir()
    for number in range(20):
        write_image(folder / f"bad/{number}.png")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (no_sound, "bad.mp4 has no sound and there is no .wav beside it"),
        (zero_bytes, "bad.mp4 cannot be read: it is empty"),
        (corrupted, "bad.mp4 cannot be read: "),
        (zero_byte_wav, "bad.wav cannot be read: it is empty"),
        (one_frame, "bad.mp4 is one frame long; save it as an image"),
        (one_frame_gif, "bad.gif is one frame long; save it as an image"),
        (too_short, "bad.mp4 has 7 frames of video with sound, fewer than a window: 9 (0.36 s)"),
        (empty_image, "bad.png cannot be read: it is empty"),
        (damaged_image, "bad.png cannot be read: it is damaged"),
        (no_masks, "bad.mp4 has 2 speakers, but speaker 1 has no mask (bad.speaker1.png)"),
        (empty_mask, "bad.mp4: the mask of speaker 2 is empty"),
        (unreadable_mask, "bad.speaker2.png cannot be read: it is damaged or no picture"),
        (mask_of_another_size, "bad.speaker2.png is 10x10 pixels, but the picture is 48x32"),
        (masks_without_tracks, "bad.mp4 has several speakers and no track of theirs"),
        (uneven_sequence, "1.png is 49x32 pixels, but its sequence began with 48x32"),
        (silent_sequence, "bad has no sound and there is no .wav beside it"),
    ],
)
def test_bad_files_are_dropped_with_one_sentence(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(folder)
    lines: list[str] = []
    census = run(folder, tmp_path / "out", lines.append)
    (dropped,) = census.dropped
    assert reason in dropped.reason
    assert "\n" not in dropped.reason
    assert any(reason in line for line in lines)
    assert [clip.source for clip in census.kept] == [str(folder / "good.mp4")]


def test_damage_in_the_middle_keeps_what_came_before(tmp_path: Path) -> None:
    pictures = tmp_path / "in" / "drawn"
    pictures.mkdir(parents=True)
    for number in range(40):
        write_image(pictures / f"{number}.png", 100)
    (pictures / "30.png").write_bytes(b"")
    write_wav(tmp_path / "in" / "drawn.wav", speech(1.6))
    census = run(tmp_path / "in", tmp_path / "out", clip_seconds=0.8)
    assert len(census.kept) == 1
    assert census.dropped[0].reason.endswith("30.png cannot be read: it is empty")


def test_census_counts(folder: Path, tmp_path: Path) -> None:
    write_image(folder / "still.png", size=(32, 48))
    no_sound(folder)
    lines: list[str] = []
    run(folder, tmp_path / "out", lines.append)
    facts = json.loads((tmp_path / "out" / "census.json").read_text())
    assert facts["num_clips"] == 2
    assert facts["seconds"] == facts["speech_seconds"] == 1.0
    assert facts["buckets"] == {"32x48": 1, "48x32": 1}
    assert facts["source_sizes"] == {"48x32": 1, "32x48": 1}
    assert len(facts["kept"]) == 2
    assert len(facts["dropped"]) == 1
    assert len(facts["warnings"]) == 1
    assert 0 < facts["megabytes"] < 1
    assert "kept      1 clips and 1 stills from 2 files" in lines
    sheet = Image.open(tmp_path / "out" / "census.png").convert("RGB")
    blue = (np.asarray(sheet) == (70, 110, 170)).all(axis=2)
    assert blue.any(), "the sheet shows no waveform"


def test_nothing_usable(tmp_path: Path) -> None:
    zero_bytes(tmp_path)
    with pytest.raises(InputError, match=r"nothing can be used\n.*bad.mp4 cannot be read"):
        run(tmp_path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_no_media(tmp_path: Path) -> None:
    (tmp_path / "readme.md").touch()
    with pytest.raises(InputError, match=r"holds no media; looked for \.mp4, \.mov"):
        run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no such file or folder"):
        run(tmp_path / "nowhere", tmp_path / "out")


def test_used_folders_are_left_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out)
    before = (out / "shard-000000.tar").stat().st_mtime_ns
    assert len(run(folder, out).kept) == 1
    assert (out / "shard-000000.tar").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="already holds shards, of other clips or settings"):
        run(folder, out, clip_seconds=9)
    (out / "notes.txt").write_text("mine")
    run(folder, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "index.json").unlink()
    with pytest.raises(InputError, match="holds other files, such as 'notes.txt'"):
        run(folder, out)


def test_unfinished_folder_is_begun_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("shard-000000.tar", "shard-000007.tar", "shard-000008.tar.partial"):
        (out / name).write_bytes(b"left over")
    with pytest.raises(InputError, match="already holds shards"):
        run(folder, out)
    (out / "begun.txt").write_text("an unfinished run")
    run(folder, out)
    assert [path.name for path in sorted(out.glob("shard*"))] == ["shard-000000.tar"]
    with tarfile.open(out / "shard-000000.tar") as tar:
        assert len(tar.getnames()) == 4


def test_out_inside_the_source_is_not_read(folder: Path) -> None:
    run(folder, folder / "out")
    census = run(folder, folder / "out", overwrite=True)
    assert len(census.kept) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_frames": 10}, "window: 10 is not 4n"),
        (
            {"clip_seconds": 0.2},
            "clip-seconds: 0.2 must be a number, not shorter than a window of 9 frames",
        ),
        ({"sequence_fps": 0}, "sequence-fps: 0 is not between 0 and 1000"),
        ({"buckets": "640"}, "buckets: '640' is no size; valid: 480, 720"),
    ],
)
def test_unfit_settings(folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(folder, tmp_path / "out", **change)


def test_cut_file_keeps_what_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "cut.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0", "crf": "1"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        noise = np.random.default_rng(0).integers(0, 256, (50, HEIGHT, WIDTH, 3), dtype=np.uint8)
        for number, picture in enumerate(noise):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    write_wav(tmp_path / "cut.wav", speech(2))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run(path, tmp_path / "out")
    (entry,) = samples(tmp_path / "out")
    assert 9 <= entry["meta"]["num_frames"] < 30


def test_a_sequence_with_gaps_is_told(tmp_path: Path) -> None:
    pictures = tmp_path / "media" / "walk"
    pictures.mkdir(parents=True)
    for number in (*range(1, 12), 14):
        write_image(pictures / f"{number:03d}.png")
    (tmp_path / "media" / "walk.wav").write_bytes(encode_wav(speech(0.6)[None]))
    census = run(tmp_path / "media", tmp_path / "out")
    assert any("lacks 2 pictures" in warning and "12" in warning for warning in census.warnings)
