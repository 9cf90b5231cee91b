"""The video autoencoder of a small base."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from pydantic import Field
from torch import Tensor, nn

from kit.data.clips import RawSample
from kit.data.encode import to_video
from kit.draws import seed_of
from kit.pretraining.base import EncoderTask, save_part
from kit.recipe import ExistingFolder


class VideoCoding(EncoderTask):
    """Trains Wan's autoencoder to give back what it saw.

    Args:
        seed: of the first weights.
        config: folder whose `config.json` tells the sizes.
        kl: weight of the pull of the latents towards a standard normal distribution.
        edges: weight of the error of differences between neighbouring pixels.

    Source: the losses are the usual ones of latent diffusion (Rombach et al. 2021), without the
    perceptual and adversarial terms, which flat drawings do not need.
    """

    def __init__(
        self,
        seed: int,
        *,
        config: ExistingFolder,
        kl: Annotated[float, Field(ge=0)] = 1e-4,
        edges: Annotated[float, Field(ge=0)] = 1.0,
    ) -> None:
        self._config: dict[str, Any] = json.loads((Path(config) / "config.json").read_text())
        torch.manual_seed(seed_of(seed, "weights"))
        self._vae: Any = AutoencoderKLWan.from_config(self._config)
        _start_quiet(self._vae)
        self._kl = kl
        self._edges = edges

    @property
    def network(self) -> nn.Module:
        """The autoencoder."""
        network: nn.Module = self._vae
        return network

    def losses(self, batch: list[RawSample]) -> dict[str, Tensor]:
        """Compare the decoded pictures with the given ones."""
        pixels = self._pixels(batch)
        posterior = self._vae.encode(pixels).latent_dist
        decoded = self._vae.decode(posterior.sample()).sample.float()
        return {
            "pixels": (decoded - pixels).abs().mean(),
            "edges": self._edges * edge_error(decoded, pixels),
            "kl": self._kl * posterior.kl().mean() / posterior.mean[0].numel(),
        }

    def finish(self, batches: list[list[RawSample]]) -> None:
        """Measure mean and spread of the latents, by which they are normalised."""
        with torch.no_grad():
            modes = [self._vae.encode(self._pixels(batch)).latent_dist.mode() for batch in batches]
        latents = torch.cat([mode.transpose(0, 1).flatten(1) for mode in modes], dim=1)
        self._config["latents_mean"] = latents.mean(dim=1).tolist()
        self._config["latents_std"] = latents.std(dim=1).tolist()

    def save(self, folder: Path) -> None:
        """Write `vae/`."""
        file = "diffusion_pytorch_model.safetensors"
        save_part(folder / "vae", self._config, self._vae, file)

    def _pixels(self, batch: list[RawSample]) -> Tensor:
        return torch.stack([to_video(np.asarray(raw.pixels)) for raw in batch]).to(self._vae.device)


def _start_quiet(vae: nn.Module) -> None:
    """Let residual blocks begin as the identity: training then gets going at once."""
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv3d) and name.endswith(".conv2"):
            nn.init.zeros_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)


def edge_error(one: Tensor, other: Tensor) -> Tensor:
    """Average the error of differences between neighbours, across and down. [B, 3, T, H, W]."""
    errors = [(one.diff(dim=axis) - other.diff(dim=axis)).abs().mean() for axis in (-1, -2)]
    return torch.stack(errors).mean()
