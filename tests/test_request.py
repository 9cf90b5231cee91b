"""Who speaks where, as a sample recipe says it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kit.data.media import encode_wav, probe
from kit.draws import draw_normal
from kit.errors import InputError
from kit.run.recipes import SAMPLE, read_as
from kit.run.request import Request, load_tracks, place_speakers, read_request
from kit.run.sample import sample

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "tests" / "recipes" / "tiny_talk.yaml"
LEFT, RIGHT = [0, 0, 40, 64], [56, 0, 96, 64]


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seconds in (("anna", 0.4), ("ben", 0.6)):
        wav = encode_wav(0.1 * draw_normal((1, round(seconds * 16_000)), name))
        Path(f"{name}.wav").write_bytes(wav)
    Image.fromarray(np.full((64, 96, 3), 90, np.uint8)).save("pair.png")


def words(**more: Any) -> list[str]:
    values = {"image": "pair.png", "audio": "null", "adapter": "null", "out": "talk.mp4", **more}
    values = {
        "buckets": "[64x96]",
        "sampling.num_frames": 9,
        "sampling.context_frames": 5,
        "sampling.steps": 1,
    } | values
    return [f"{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in values.items()]


def request(**more: Any) -> Request:
    return read_request(read_as(str(RECIPE), words(**more), SAMPLE))


def speaker(name: str | None, **place: Any) -> dict[str, Any]:
    return ({} if name is None else {"audio": f"{name}.wav"}) | place


def places(asked: Request) -> torch.Tensor:
    return place_speakers(asked, (64, 96), 8)


def test_turns_are_taken_together_or_one_after_another() -> None:
    speakers = [speaker("anna"), speaker("ben")]
    together = load_tracks(request(speakers=speakers), 25)
    assert together.shape == (2, 9600)
    assert (together[0, 6400:] == 0).all() and (together[:, :6400] != 0).any(1).all()
    in_turn = load_tracks(request(speakers=speakers, turns="in_turn"), 25)
    assert in_turn.shape == (2, 16000)
    assert torch.equal(in_turn[0, :6400], together[0, :6400]) and (in_turn[0, 6400:] == 0).all()
    assert torch.equal(in_turn[1, 6400:], together[1]) and (in_turn[1, :6400] == 0).all()


def test_one_without_audio_is_silent() -> None:
    tracks = load_tracks(request(speakers=[speaker(None), speaker("ben")]), 25)
    assert tracks.shape == (2, 9600)
    assert (tracks[0] == 0).all() and (tracks[1] != 0).any()
    with pytest.raises(InputError, match="nobody has audio"):
        load_tracks(request(speakers=[speaker(None), speaker(None)]), 25)


def test_boxes_and_masks_place_speakers() -> None:
    mask = np.zeros((64, 96), np.uint8)
    mask[:, 56:] = 255
    Image.fromarray(mask).save("ben.png")
    boxes = places(request(speakers=[speaker("anna", box=LEFT), speaker("ben", box=RIGHT)]))
    masks = places(request(speakers=[speaker("anna", box=LEFT), speaker("ben", mask="ben.png")]))
    assert torch.equal(boxes, masks)
    assert boxes.shape == (2, 8, 12)
    assert (boxes[0, :, :5] == 1).all() and (boxes[0, :, 5:] == 0).all()
    assert (boxes[1, :, 7:] == 1).all() and (boxes[1, :, :7] == 0).all()


def test_places_follow_the_cut_of_the_picture() -> None:
    """A wide picture loses its sides; a box that was beyond them is empty."""
    Image.fromarray(np.full((64, 192, 3), 90, np.uint8)).save("wide.png")
    beyond = [speaker("anna", box=[0, 0, 40, 64]), speaker("ben", box=[70, 0, 120, 64])]
    with pytest.raises(InputError, match="speakers: the mask of speaker 1 is empty"):
        places(request(image="wide.png", speakers=beyond))


def test_without_places_speakers_stand_side_by_side() -> None:
    three = places(request(speakers=[speaker("anna"), speaker("ben"), speaker(None)]))
    columns = [mask.any(0).nonzero().flatten().tolist() for mask in three]
    assert columns == [[1, 2, 3], [5, 6, 7], [9, 10, 11]]
    assert (places(request(speakers=[speaker("anna")])) == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": "anna.wav", "speakers": [speaker("ben")]}, "audio, speakers: give one of them"),
        ({"text": None, "audio": "anna.wav"}, "text: missing"),
        ({"speakers": [speaker("carl")]}, "carl.wav"),
        ({"speakers": [speaker("anna", box=[1, 2, 3])]}, "speakers.0.box"),
        ({"speakers": [speaker("anna", place=3)]}, "speakers.0.place"),
        ({"speakers": []}, "speakers"),
        ({"speakers": [speaker("anna", box=LEFT), speaker("ben")]}, "speaker 2: give a box or"),
        (
            {"speakers": [speaker("anna", box=LEFT), speaker("ben", box=[90, 0, 99, 64])]},
            r"speaker 2: the box \[90, 0, 99, 64\] is not .* 96x64",
        ),
        ({"job": "pair.png", "audio": "anna.wav"}, "job: pair.png tells text, audio, image"),
    ],
)
def test_unfit_speakers_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample(str(RECIPE), words(**change), print_nothing)
    assert not Path("talk.mp4").exists()


def test_a_job_of_the_public_program_is_read() -> None:
    """Its boxes hold row, column, row, column, whatever they are called there."""
    job = {
        "prompt": "two people talk",
        "cond_video": "pair.png",
        "cond_audio": {"person1": "anna.wav", "person2": "None"},
        "audio_type": "add",
        "bbox": {"person1": [0, 0, 64, 40], "person2": [0, 56, 64, 96]},
    }
    Path("job.json").write_text(json.dumps(job))
    given = {"job": "job.json", "text": None, "image": None}
    asked = request(**given)
    assert (asked.text, asked.turns, asked.image) == (
        "two people talk",
        "in_turn",
        Path("pair.png"),
    )
    ours = request(speakers=[speaker("anna", box=LEFT), speaker(None, box=RIGHT)])
    assert torch.equal(places(asked), places(ours))
    assert probe(sample(str(RECIPE), words(**given), print_nothing)).num_frames == 10
    del job["cond_video"]
    Path("job.json").write_text(json.dumps(job))
    with pytest.raises(InputError, match="job: job.json: cond_video"):
        request(**given)


def test_two_speakers_make_a_video() -> None:
    speakers = [speaker("anna", box=LEFT), speaker("ben", box=RIGHT)]
    assert probe(sample(str(RECIPE), words(speakers=speakers), print_nothing)).num_frames == 15


def print_nothing(line: str) -> None:
    """Take no notice."""
