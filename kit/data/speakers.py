"""Who speaks in a clip: their tracks and where they stand."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kit.data.media import load_speech, normalize_loudness
from kit.data.sources import Source
from kit.data.video_reader import open_image
from kit.errors import InputError

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Speaker:
    """One speaker's files.

    Attributes:
        sound: their track; None for a lone speaker means the video's own sound.
        mask: picture that is white where they stand.
        box: x_min, y_min, x_max, y_max in pixels of the source, in place of a mask.
    """

    sound: Path | None
    mask: Path | None = None
    box: Box | None = None


def find_speakers(source: Source) -> list[Speaker]:
    """Read `<stem>.json`, or else find `<stem>.speaker1.wav`, `<stem>.speaker1.png` and so on.

    Raises:
        InputError: the json is unfit, or several speakers are not all told apart by a mask.
    """
    described = source.beside(".json")
    speakers = _load_speakers(described) if described.exists() else _numbered_speakers(source)
    if not speakers:
        return [Speaker(source.sound_beside())]
    if len(speakers) == 1 and speakers[0].sound is None:
        return [Speaker(source.sound_beside(), speakers[0].mask, speakers[0].box)]
    for number, speaker in enumerate(speakers, start=1):
        if len(speakers) > 1 and speaker.mask is None and speaker.box is None:
            raise InputError(
                f"{source.path} has {len(speakers)} speakers, but speaker {number} has no mask "
                f"({source.beside(f'.speaker{number}.png').name})"
            )
    return speakers


def load_tracks(
    source: Source, speakers: list[Speaker], *, has_sound: bool
) -> tuple[Tensor, list[float | None]]:
    """Load every speaker's track at -23 LUFS; beside others, one without sound is silent.

    Returns:
        Tracks, filled to the longest with silence, and the loudness each had. [S, samples]

    Raises:
        InputError: there is no sound, or it cannot be read.
    """
    if len(speakers) == 1 and speakers[0].sound is None:
        if not has_sound:
            raise InputError(f"{source.path} has no sound and there is no .wav beside it")
        waveforms = [load_speech(source.path)]
    else:
        if all(speaker.sound is None for speaker in speakers):
            wanted = source.beside(".speaker1.wav").name
            raise InputError(
                f"{source.path} has several speakers and no track of theirs ({wanted})"
            )
        waveforms = [load_speech(s.sound) if s.sound else torch.zeros(0) for s in speakers]
    levelled = [normalize_loudness(waveform) for waveform in waveforms]
    tracks = pad_sequence([waveform for waveform, _ in levelled], batch_first=True)
    return tracks, [loudness for _, loudness in levelled]


def load_masks(
    source: Source, speakers: list[Speaker], height: int, width: int
) -> list[NDArray[np.uint8]]:
    """Load one mask for each speaker at the source's size, or none at all.

    Returns:
        255 where the speaker stands, else 0. [height, width] each

    Raises:
        InputError: a mask is unreadable or of another size, or a box lies outside the picture.
    """
    masks = []
    for number, speaker in enumerate(speakers, start=1):
        if speaker.mask is not None:
            masks.append(load_mask(speaker.mask, height, width))
        elif speaker.box is not None:
            place = f"{source.beside('.json')}: speaker {number}"
            masks.append(draw_box(speaker.box, height, width, place))
    return masks


class _SpeakerEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    box: Box | None = None
    mask: str | None = None
    audio: str | None = None


class _SpeakersFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    speakers: list[_SpeakerEntry] = Field(min_length=1)


def _load_speakers(path: Path) -> list[Speaker]:
    try:
        entries = _SpeakersFile.model_validate_json(path.read_bytes()).speakers
    except ValidationError as error:
        finding = error.errors()[0]
        place = ".".join(map(str, finding["loc"]))
        raise InputError(f"{path}: {place}: {finding['msg']}".replace(": : ", ": ")) from error
    return [
        Speaker(_inside(path, entry.audio), _inside(path, entry.mask), entry.box)
        for entry in entries
    ]


def _numbered_speakers(source: Source) -> list[Speaker]:
    speakers: list[Speaker] = []
    while True:
        middle = f".speaker{len(speakers) + 1}"
        sound, mask = source.sound_beside(middle), source.beside(f"{middle}.png")
        if sound is None and not mask.exists():
            return speakers
        speakers.append(Speaker(sound, mask if mask.exists() else None))


def _inside(path: Path, name: str | None) -> Path | None:
    if name is None:
        return None
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts:
        raise InputError(f"{path}: '{name}' leads out of the folder")
    return path.parent / place


def load_mask(path: Path, height: int, width: int) -> NDArray[np.uint8]:
    """Load a mask of that size: 255 where it is bright, else 0. [height, width]

    Raises:
        InputError: it cannot be read, or has another size.
    """
    with open_image(path) as image:
        grey = np.asarray(image.convert("L"))
    if grey.shape != (height, width):
        raise InputError(
            f"{path} is {grey.shape[1]}x{grey.shape[0]} pixels, but the picture is {width}x{height}"
        )
    return np.where(grey > 127, 255, 0).astype(np.uint8)


def draw_box(box: Sequence[int], height: int, width: int, place: str) -> NDArray[np.uint8]:
    """Draw a mask: 255 inside of x_min, y_min, x_max, y_max, else 0. [height, width]

    Args:
        box: in pixels of the picture.
        height: of the picture.
        width: of the picture.
        place: what to name in the message.

    Raises:
        InputError: the box is not inside the picture.
    """
    x_min, y_min, x_max, y_max = box
    if not (0 <= x_min < x_max <= width and 0 <= y_min < y_max <= height):
        raise InputError(
            f"{place}: the box {list(box)} is not [x_min, y_min, x_max, y_max] inside the picture "
            f"of {width}x{height} pixels"
        )
    mask = np.zeros((height, width), np.uint8)
    mask[y_min:y_max, x_min:x_max] = 255
    return mask
