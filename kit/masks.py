"""From masks in pixels to masks at latent size."""

import torch.nn.functional as F
from torch import Tensor

from kit.errors import InputError


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


def require_inside(masks: Tensor, place: str) -> None:
    """Refuse masks that cover nothing: a speaker without a place would give NaN.

    Args:
        masks: latent-size masks. [S, H, W]
        place: what to name in the message.

    Raises:
        InputError: a mask is empty.
    """
    empty = [number + 1 for number, mask in enumerate(masks) if not mask.any()]
    if empty:
        raise InputError(f"{place}: the mask of speaker {empty[0]} covers nothing of the picture")
