"""The drawn world keeps its promises: repeatable, known, measurable, and readable as shards."""

import itertools
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kit.batch import SAMPLE_RATE
from kit.data.clips import RawSample
from kit.data.media import load_image, normalize_loudness
from kit.data.module import ShardData
from kit.data.shards import Shards
from kit.draws import draw_normal
from kit.errors import InputError
from kit.metrics.mouth import box_regions, opening_by_color
from kit.models.base import Encoders
from kit.studio.captions import describe
from kit.studio.characters import (
    CLOTHES,
    EYES,
    HAIR,
    MOUTH,
    SKINS,
    SPLITS,
    WALLS,
    Color,
    character_seed,
    draw_character,
    draw_wall,
    split_of,
)
from kit.studio.drawing import Part, Scene, mouth_box, paint_frames
from kit.studio.motion import Camera, Motion, draw_camera, draw_motion
from kit.studio.mouth import FPS, SAMPLES_PER_FRAME, Mouth, follow_speech
from kit.studio.scenes import Take, World, draw_clip, draw_still, encode_take, speaker_mask
from kit.studio.sentences import SENTENCES
from kit.studio.voices import VARIANTS, Corpus, build_corpus, draw_noise, sentences_of

DATA = Path(__file__).parents[1] / "data"
VOICES = DATA / "sample" / "voices"
NUM_FRAMES = 49


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(VOICES, "train")


@pytest.fixture(scope="module")
def clips(corpus: Corpus) -> list[Take]:
    """Clips of two characters, all ways of speaking among them."""
    world = World("train", two_speakers=1.0)
    return [draw_clip(world, index, NUM_FRAMES, corpus) for index in range(12)]


def closed(num_frames: int) -> Mouth:
    return Mouth(np.zeros(num_frames), np.full(num_frames, 0.5))


def portrait(seed: int, mouth: Mouth, head_height: float, motion: Motion | None = None) -> Scene:
    num_frames = len(mouth.opening)
    part = Part(
        draw_character(seed), 0.5, 0.5, head_height, motion or draw_motion(seed, num_frames), mouth
    )
    camera = Camera(np.ones(num_frames), np.zeros((num_frames, 2)))
    return Scene(64, 64, draw_wall(seed), (part,), camera)


def distances(pictures: np.ndarray, color: Color) -> np.ndarray:
    return np.asarray(np.linalg.norm(pictures.astype(float) - np.array(color), axis=-1))


def test_a_sample_is_a_function_of_world_split_and_index(corpus: Corpus) -> None:
    world = World("train")
    members = [encode_take(draw_clip(world, 3, 9, corpus)) for _ in range(2)]
    assert members[0] == members[1]
    others = (
        draw_clip(world, 4, 9, corpus),
        draw_clip(World("train", seed=1), 3, 9, corpus),
        draw_still(world, 3),
    )
    for other in others:
        assert encode_take(other)["truth.json"] != members[0]["truth.json"]


def test_splits_share_no_character_voice_or_sentence() -> None:
    for one, other in itertools.combinations(SPLITS, 2):
        seeds = [{character_seed(split, n) for n in range(5000)} for split in (one, other)]
        assert all(len(found) == 5000 for found in seeds)
        assert not seeds[0] & seeds[1]
        assert not set(VARIANTS[one]) & set(VARIANTS[other])
        for language in SENTENCES:
            assert not set(sentences_of(one, language)) & set(sentences_of(other, language))
        shipped = [set(Corpus(VOICES, split).voices) for split in (one, other)]
        assert all(shipped) and not shipped[0] & shipped[1]
    assert all(split_of(character_seed(split, 77)) == split for split in SPLITS)


@pytest.mark.parametrize("palette", [SKINS, HAIR, EYES, CLOTHES, WALLS])
def test_colors_of_a_palette_lie_far_apart(palette: dict[str, Color]) -> None:
    for one, other in itertools.combinations(palette.values(), 2):
        assert np.linalg.norm(np.subtract(one, other)) >= 60


def test_no_closed_character_shows_the_color_of_mouths() -> None:
    for seed in range(60):
        for head_height in (0.5, 0.85):
            picture = next(paint_frames(portrait(seed, closed(1), head_height)))
            assert distances(picture, MOUTH).min() > 55, seed


@pytest.mark.parametrize(("head_height", "least_rows"), [(0.5, 4), (0.85, 6)])
def test_a_wide_mouth_spans_enough_pixels(head_height: float, least_rows: int) -> None:
    wide = Mouth(np.ones(1), np.zeros(1))
    for seed in range(12):
        picture = next(paint_frames(portrait(seed, wide, head_height)))
        rows = (distances(picture, MOUTH) < 20).any(axis=1)
        assert rows.sum() >= least_rows


