"""Speaker masks at latent size."""

import pytest
import torch

from kit.errors import InputError
from kit.masks import latent_masks, require_inside


def test_blocks_shrink_to_positions() -> None:
    small = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    large = small.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert torch.equal(latent_masks(large, 8), small)


def test_anything_above_zero_is_inside() -> None:
    masks = torch.tensor([[[0, 1], [128, 255]]], dtype=torch.uint8)
    shrunk = latent_masks(masks, 1)
    assert shrunk.dtype == torch.float32
    assert shrunk.tolist() == [[[0, 1], [1, 1]]]


def test_an_empty_mask_is_refused_by_number() -> None:
    masks = torch.ones(3, 2, 2)
    require_inside(masks, "clip7")
    masks[1] = 0
    with pytest.raises(InputError, match="^clip7: the mask of speaker 2 covers nothing"):
        require_inside(masks, "clip7")
