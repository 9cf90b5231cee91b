"""Speaker masks at latent size."""

import torch

from kit.masks import latent_masks


def test_blocks_shrink_to_positions() -> None:
    small = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    large = small.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert torch.equal(latent_masks(large, 8), small)


def test_anything_above_zero_is_inside() -> None:
    for masks in (torch.tensor([[[0, 1], [128, 255]]]).byte(), torch.tensor([[[0, 0.1], [1, 9]]])):
        shrunk = latent_masks(masks, 1)
        assert shrunk.dtype == torch.float32
        assert shrunk.tolist() == [[[0, 1], [1, 1]]]