def test_area_in_pixels_follows_the_opening(corpus: Corpus) -> None:
    world = World("train", two_speakers=0.0)
    takes = [draw_clip(world, index, NUM_FRAMES, corpus) for index in range(12)]
    for take in takes:
        if take.speaking == "one":
            scene, part = take.scene, take.scene.parts[0]
            frames = torch.from_numpy(np.stack(list(paint_frames(scene))))
            boxes = torch.tensor([mouth_box(scene, part, frame) for frame in range(NUM_FRAMES)])
            area = opening_by_color(frames, box_regions(boxes, 64, 64, margin=2.0), MOUTH)
            assert np.corrcoef(area, part.mouth.opening)[0, 1] >= 0.97, take.key


def test_the_mouth_knows_nothing_of_the_future() -> None:
    track, _ = normalize_loudness(0.1 * draw_normal((2 * SAMPLE_RATE,), "track"))
    frame = 20
    changed = track.clone()
    changed[(frame + 1) * SAMPLES_PER_FRAME :] = 0
    one, other = follow_speech(track, 2 * FPS), follow_speech(changed, 2 * FPS)
    assert np.array_equal(one.opening[: frame + 1], other.opening[: frame + 1])
    assert np.array_equal(one.width[: frame + 1], other.width[: frame + 1])
    assert not np.allclose(one.opening[frame + 1 :], other.opening[frame + 1 :])


def test_silence_and_quiet_noise_keep_the_mouth_shut() -> None:
    assert (follow_speech(torch.zeros(SAMPLE_RATE), FPS).opening == 0).all()
    for seed in range(6):
        noise = 10 ** (-50 / 20) * draw_noise(SAMPLE_RATE, np.random.default_rng(seed))
        assert (follow_speech(noise, FPS).opening == 0).all()


def test_the_mouth_opens_at_once_and_closes_soon_after() -> None:
    time = torch.arange(SAMPLE_RATE) / SAMPLE_RATE
    track = 0.3 * torch.sin(2 * torch.pi * 400 * time)
    track[: 10 * SAMPLES_PER_FRAME] = 0
    track[15 * SAMPLES_PER_FRAME :] = 0
    opening = follow_speech(track, FPS).opening
    assert (opening[:10] == 0).all()
    assert (opening[11:15] > 0.9).all()
    assert (opening[24:] == 0).all()


def test_a_sharp_sound_spreads_the_mouth_and_a_dull_one_rounds_it() -> None:
    time = torch.arange(SAMPLE_RATE) / SAMPLE_RATE
    dull, sharp = (
        follow_speech(0.2 * torch.sin(2 * torch.pi * hertz * time), FPS).width[-1]
        for hertz in (300, 3000)
    )
    assert dull < 0.05 < 0.95 < sharp


def test_motion_is_gentle_and_begins_like_a_longer_one() -> None:
    for seed in range(20):
        motion, longer = draw_motion(seed, 100), draw_motion(seed, 200)
        assert np.array_equal(motion.sway, longer.sway[:100])
        assert np.array_equal(motion.eyes, longer.eyes[:100])
        assert np.array_equal(motion.gaze, longer.gaze[:100])
        assert np.abs(motion.sway).max() <= 0.14
        assert (longer.eyes == 0).any()
    cameras = [draw_camera(seed, 50) for seed in range(200)]
    still = [bool((c.zoom == 1).all() and (c.pan == 0).all()) for c in cameras]
    assert 0.6 < np.mean(still) < 0.8
    assert max(c.zoom.max() for c in cameras) <= 1.15


def test_only_the_mouth_moves_with_the_sound() -> None:
    opening = np.linspace(0, 1, 5)
    rest = np.zeros(5)
    still = Motion(rest, rest, rest, rest, eyes=np.ones(5), gaze=np.zeros((5, 2)))
    scene = portrait(1, Mouth(opening, np.full(5, 0.5)), 0.85, still)
    frames = np.stack(list(paint_frames(scene))).astype(int)
    left, top, right, bottom = mouth_box(scene, scene.parts[0], 4)
    changed = np.argwhere(np.abs(frames - frames[0]).max(axis=(0, 3)) > 0)
    assert (changed >= np.floor((top, left))).all()
    assert (changed < np.ceil((bottom, right))).all()


def test_masks_hold_the_mouths_and_are_apart(clips: list[Take]) -> None:
    for take in clips:
        masks = np.stack([speaker_mask(take.scene, number) for number in range(2)])
        assert (masks.sum(axis=0) == 255).all()
        for part, mask in zip(take.scene.parts, masks, strict=True):
            for frame in range(NUM_FRAMES):
                left, top, right, bottom = mouth_box(take.scene, part, frame)
                rows, columns = slice(int(top), int(bottom) + 1), slice(int(left), int(right) + 1)
                assert (mask[rows, columns] == 255).all()


