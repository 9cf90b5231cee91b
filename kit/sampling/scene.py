"""What a video is made of, and what of it steers one chunk."""

from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from kit.batch import Conditions
from kit.models.base import Encoders
from kit.reference import Unchanged, between_grey, followed_by_grey, reference_mask
from kit.sampling.chunks import Chunk
from kit.speech import speech_windows


class Source(Protocol):
    """Where reference frames come from."""

    def frame(self, index: int) -> Tensor:
        """Give the picture at the time of video frame `index`, -1 to 1. [3, height, width].

        Asked with rising numbers; behind its end a source repeats its last picture.
        """

    def again(self) -> "Source":
        """Give the same source, to be asked from its beginning."""


@dataclass(frozen=True)
class Scene:
    """What to make a video of.

    Attributes:
        text: caption.
        tracks: speech of each speaker at 16 kHz, -23 LUFS. [S, samples]
        source: portrait or source video, at the video's size.
        speaker_masks: where each speaker stands, 0 or 1, at latent size. [S, H, W]
        has_reference: False makes video from text and speech alone; the source only tells the size.
    """

    text: str
    tracks: Tensor
    source: Source
    speaker_masks: Tensor
    has_reference: bool = True


@dataclass(frozen=True)
class EncodedScene:
    """What all chunks of a video share.

    Attributes:
        text: states of the caption. [1, L, D]
        null_text: states of the negative text. [1, L', D]
        speech: features of the whole video and a little beyond. [S, T, M, D]
        num_frames: frames of the whole video.
        speaker_masks: as in the scene. [S, H, W]
        references: encodes the reference of a chunk, unless it is that of the chunk before.
    """

    text: Tensor
    null_text: Tensor
    speech: Tensor
    num_frames: int
    speaker_masks: Tensor
    references: Unchanged[tuple[Tensor, Tensor]] = field(default_factory=Unchanged)


def chunk_conditions(
    encoders: Encoders,
    encoded: EncodedScene,
    chunk: Chunk,
    frame: Tensor,
    last: Tensor | None = None,
) -> Conditions:
    """Put together what steers one chunk, as a batch of one.

    Args:
        encoders: give the reference its latents and image features.
        encoded: text, speech and places of the whole video.
        chunk: which frames.
        frame: the chunk's reference picture, -1 to 1. [3, height, width]
        last: its last frame, if that is given. [3, height, width]
    """
    given = [frame] if last is None else [frame, last]
    # A source's pictures are on the CPU, those that were made where they were decoded.
    pictures = torch.stack([picture.cpu() for picture in given])
    reference, image = encoded.references(
        partial(_encode_reference, encoders, chunk.num_frames), pictures
    )
    audio = speech_windows(encoded.speech, chunk.start, chunk.num_frames)
    return Conditions(
        text=encoded.text,
        image=image,
        reference=reference,
        reference_mask=reference_mask(last is not None, reference.shape[2]),
        audio=audio[None],
        num_speakers=torch.tensor([len(audio)]),
        speaker_masks=encoded.speaker_masks[None],
    )


def _encode_reference(
    encoders: Encoders, num_frames: int, pictures: Tensor
) -> tuple[Tensor, Tensor]:
    """Encode one or two pictures with grey frames to the latents and image features of a chunk."""
    frames = followed_by_grey(pictures[0], num_frames)
    if len(pictures) == 2:
        frames = between_grey(pictures[0], pictures[1], num_frames)
    return encoders.encode_video(frames[None]), encoders.encode_image(pictures[:1])
