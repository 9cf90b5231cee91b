"""What the rest of the kit knows of a base model: a denoiser, frozen encoders, and sizes."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kit.batch import Conditions
from kit.models.inside import UNTOUCHED, Inside
from kit.models.split import Processes


@dataclass(frozen=True)
class Geometry:
    """Sizes that data, training and sampling must agree on.

    Attributes:
        fps: video frames per second that the base was trained on.
        frame_stride: video frames in one latent frame, after the first.
        pixel_stride: pixels in one latent position, each way.
    """

    fps: int = 25
    frame_stride: int = 4
    pixel_stride: int = 8


class Denoiser(nn.Module, ABC):
    """A network that predicts velocity from noisy latents: the seat of every base's DiT.

    Attributes:
        processes: those among which each video's latent frames are divided; None if there is one.
    """

    processes: Processes | None = None

    @abstractmethod
    def forward(
        self, noisy: Tensor, sigma: Tensor, conditions: Conditions, inside: Inside = UNTOUCHED
    ) -> Tensor:
        """Predict noise - latents.

        Args:
            noisy: latents mixed with noise. [B, C, F, H, W]
            sigma: noise level of each video, 0 to 1; its embedding is 1000 * sigma. [B]
            conditions: everything else.
            inside: looks on between the blocks, and may change what happens there.

        Returns:
            Velocity in float32. [B, C, F, H, W]
        """

    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """List the repeated blocks: the units to shard, checkpoint, offload or wrap."""

    @abstractmethod
    def parts(self) -> Mapping[str, Sequence[str]]:
        """Name the linear layers that an adapter can sit on, by part (attention, ffn, audio...)."""

    @abstractmethod
    def trainable_parts(self) -> Mapping[str, Sequence[str]]:
        """Name the modules that can be trained fully, by part; all parameters below them count."""

    @abstractmethod
    def checkpoint_activations(self, every: int) -> None:
        """Recompute every n-th block in the backward pass; 0 keeps all activations."""


class Encoders(Protocol):
    """The frozen networks around the denoiser; all results are float32."""

    def encode_video(self, pixels: Tensor) -> Tensor:
        """Turn pixels, -1 to 1, [B, 3, T, H, W], into normalised latents [B, C, F, h, w]."""

    def decode_video(self, latents: Tensor) -> Tensor:
        """Turn normalised latents [B, C, F, h, w] into pixels, -1 to 1, [B, 3, T, H, W]."""

    def encode_text(self, texts: Sequence[str]) -> list[Tensor]:
        """Turn each text into its states, without padding. [L, D] each"""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Turn pictures, -1 to 1, [B, 3, H, W], into image tokens [B, K, D]."""

    def encode_speech(self, waveform: Tensor) -> Tensor:
        """Turn tracks at 16 kHz, [S, samples], into features at the base's fps. [S, T, M, D]

        T is samples * fps // 16000.
        """

    def release(self, *parts: str) -> None:
        """Free networks (video, text, image, speech), all if none is named.

        They are read again when they are needed.
        """


class Base(ABC):
    """A base model as a recipe names it: knows where its weights lie and builds its parts."""

    @staticmethod
    @abstractmethod
    def public_name(name: str) -> str | None:
        """Translate our name of a parameter or module to the public weights'; None if none."""

    @property
    @abstractmethod
    def geometry(self) -> Geometry:
        """Sizes of this base."""

    @abstractmethod
    def problems(self, *, encoders: bool = True) -> list[str]:
        """List what is missing or unfit, in words, without loading any weights.

        Args:
            encoders: False asks for the denoiser alone.
        """

    @abstractmethod
    def notes(self) -> list[str]:
        """List what is worth knowing before a run, in words."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Identify the encoders, so that features of another base are not mistaken for these."""

    @abstractmethod
    def load_denoiser(self, device: torch.device) -> Denoiser:
        """Load the frozen denoiser in the base's dtype; a parameter not found is an error."""

    @abstractmethod
    def hollow_denoiser(self) -> Denoiser:
        """Build the frozen denoiser with sizes and dtypes, but no memory; see `kit.models.hollow`.

        What `parameters` gives fills it. A base in few bits cannot be built so.
        """

    @abstractmethod
    def parameters(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Read the denoiser's parameters one by one, merged with what the base adds to them.

        Args:
            names: ours, in the order that they are wanted in; all if absent.

        Yields:
            Our name and the value, in the base's dtype.
        """

    @abstractmethod
    def configurations(self, layout: str) -> Mapping[str, Mapping[str, Any]]:
        """Give what the denoiser's `config.json` files say, by their places in a folder.

        Args:
            layout: `base` for this kit's and diffusers' folders, or that of the public weights.

        Raises:
            InputError: the base is not here, so that its sizes are unknown.
        """

    @abstractmethod
    def load_encoders(self, device: torch.device) -> Encoders:
        """Load the frozen encoders; each network is read when it is first needed."""

    @abstractmethod
    def empty_denoiser(self) -> Denoiser:
        """Build the denoiser on the meta device, for names and sizes."""