def test_who_is_silent_keeps_the_mouth_closed(clips: list[Take]) -> None:
    assert {take.speaking for take in clips} == {"left", "right", "both", "turns"}
    for take in clips:
        for part, track, voice in zip(take.scene.parts, take.tracks, take.voices, strict=True):
            assert (voice is None) == (not track.any()) == (not part.mouth.opening.any())
        if take.speaking == "turns":
            first, second = (part.mouth.opening for part in take.scene.parts)
            assert np.minimum(first, second).max() < 0.3
        if take.speaking in ("both", "turns"):
            assert take.voices[0] != take.voices[1]


def test_captions_name_what_is_seen(clips: list[Take]) -> None:
    for take in clips:
        assert take.scene.wall.color in take.caption
        assert all(part.character.hair in take.caption for part in take.scene.parts)
    words = [describe(draw_character(1), np.random.default_rng(seed)) for seed in range(40)]
    assert any(draw_character(1).clothes in text for text in words)
    assert len(set(words)) > 3


def test_another_size_shows_the_same_scene(corpus: Corpus) -> None:
    small, large = (
        next(paint_frames(draw_clip(World("train", height=height), 0, 5, corpus).scene))
        for height in (64, 160)
    )
    assert large.shape[0] == 160
    reduced = Image.fromarray(large).resize(small.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(np.asarray(reduced).astype(int) - small.astype(int)).mean() < 6


@pytest.fixture(scope="module")
def studio_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("studio") / "shards"
    options = ["--clips", "2", "--stills", "1", "--seconds", "1.6", "--two-speakers", "1"]
    options += ["--speech", str(VOICES), "--processes", "1", "--sheet", str(out / "sheet.png")]
    command = [sys.executable, str(DATA / "prepare_studio.py"), str(out), *options]
    subprocess.run(command, check=True)
    return out


def test_shards_are_read_like_any_others(
    studio_shards: Path, shard_data: Callable[..., ShardData], tiny_encoders: Encoders
) -> None:
    data = shard_data(studio_shards, window_frames=33)
    assert data.problems() == []
    data.prepare_run(lambda: tiny_encoders, seed=0, num_batches=1, place=(0, 1))
    samples = data.train_dataloader().dataset
    for number in range(2):
        sample = samples[0, number]
        assert isinstance(sample, RawSample)
        assert sample.pixels.shape == (33, 64, 96, 3)
        assert sample.tracks.shape == (2, 41 * SAMPLES_PER_FRAME)
        assert sample.speaker_masks.shape == (2, 8, 12)
        assert sample.speaker_masks.sum(0).eq(1).all()
        assert "left" in sample.caption
    still = samples[0, 2]
    assert isinstance(still, RawSample)
    assert still.pixels.shape == (1, 64, 96, 3)


def test_truth_says_where_the_mouths_are(studio_shards: Path) -> None:
    shards = Shards(studio_shards)
    for number in range(3):
        facts = json.loads(shards.read(number, "truth.json"))
        assert len(facts["frames"]) == shards.meta(number)["num_frames"]
        assert len(facts["characters"]) == 2
        for person in facts["characters"]:
            assert split_of(person["seed"]) == "train"
            assert tuple(person["rgb"]["hair"]) == HAIR[person["hair"]]
    picture = np.asarray(Image.open(BytesIO(shards.read(2, "png"))))
    for person in facts["frames"][0]["characters"]:
        left, top, right, bottom = person["mouth_box"]
        inside = picture[int(top) : int(bottom) + 1, int(left) : int(right) + 1].astype(int)
        assert person["opening"] == 0
        assert inside.sum(-1).max() - inside.sum(-1).min() > 50


def test_sheet_is_a_picture(studio_shards: Path) -> None:
    assert load_image(studio_shards / "sheet.png").shape == (192, 3 * 288, 3)


def test_missing_speech_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="corpus.json is missing"):
        Corpus(tmp_path, "val")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="apt-get install espeak-ng"):
        build_corpus(tmp_path, "val", 1.0)
    assert build_corpus(VOICES, "val", 1.0).utterances


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        (["--height", "48"], "--height: 48 is not a multiple of 32"),
        (["--two-speakers", "2"], "--two-speakers: 2.0 is not from 0 to 1"),
        ([], "already holds shards"),
    ],
)
def test_what_cannot_be_written_is_said(
    studio_shards: Path, options: list[str], finding: str
) -> None:
    main = runpy.run_path(str(DATA / "prepare_studio.py"))["main"]
    with pytest.raises(InputError, match=finding):
        main([str(studio_shards), "--speech", str(VOICES), *options])
