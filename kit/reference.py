"""How reference frames are shown to the denoiser: a kept frame or two, grey ones for the rest."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class Unchanged(Generic[Made]):
    """Makes something of pictures, but not twice of the same ones: a portrait stays what it is.

    Nothing less than a whole window can be encoded: the encoder looks back over 28 latent frames,
    and in the last of 21 a portrait can still be told from grey.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, Made] | None = None

    def __call__(self, make: Callable[[Tensor], Made], pictures: Tensor) -> Made:
        """Give `make(pictures)`, or what was made last if the pictures are equal to those."""
        if self._last is None or not torch.equal(self._last[0], pictures):
            self._last = pictures, make(pictures)
        return self._last[1]


def followed_by_grey(frame: Tensor, num_frames: int) -> Tensor:
    """Put mid-grey frames behind a frame. [3, height, width] -> [3, T, height, width].

    Source: Wan I2V and InfiniteTalk pad the reference in pixels, not with zero latents.
    """
    grey = frame.new_zeros(3, num_frames - 1, *frame.shape[1:])
    return torch.cat([frame[:, None], grey], dim=1)


def between_grey(first: Tensor, last: Tensor, num_frames: int) -> Tensor:
    """Put mid-grey frames between two frames. [3, height, width] -> [3, T, height, width].

    Source: Wan's first-and-last-frame model.
    """
    return torch.cat([followed_by_grey(first, num_frames - 1), last[:, None]], dim=1)


def first_frame_mask(batch: int, num_latent_frames: int) -> Tensor:
    """Mark the first latent frame as kept, in the channels of all its video frames. [B, 4, F].

    Source: InfiniteTalk marks frame 0 of every chunk, never its context frames.
    """
    mask = torch.zeros(batch, 4, num_latent_frames)
    mask[:, :, 0] = 1
    return mask


def reference_mask(shows_last: bool, num_latent_frames: int) -> Tensor:
    """Mark what a reference shows: the first latent frame, or also the last video frame. [1, 4, F].

    Source: Wan's first-and-last-frame model.
    """
    mask = first_frame_mask(1, num_latent_frames)
    if shows_last:
        mask[:, -1, -1] = 1
    return mask
