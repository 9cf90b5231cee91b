"""The batches of a run by their shapes, with or without shards."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kit.batch import AUDIO_WINDOW, Batch, Conditions, Sample
from kit.models.base import Geometry
from kit.planning.tally import imagined

CLIP_TOKENS = 257
"""Tokens of a picture by the public image encoder, ViT-H/14 at 224 pixels."""

CAPTION_TOKENS = 128
"""Of a long caption; more than two behind it are padding, for which two stand."""


@dataclass(frozen=True)
class Widths:
    """Widths of what the encoders give.

    Attributes:
        channels: of latents.
        text: of a text token.
        image: of an image token.
        image_tokens: of one picture.
        speech_layers: of the speech encoder that are stacked.
        speech: width of each.
        text_tokens: of a caption.
    """

    channels: int = 16
    text: int = 4096
    image: int = 1280
    image_tokens: int = CLIP_TOKENS
    speech_layers: int = 12
    speech: int = 768
    text_tokens: int = CAPTION_TOKENS


@dataclass(frozen=True)
class Window:
    """What the pictures of a sample are: video frames and pixels; and how many speak."""

    num_frames: int
    height: int
    width: int
    num_speakers: int = 1

    def grid(self, sizes: Geometry) -> tuple[int, int, int]:
        """Count latent frames, rows and columns."""
        return (
            1 + (self.num_frames - 1) // sizes.frame_stride,
            self.height // sizes.pixel_stride,
            self.width // sizes.pixel_stride,
        )

    def num_tokens(self, sizes: Geometry) -> int:
        """Count the video tokens of the denoiser, 2 x 2 latents each."""
        num_frames, rows, columns = self.grid(sizes)
        return num_frames * (rows // 2) * (columns // 2)


def typical_sample(window: Window, widths: Widths, sizes: Geometry) -> Sample:
    """Make a sample of a window's shapes that takes no memory."""
    grid, speakers = window.grid(sizes), window.num_speakers
    text = _blank(widths.text_tokens, widths.text)
    speech = (AUDIO_WINDOW, widths.speech_layers, widths.speech)
    return Sample(
        key="",
        epoch=0,
        index=0,
        latents=_blank(widths.channels, *grid),
        reference=_blank(widths.channels, *grid),
        image=_blank(widths.image_tokens, widths.image),
        text=text,
        null_text=text,
        audio=_blank(speakers, window.num_frames, *speech),
        speaker_masks=_blank(speakers, *grid[1:]),
        num_context=0 if window.num_frames == 1 else 1,
    )


def imagined_batch(batch: Batch) -> Batch:
    """Make a batch of the same shapes, inside `imagining`; only its draws are real."""
    conditions = {
        field.name: imagined(getattr(batch.conditions, field.name)) for field in fields(Conditions)
    }
    return replace(
        batch,
        latents=imagined(batch.latents),
        conditions=Conditions(**conditions),
        null_text=imagined(batch.null_text),
        num_context=imagined(batch.num_context),
    )


def _blank(*shape: int) -> Tensor:
    return torch.zeros(()).expand(shape)
