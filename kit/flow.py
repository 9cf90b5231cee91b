"""Flow matching: a straight path from latents x (sigma 0) to noise e (sigma 1).

noisy = (1 - sigma) x + sigma e        velocity = e - x
"""

import torch
from torch import Tensor


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Mix latents with noise at level sigma, 0 to 1. [B, ...], [B, ...], [B] -> [B, ...]."""
    sigma = _like(sigma, latents)
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Give the velocity that the denoiser should predict."""
    return noise - latents


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Move noise levels, 0 to 1, towards noise; shift 1 changes nothing.

    Source: Wan2.1 and InfiniteTalk: 7 at 480 p, 11 at 720 p.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def hold_context(noisy: Tensor, clean: Tensor, num_context: Tensor) -> Tensor:
    """Put clean latents back into the leading frames.

    Args:
        noisy: latents at any level. [B, C, F, H, W]
        clean: latents whose leading frames are given, perhaps no others. [B, C, f, H, W]
        num_context: how many leading frames to take from `clean`, 0 to f. [B]
    """
    given = context_frames(num_context, clean.shape[2])[:, None, :, None, None]
    head = torch.where(given, clean.to(noisy.dtype), noisy[:, :, : clean.shape[2]])
    return torch.cat([head, noisy[:, :, clean.shape[2] :]], dim=2)


def context_frames(num_context: Tensor, num_latent_frames: int) -> Tensor:
    """Mark the leading `num_context` frames of each video. [B] -> bool [B, F]."""
    frames = torch.arange(num_latent_frames, device=num_context.device)
    return frames < num_context[:, None]


def _like(sigma: Tensor, latents: Tensor) -> Tensor:
    return sigma.to(latents.dtype).view(-1, *[1] * (latents.ndim - 1))
