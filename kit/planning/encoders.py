"""What the frozen encoders around a denoiser take."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from kit.models.encoders import VideoEncoder
from kit.planning.tally import imagine_network, imagining


def encoder_bytes(networks: Mapping[str, nn.Module]) -> dict[str, int]:
    """Count the bytes of each network's parameters."""
    return {
        name: sum(p.numel() * p.element_size() for p in network.parameters())
        for name, network in networks.items()
    }


def encoding_bytes(vae: nn.Module, num_frames: int, height: int, width: int) -> int:
    """Find what encoding a video takes beside the weights; the network is used up."""
    return _video_bytes(vae, (3, num_frames, height, width), VideoEncoder.encode)


def decoding_bytes(vae: nn.Module, latents: tuple[int, ...], tile: int | None) -> int:
    """Find what decoding latents [C, F, H, W] takes beside the weights; the network is used up.

    Args:
        vae: on the meta device.
        latents: their shape.
        tile: side of the tiles in which they are decoded, in pixels; None is whole frames.
    """
    return _video_bytes(vae, latents, VideoEncoder.decode, tile)


def _video_bytes(
    vae: nn.Module,
    shape: tuple[int, ...],
    use: Callable[[VideoEncoder, Tensor], Tensor],
    tile: int | None = None,
) -> int:
    with imagining() as tally, torch.no_grad():
        imagine_network(vae)
        held = tally.begin()
        result = use(VideoEncoder(vae, tile), torch.empty(shape))  # type: ignore[arg-type]
        del result
        return tally.peak - held
