"""What travels from the shards to the loss, and the legend of its dimensions.

B batch, C latent channels, F latent frames, H and W latent height and width, T video frames,
S speakers, L text tokens, K image tokens, D width of the feature named. F = 1 + (T - 1) / 4.
`sigma` is the noise level: 1 is pure noise, 0 is clean. `velocity` is noise - latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kit.reference import reference_mask

SAMPLE_RATE = 16_000
"""Samples per second of all speech."""

AUDIO_WINDOW = 5
"""Speech feature frames seen by one video frame: itself and two on either side."""


@dataclass(frozen=True)
class Conditions:
    """All that steers the denoiser beside the noisy latents.

    Attributes:
        text: text encoder states, zero rows behind the real ones. [B, L, D]
        image: image encoder states of the reference frame. [B, K, D]
        reference: latents of the reference frame followed by grey frames. [B, C, F, H, W]
        reference_mask: 1 where `reference` holds a frame to keep, one channel for each of the four
            video frames in a latent frame. [B, 4, F]
        audio: speech features around each video frame, with layers M of the encoder.
            [B, S, T, 5, M, D]
        num_speakers: how many of the S slots are in use, at least 1. [B]
        speaker_masks: where each speaker stands, 0 or 1, at latent size. [B, S, H, W]
    """

    text: Tensor
    image: Tensor
    reference: Tensor
    reference_mask: Tensor
    audio: Tensor
    num_speakers: Tensor
    speaker_masks: Tensor

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Conditions":
        """Move to a device; floating point tensors also change dtype if one is given."""
        names = [field.name for field in fields(self)]
        return Conditions(**{n: _move(getattr(self, n), device, dtype) for n in names})

    @staticmethod
    def cat(parts: "Sequence[Conditions]") -> "Conditions":
        """Put several conditions of equal shape behind each other on the batch axis."""
        names = [field.name for field in fields(Conditions)]
        return Conditions(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})


@dataclass(frozen=True)
class Sample:
    """One window of one clip, encoded: what a raw and an encoded shard both come to.

    `epoch` and `index` (the clip's number in the shards) name all random choices of this sample.

    Attributes:
        latents: clean latents of the window. [C, F, H, W]
        reference: latents of the reference frame and the grey frames behind it. [C, F, H, W]
        image: image features of the reference frame. [K, D]
        text: text states of the caption, real rows only. [L, D]
        null_text: text states of the negative prompt, real rows only. [L', D]
        audio: speech features around each frame of the window. [S, T, 5, M, D]
        speaker_masks: where each speaker stands, 0 or 1. [S, H, W]
        num_context: leading latent frames that are given clean and kept out of the loss.
        shows_last: whether `reference` holds the window's last frame too.
    """

    key: str
    epoch: int
    index: int
    latents: Tensor
    reference: Tensor
    image: Tensor
    text: Tensor
    null_text: Tensor
    audio: Tensor
    speaker_masks: Tensor
    num_context: int
    shows_last: bool = False


@dataclass(frozen=True)
class Batch:
    """Samples of equal latent shape, stacked.

    Attributes:
        keys: name of each sample.
        draws: (epoch, index) of each sample, naming its random choices; on the CPU. [B, 2]
        latents: clean latents. [B, C, F, H, W]
        conditions: all conditions present; training drops some.
        null_text: text states of the negative prompt. [B, L', D]
        num_context: clean leading latent frames of each sample. [B]
    """

    keys: tuple[str, ...]
    draws: Tensor
    latents: Tensor
    conditions: Conditions
    null_text: Tensor
    num_context: Tensor

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Batch":
        """Move to a device; floating point tensors also change dtype if one is given."""
        return Batch(
            keys=self.keys,
            draws=self.draws,
            latents=_move(self.latents, device, dtype),
            conditions=self.conditions.to(device, dtype),
            null_text=_move(self.null_text, device, dtype),
            num_context=_move(self.num_context, device, dtype),
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one bucket; text and speakers are padded to the longest with zeros."""
    latents = torch.stack([sample.latents for sample in samples])  # [B, C, F, H, W]
    num_speakers = [len(sample.audio) for sample in samples]
    conditions = Conditions(
        text=pad_sequence([sample.text for sample in samples], batch_first=True),
        image=torch.stack([sample.image for sample in samples]),
        reference=torch.stack([sample.reference for sample in samples]),
        reference_mask=torch.cat(
            [reference_mask(sample.shows_last, latents.shape[2]) for sample in samples]
        ),
        audio=pad_sequence([sample.audio for sample in samples], batch_first=True),
        num_speakers=torch.tensor(num_speakers),
        speaker_masks=pad_sequence([s.speaker_masks for s in samples], batch_first=True),
    )
    return Batch(
        keys=tuple(sample.key for sample in samples),
        draws=torch.tensor([(sample.epoch, sample.index) for sample in samples]),
        latents=latents,
        conditions=conditions,
        null_text=pad_sequence([sample.null_text for sample in samples], batch_first=True),
        num_context=torch.tensor([sample.num_context for sample in samples]),
    )


def _move(value: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    return value.to(device, dtype if value.is_floating_point() else None)
