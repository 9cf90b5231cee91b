"""The video autoencoder of a small base."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from kit.data.clips import RawSample
from kit.data.encode import to_video
from kit.draws import draw_uniform, seed_of
from kit.errors import InputError
from kit.models.encoders import prefer_channels_last
from kit.pretraining.base import EncoderTask, save_part
from kit.recipe import ExistingFolder

_FILE = "diffusion_pytorch_model.safetensors"


class VideoCoding(EncoderTask):
    """Trains Wan's autoencoder to give back what it saw.

    Pictures come first: alone they teach most of what clips need, at a tenth of the cost.

    Args:
        seed: of the first weights.
        config: folder whose `config.json` tells the sizes.
        start: base folder whose `vae/` an earlier part of the training wrote; None begins anew.
        decoder_only: leave the encoder as it is, so that latents keep their meaning for a denoiser.
        pictures: train on single pictures, the first frame of each window and its reference.
        kl: weight of the pull of the latents towards a standard normal distribution.
        edges: weight of the error of differences between neighbouring pixels.
        motion: weight of the error of differences between neighbouring frames; it keeps small
            things that move, such as lips, from being averaged over time.
        recolor: share of clips whose hues are turned by any angle, so that the autoencoder serves
            characters in colours that the data do not have.

    Source: the losses are the usual ones of latent diffusion (Rombach et al. 2021), without the
    perceptual and adversarial terms, which flat drawings do not need.
    """

    def __init__(
        self,
        seed: int,
        *,
        config: ExistingFolder,
        start: str | None = None,
        decoder_only: bool = False,
        pictures: bool = False,
        kl: Annotated[float, Field(ge=0)] = 1e-4,
        edges: Annotated[float, Field(ge=0)] = 1.0,
        motion: Annotated[float, Field(ge=0)] = 2.0,
        recolor: Annotated[float, Field(ge=0, le=1)] = 0.0,
    ) -> None:
        self._seed = seed
        self._config: dict[str, Any] = json.loads((Path(config) / "config.json").read_text())
        torch.manual_seed(seed_of(seed, "weights"))
        self._vae: Any = AutoencoderKLWan.from_config(self._config)
        self._decoder_only = decoder_only
        if start is None:
            _start_quiet(self._vae)
        else:
            self._vae.load_state_dict(_weights(Path(start) / "vae" / _FILE))
        if start is not None and decoder_only:
            self._config = json.loads((Path(start) / "vae" / "config.json").read_text())
            for part in (self._vae.encoder, self._vae.quant_conv):
                part.requires_grad_(False)
        prefer_channels_last(self._vae)
        self._pictures = pictures
        self._kl = kl
        self._edges = edges
        self._motion = motion
        self._recolor = recolor

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
            "edges": self._edges * difference_error(decoded, pixels, (-1, -2)),
            "motion": self._motion * difference_error(decoded, pixels, (-3,)),
            "kl": self._kl * posterior.kl().mean() / posterior.mean[0].numel(),
        }

    def finish(self, batches: list[list[RawSample]]) -> None:
        """Measure mean and spread of the latents, by which they are normalised."""
        if self._decoder_only:
            return
        with torch.no_grad():
            modes = [self._vae.encode(self._pixels(batch)).latent_dist.mode() for batch in batches]
        latents = torch.cat([mode.transpose(0, 1).flatten(1) for mode in modes], dim=1)
        self._config["latents_mean"] = latents.mean(dim=1).tolist()
        self._config["latents_std"] = latents.std(dim=1).tolist()

    def save(self, folder: Path) -> None:
        """Write `vae/`."""
        save_part(folder / "vae", self._config, self._vae, _FILE)

    def _pixels(self, batch: list[RawSample]) -> Tensor:
        """Put a batch together, as clips or as pictures. [B, 3, T, height, width]"""
        clips = [self._recolored(raw, raw.pixels) for raw in batch]
        if self._pictures:
            others = [self._recolored(raw, raw.reference[None]) for raw in batch]
            clips = [*(clip[:, :1] for clip in clips), *others]
        pixels = torch.stack(clips).to(self._vae.device)
        return pixels.contiguous(memory_format=torch.channels_last_3d)

    def _recolored(self, raw: RawSample, pictures: np.ndarray) -> Tensor:
        path = (self._seed, raw.epoch, raw.index, raw.start, "recolor")
        pixels = to_video(np.asarray(pictures))
        if draw_uniform(*path) >= self._recolor:
            return pixels
        return turn_hues(pixels, draw_uniform(*path, "angle") * 2 * math.pi)


def turn_hues(pixels: Tensor, angle: float) -> Tensor:
    """Turn all colours about the grey axis of RGB. [3, T, height, width], -1 to 1"""
    axis = torch.full((3,), 3**-0.5, device=pixels.device)
    across = torch.linalg.cross(axis.expand(3, 3), torch.eye(3, device=pixels.device))
    # Rows of `across` are axis x unit vector, so its transpose generates the rotation.
    turn = torch.matrix_exp(angle * across.T)
    return torch.einsum("ij,j...->i...", turn, pixels).clamp(-1, 1)


def _weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise InputError(f"task.start: {file} is missing; train the part before this one first")
    return load_file(file)


def _start_quiet(vae: nn.Module) -> None:
    """Let residual blocks begin as the identity and frames begin alone, so that learning starts."""
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv3d):
            continue
        with torch.no_grad():
            # Kernels look back in time: their last tap sees the present frame.
            module.weight[:, :, :-1] = 0
            if name.endswith(".conv2"):
                module.weight.zero_()
                assert module.bias is not None
                module.bias.zero_()


def difference_error(one: Tensor, other: Tensor, axes: Sequence[int]) -> Tensor:
    """Average the error of differences between neighbours along axes. [B, 3, T, H, W]

    It is 0 along axes of length 1.
    """
    errors = [
        (one.diff(dim=axis) - other.diff(dim=axis)).abs().mean()
        for axis in axes
        if one.shape[axis] > 1
    ]
    return torch.stack(errors).mean() if errors else one.new_zeros(())
