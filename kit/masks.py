"""From masks in pixels to masks at latent size."""

import torch.nn.functional as F
from torch import Tensor

from kit.errors import InputError

MAX_SPEAKERS = 6
"""As many as the speaker bands of the audio attention have room for."""


def latent_masks(masks: Tensor, pixel_stride: int) -> Tensor:
    """Shrink speaker masks to latent size by nearest neighbour; above 0 counts as inside.

    Args:
        masks: one mask for each speaker. [S, height, width]
        pixel_stride: pixels in a latent position.

    Returns:
        0 or 1, float32. [S, H, W]
    """
    size = (masks.shape[-2] // pixel_stride, masks.shape[-1] // pixel_stride)
    return (F.interpolate(masks[None].float(), size, mode="nearest")[0] > 0).float()


def check_speaker_masks(speaker_masks: Tensor, place: str) -> None:
    """Refuse masks that cannot tell several speakers apart: an empty one would give NaN.

    Args:
        speaker_masks: latent-size masks. [S, H, W]
        place: what to name in the message.

    Raises:
        InputError: a speaker's mask holds no token, or there are too many speakers.
    """
    count, height, width = speaker_masks.shape
    if count > MAX_SPEAKERS:
        raise InputError(f"{place}: {count} speakers; at most {MAX_SPEAKERS} can be told apart")
    if count == 1:
        return
    grid = (height // 2, width // 2)
    tokens = F.interpolate(speaker_masks[None].float(), size=grid, mode="nearest")[0] > 0
    empty = [str(number) for number, mask in enumerate(tokens, start=1) if not mask.any()]
    if empty:
        raise InputError(
            f"{place}: the mask of speaker {', '.join(empty)} is empty; each of {count} speakers "
            f"needs a place inside the picture, at least 16x16 pixels large"
        )
