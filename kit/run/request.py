"""What a sample recipe asks for: picture, words, and who speaks where."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kit.data.buckets import fit_mask
from kit.data.media import load_image, probe
from kit.data.speakers import draw_box, load_mask
from kit.errors import InputError
from kit.masks import check_speaker_masks, latent_masks
from kit.recipe import ExistingFile, Recipe
from kit.run.scenes import Size, load_track

Turns = Literal["together", "in_turn"]
FOUR_NUMBERS = Field(min_length=4, max_length=4)
MARGIN = 0.05
"""Share of the height and of each speaker's column that a default place leaves out at every side.

Source: InfiniteTalk, for two speakers.
"""


class SpeakerEntry(BaseModel):
    """One speaker of a recipe.

    Attributes:
        audio: their speech; without it they are silent.
        box: where they stand: x_min, y_min, x_max, y_max in pixels of the picture.
        mask: a picture, white where they stand, in place of a box.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    audio: ExistingFile | None = None
    box: Annotated[Sequence[int], FOUR_NUMBERS] | None = None
    mask: ExistingFile | None = None


@dataclass(frozen=True)
class Request:
    """What to make a video of.

    Attributes:
        text: caption.
        image: portrait, or
        video: source video, or
        size: HEIGHTxWIDTH of a video without reference; two of the three are None.
        speakers: at least one.
        turns: whether they speak `together` or one after another.
    """

    text: str
    image: Path | None
    video: Path | None
    size: str | None
    speakers: Sequence[SpeakerEntry]
    turns: Turns

    def files(self) -> list[Path]:
        """List all files that it names."""
        named = [self.image, self.video]
        named += [Path(f) for s in self.speakers for f in (s.audio, s.mask) if f is not None]
        return [file for file in named if file is not None]


def read_request(recipe: Recipe) -> Request:
    """Read what a sample recipe asks for, or the job file that it names.

    Raises:
        InputError: lists what is missing, or given twice.
    """
    if recipe["job"] is not None:
        given = [
            key
            for key in ("text", "audio", "speakers", "image", "video", "size")
            if recipe[key] is not None
        ]
        if given:
            raise InputError(f"job: {recipe['job']} tells {', '.join(given)}; set them to null")
        return _read_job(Path(recipe["job"]))
    problems = [
        f"{', '.join(keys)}: give one of them, and only one"
        for keys in (("image", "video", "size"), ("audio", "speakers"))
        if sum(recipe[key] is not None for key in keys) != 1
    ]
    if recipe["text"] is None:
        problems.append("text: missing")
    if problems:
        raise InputError("\n".join(problems))
    image, video = (None if recipe[k] is None else Path(recipe[k]) for k in ("image", "video"))
    speakers = recipe["speakers"] or [SpeakerEntry(audio=recipe["audio"])]
    return Request(recipe["text"], image, video, recipe["size"], speakers, recipe["turns"])


def load_tracks(request: Request, fps: int) -> Tensor:
    """Load everybody's speech at -23 LUFS, with silence where they say nothing. [S, samples]

    Raises:
        InputError: nobody speaks, or a file cannot be read.
    """
    voices = {
        number: load_track(Path(speaker.audio), fps)
        for number, speaker in enumerate(request.speakers)
        if speaker.audio is not None
    }
    if not voices:
        raise InputError("speakers: nobody has audio")
    starts = dict.fromkeys(voices, 0)
    if request.turns == "in_turn":
        ends = np.cumsum([len(voice) for voice in voices.values()])
        starts = dict(zip(voices, [0, *ends[:-1].tolist()], strict=True))
    silence = torch.zeros(0)
    return pad_sequence(
        [
            torch.cat([torch.zeros(starts[n]), voices[n]]) if n in voices else silence
            for n in range(len(request.speakers))
        ],
        batch_first=True,
    )


def place_speakers(request: Request, size: Size, pixel_stride: int) -> Tensor:
    """Bring everybody's place to latent size; a lone speaker fills the picture. [S, H, W]

    Raises:
        InputError: a mask is unreadable, or a place is missing, empty or outside the picture.
    """
    count = len(request.speakers)
    height, width = size if request.size else _picture_size(request)
    if count == 1:
        masks = [np.full((height, width), 255, np.uint8)]
    elif all(s.box is None and s.mask is None for s in request.speakers):
        masks = [_column(number, count, height, width) for number in range(count)]
    else:
        masks = [_mask(n, s, height, width) for n, s in enumerate(request.speakers, start=1)]
    fitted = np.stack([fit_mask(mask, *size) for mask in masks])
    placed = latent_masks(torch.from_numpy(fitted), pixel_stride)
    check_speaker_masks(placed, "speakers")
    return placed


def _mask(number: int, speaker: SpeakerEntry, height: int, width: int) -> np.ndarray:
    place = f"speakers: speaker {number}"
    if (speaker.box is None) == (speaker.mask is None):
        raise InputError(f"{place}: give a box or a mask, to all speakers or to none")
    if speaker.mask is not None:
        return load_mask(Path(speaker.mask), height, width)
    assert speaker.box is not None
    return draw_box(speaker.box, height, width, place)


def _column(number: int, count: int, height: int, width: int) -> np.ndarray:
    """Give a speaker one of equal columns, from left to right."""
    mask = np.zeros((height, width), np.uint8)
    left, right = (round((number + at) / count * width) for at in (MARGIN, 1 - MARGIN))
    mask[round(MARGIN * height) : round((1 - MARGIN) * height), left:right] = 255
    return mask


def _picture_size(request: Request) -> Size:
    if request.image is not None:
        height, width = load_image(request.image).shape[:2]
        return height, width
    assert request.video is not None
    info = probe(request.video)
    return info.height, info.width


class _Job(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    prompt: str
    cond_video: str
    cond_audio: dict[str, str] = Field(min_length=1)
    audio_type: Literal["para", "add"] = "para"
    bbox: dict[str, Annotated[list[float], FOUR_NUMBERS]] | None = None


def _read_job(path: Path) -> Request:
    """Read a job as InfiniteTalk's program takes it.

    Its boxes are named x, y, x, y but hold row, column, row, column.
    """
    try:
        job = _Job.model_validate_json(path.read_bytes())
    except ValidationError as error:
        finding = error.errors()[0]
        place = ".".join(map(str, finding["loc"]))
        raise InputError(f"job: {path}: {place}: {finding['msg']}".replace(": : ", ": ")) from error
    picture = _beside(path, job.cond_video)
    is_video = picture.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    speakers = []
    for name, sound in sorted(job.cond_audio.items()):
        entry: dict[str, Any] = {"audio": None if sound == "None" else str(_beside(path, sound))}
        if job.bbox is not None:
            if name not in job.bbox:
                raise InputError(f"job: {path}: bbox: {name} is missing; {', '.join(job.bbox)}")
            row_min, column_min, row_max, column_max = (round(n) for n in job.bbox[name])
            entry["box"] = [column_min, row_min, column_max, row_max]
        speakers.append(SpeakerEntry.model_validate_json(json.dumps(entry)))
    return Request(
        text=job.prompt,
        image=None if is_video else picture,
        video=picture if is_video else None,
        size=None,
        speakers=speakers,
        turns="in_turn" if job.audio_type == "add" else "together",
    )


def _beside(job: Path, name: str) -> Path:
    """Find a file that a job names: from here, as the public program does, or beside the job."""
    for candidate in (Path(name), job.parent / name):
        if candidate.is_file():
            return candidate
    raise InputError(f"job: {job}: there is no file '{name}', neither here nor beside it")
