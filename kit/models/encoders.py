"""The frozen networks around the denoiser, each read when it is first used.

Every video, text, picture and track is encoded on its own, so that results do not depend on what
else is in the batch.
"""

import html
import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import ftfy
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    UMT5EncoderModel,
    Wav2Vec2Model,
)
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from kit.batch import SAMPLE_RATE
from kit.errors import InputError
from kit.models.checkpoints import draw_weights, load_weights, mismatches
from kit.models.layouts import PUBLIC_TOKENIZER, Layout, Part

logger = logging.getLogger(__name__)

NETWORKS: dict[str, Any] = {
    "vae": AutoencoderKLWan,
    "text_encoder": UMT5EncoderModel,
    "image_encoder": CLIPVisionModel,
    "audio_encoder": Wav2Vec2Model,
}
"""Classes by the names of a base's parts."""

UNREAD_PARAMETERS = {"masked_spec_embed"}
"""Parameters that only training of the encoder reads, so that files may lack them."""


class VideoEncoder:
    """Wan's video autoencoder with the normalisation of latents that diffusers leaves out.

    Args:
        vae: diffusers' network.
        decode_tile: side of the tiles that are decoded one by one, in pixels; None is whole frames.
    """

    def __init__(self, vae: AutoencoderKLWan, decode_tile: int | None = None) -> None:
        self.vae = vae
        self._decode = vae.decode
        if decode_tile is not None:
            overlapping = decode_tile * 3 // 4
            vae.enable_tiling(decode_tile, decode_tile, overlapping, overlapping)
            vae.use_tiling = False  # of encoding, whose results training must find again
            self._decode = vae.tiled_decode
        statistics = (vae.config["latents_mean"], vae.config["latents_std"])
        self._mean, self._std = (
            torch.tensor(values, device=vae.device).view(-1, 1, 1, 1) for values in statistics
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode one video, -1 to 1, [3, T, H, W], by the mean of its posterior. [C, F, h, w]"""
        mean: Tensor = self.vae.encode(self._given(pixels)).latent_dist.mode()[0].float()
        return (mean - self._mean.to(mean)) / self._std.to(mean)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [C, F, h, w] of one video and clamp to -1 to 1. [3, T, H, W]"""
        given = self._given(latents * self._std.to(latents) + self._mean.to(latents))
        video: Tensor = self._decode(given).sample[0].float()
        return video.clamp(-1, 1)

    def _given(self, values: Tensor) -> Tensor:
        """Make a batch of one as the network likes it best."""
        dtype: torch.dtype = self.vae.dtype
        return values[None].to(dtype).contiguous(memory_format=torch.channels_last_3d)


class TextEncoder:
    """umT5 and its tokenizer."""

    def __init__(
        self, network: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.max_length = max_length

    def encode(self, text: str) -> Tensor:
        """Encode one text; it is cut at the maximum length. [L, D]"""
        tokens = self.tokenizer(
            clean_text(text), truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return self.encode_tokens(tokens["input_ids"][0].to(self.network.device))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Encode token numbers [L]; without padding there is nothing to mask or trim. [L, D]"""
        states: Tensor = self.network(input_ids=tokens[None]).last_hidden_state[0]
        return states.float()


class ImageEncoder:
    """CLIP's picture tower up to the last layer but one, which is what Wan was trained on."""

    def __init__(self, network: CLIPVisionModel) -> None:
        self.network = network
        mean, std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
        self._mean, self._std = (
            torch.tensor(values, device=network.device).view(3, 1, 1) for values in (mean, std)
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode one picture, -1 to 1, [3, H, W], squashed to CLIP's square. [K, D]"""
        side = cast(int, self.network.config.image_size)
        square = F.interpolate(pixels[None], (side, side), mode="bicubic", align_corners=False)
        inputs = (square / 2 + 0.5 - self._mean.to(square)) / self._std.to(square)
        states: Tensor = self.network(inputs, output_hidden_states=True).hidden_states[-2][0]
        return states


class SpeechEncoder:
    """wav2vec 2.0 run at the frame rate of the video instead of its own 50 Hz.

    Source: InfiniteTalk, which interpolates between the convolutions and the transformer.
    """

    def __init__(self, network: Wav2Vec2Model, fps: int) -> None:
        self.network = network
        self.fps = fps

    def encode(self, waveform: Tensor) -> Tensor:
        """Encode one track [samples]; the outputs of all M layers are kept. [T, M, D]"""
        num_frames = len(waveform) * self.fps // SAMPLE_RATE
        centred = waveform - waveform.mean()
        scaled = centred / (centred.square().mean() + 1e-7).sqrt()
        features = self.network.feature_extractor(scaled[None])
        features = F.interpolate(features, num_frames, mode="linear", align_corners=True)
        hidden, _ = self.network.feature_projection(features.transpose(1, 2))
        encoder = self.network.encoder
        hidden = encoder.layer_norm(hidden + encoder.pos_conv_embed(hidden))
        layers = []
        for layer in encoder.layers:
            hidden = layer(hidden)
            layers.append(hidden[0])
        return torch.stack(layers, dim=1)


class WanEncoders:
    """The four encoders of a base.

    Args:
        layout: where they lie.
        device: where they compute.
        text_dtype: of the text encoder, by far the largest.
        video_dtype: of the video autoencoder, by far the slowest; the others are float32.
        fps: frames per second of speech features.
        text_length: text tokens at most.
        random_weights: seed to draw weights from where there are none; None reads all of them.
        decode_tile: see `VideoEncoder`.
    """

    def __init__(
        self,
        *,
        layout: Layout,
        device: torch.device,
        text_dtype: torch.dtype,
        video_dtype: torch.dtype = torch.float32,
        fps: int,
        text_length: int,
        random_weights: int | None,
        decode_tile: int | None = None,
    ) -> None:
        self.device = device
        self._layout = layout
        self._text_dtype = text_dtype
        self._video_dtype = video_dtype
        self._fps = fps
        self._text_length = text_length
        self._seed = random_weights
        self._decode_tile = decode_tile

    @torch.no_grad()
    def encode_video(self, pixels: Tensor) -> Tensor:
        """Encode videos; see `Encoders`."""
        videos = pixels.to(self.device, torch.float32)
        return torch.stack([self._video.encode(video) for video in videos])

    @torch.no_grad()
    def decode_video(self, latents: Tensor) -> Tensor:
        """Decode videos; see `Encoders`."""
        videos = latents.to(self.device, torch.float32)
        return torch.stack([self._video.decode(video) for video in videos])

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> list[Tensor]:
        """Encode texts; see `Encoders`."""
        return [self._text.encode(text) for text in texts]

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Encode pictures; see `Encoders`."""
        pictures = pixels.to(self.device, torch.float32)
        return torch.stack([self._image.encode(picture) for picture in pictures])

    @torch.no_grad()
    def encode_speech(self, waveform: Tensor) -> Tensor:
        """Encode tracks; see `Encoders`."""
        tracks = waveform.to(self.device, torch.float32)
        return torch.stack([self._speech.encode(track) for track in tracks])

    def release(self, *parts: str) -> None:
        """Free networks (video, text, image, speech), all if none is named; see `Encoders`."""
        for part in parts or ("video", "text", "image", "speech"):
            self.__dict__.pop(f"_{part}", None)

    def outline(self) -> dict[str, nn.Module]:
        """Build the networks without memory, in the dtypes that they will have."""
        dtypes = {"vae": self._video_dtype, "text_encoder": self._text_dtype}
        networks: dict[str, nn.Module] = {
            name: empty_network(self._layout.parts[name]) for name in NETWORKS
        }
        for name, network in networks.items():
            for parameter in network.parameters():
                parameter.data = parameter.data.to(dtypes.get(name, torch.float32))
        return networks

    @cached_property
    def _video(self) -> VideoEncoder:
        vae: AutoencoderKLWan = self._load("vae", self._video_dtype)
        prefer_channels_last(vae)
        return VideoEncoder(vae, self._decode_tile)

    @cached_property
    def _text(self) -> TextEncoder:
        folder = self._layout.tokenizer
        if folder is None:
            raise InputError(f"base.path: no tokenizer: get {PUBLIC_TOKENIZER}")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        network = self._load("text_encoder", self._text_dtype)
        return TextEncoder(network, tokenizer, self._text_length)

    @cached_property
    def _image(self) -> ImageEncoder:
        return ImageEncoder(self._load("image_encoder"))

    @cached_property
    def _speech(self) -> SpeechEncoder:
        return SpeechEncoder(self._load("audio_encoder"), self._fps)

    def _load(self, name: str, dtype: torch.dtype = torch.float32) -> Any:
        part = self._layout.parts[name]
        problems = part.problems(is_drawn=self._seed is not None)
        if problems:
            raise InputError("\n".join(f"base.path: {line}" for line in problems))
        logger.info("loading the %s from %s", part.kind.title, part.place)
        network: Any
        if self._seed is None or part.files:
            network = load_network(part, dtype, self.device)
        else:
            network = draw_network(part, self._seed, dtype)
        return network.to(self.device).eval().requires_grad_(False)


def prefer_channels_last(network: nn.Module) -> None:
    """Lay convolutions' weights out with channels last: two to three times as fast on a CPU."""
    formats = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
    for module in network.modules():
        for kind, layout in formats.items():
            if isinstance(module, kind):
                module.weight.data = module.weight.data.contiguous(memory_format=layout)


def load_network(
    part: Part, dtype: torch.dtype, device: torch.device
) -> ModelMixin | PreTrainedModel:
    """Load a network, of a class by diffusers or transformers.

    Raises:
        InputError: the weights do not fit.
    """
    network = empty_network(part)
    load_weights(
        network,
        part.tensors,
        device=device,
        dtype=lambda _: dtype,
        may_lack=UNREAD_PARAMETERS,
    )
    if isinstance(network, PreTrainedModel):
        network.tie_weights()
    return network


def encoder_problems(part: Part) -> list[str]:
    """Say in words what of a part's weights does not fit its network.

    Raises:
        InputError: its configuration cannot be told.
    """
    findings = mismatches(empty_network(part), part.tensors, UNREAD_PARAMETERS)
    return [f"{part.place}: {line}" for line in findings]


def empty_network(part: Part) -> ModelMixin | PreTrainedModel:
    """Build a network whose parameters have no memory."""
    # Buffers are not stored, so that they need their numbers.
    with init_empty_weights(include_buffers=False):
        return _build(part)


def draw_network(part: Part, seed: int, dtype: torch.dtype) -> ModelMixin | PreTrainedModel:
    """Build a network from its configuration alone and draw its weights from a seed."""
    # The constructors draw weights of their own; the caller's random numbers must not notice.
    with torch.random.fork_rng(devices=[]):
        network = _build(part)
    draw_weights(network, seed, dtype)
    return network


def _build(part: Part) -> ModelMixin | PreTrainedModel:
    kind = NETWORKS[part.name]
    network: ModelMixin | PreTrainedModel
    if issubclass(kind, ModelMixin):
        network = kind.from_config(part.config)
    else:
        network = kind(kind.config_class.from_dict(part.config))
    return network


def clean_text(text: str) -> str:
    """Repair encoding damage, resolve HTML entities and bring white space to single blanks.

    Source: Wan2.1, which resolves entities twice.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
