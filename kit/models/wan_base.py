"""Wan2.1 image-to-video with InfiniteTalk's audio parts, as a recipe names it."""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from kit.errors import InputError
from kit.models import keys
from kit.models.base import Base, Denoiser, Encoders, Geometry
from kit.models.checkpoints import (
    draw_weights,
    load_weights,
    locate_tensors,
    mismatches,
    weight_files,
)

ENCODER_FOLDERS = ("vae", "text_encoder", "image_encoder")
Dtype = Literal["float32", "bfloat16"]
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?")
CONFIG_FILES = ("*.json", "*.model", "*.txt")
"""What a hub repository is asked for before a run: all but its weights."""
GLANCE_BYTES = 1 << 20
WEIGHT_FILES = (*CONFIG_FILES, "*.safetensors")


class WanBase(Base):
    """Wan2.1 image-to-video 14B, or a smaller configuration of it, with audio parts.

    Args:
        path: folder in diffusers' layout (transformer/, vae/, text_encoder/, tokenizer/,
            image_encoder/, audio_encoder/), or such a repository on the Hugging Face hub, as
            `organisation/name` or `organisation/name@revision`. Sizes of the audio parts stand in
            audio/config.json, their weights beside it or in `audio_weights`; without it the
            sizes are those of the public weights.
        audio_weights: safetensors file with the audio parts under their public names, such as
            InfiniteTalk's. It may hold the other parts as well, and then wins over `transformer/`.
        audio_encoder: folder or hub repository of the speech encoder, in place of audio_encoder/.
        dtype: of the denoiser and the text encoder; parts that need float32 keep it.
        video_dtype: of the video autoencoder; on a CPU, bfloat16 is several times as fast.
        random_weights: seed from which the weights of parts without weight files are drawn; such
            parts need only their configurations. For tests, demonstrations and new small bases.
        text_length: text tokens that the network sees; the public weights expect 512.
    """

    def __init__(
        self,
        *,
        path: str,
        audio_weights: str | None = None,
        audio_encoder: str | None = None,
        dtype: Dtype = "bfloat16",
        video_dtype: Dtype = "float32",
        random_weights: Annotated[int | None, Field(ge=0)] = None,
        text_length: Annotated[int, Field(ge=1)] = 512,
    ) -> None:
        self._path = path
        self._audio_weights = None if audio_weights is None else Path(audio_weights)
        self._audio_encoder = audio_encoder
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._video_dtype: torch.dtype = getattr(torch, video_dtype)
        self._seed = random_weights
        self._text_length = text_length

    @staticmethod
    def public_name(name: str) -> str | None:
        """Translate to the names of Wan2.1 and InfiniteTalk."""
        return keys.public_name(name)

    @property
    def geometry(self) -> Geometry:
        """Sizes of Wan2.1, equal for all configurations."""
        return Geometry()

    def problems(self) -> list[str]:
        """List missing files; where none is missing, tensors that do not fit the denoiser.

        Repositories on the hub are not looked at.
        """
        found = [*self._missing_from("base.path", self._path)]
        if self._audio_encoder is not None:
            found += self._missing_from("base.audio_encoder", self._audio_encoder)
        if self._audio_weights is not None and not self._audio_weights.is_file():
            found.append(f"base.audio_weights: there is no file '{self._audio_weights}'")
        is_readable = not found and self._seed is None and Path(self._path).is_dir()
        return found + (self._unfit_tensors() if is_readable else [])

    def notes(self) -> list[str]:
        """Say what is not here and will be fetched."""
        places = {"path": self._path, "audio_encoder": self._audio_encoder}
        return [
            f"base.{key}: no folder '{name}' here; it will be fetched from the hub"
            for key, name in places.items()
            if name is not None and not Path(name).is_dir()
        ]

    def fingerprint(self) -> str:
        """Hash what the features of the encoders depend on.

        These are their configurations, the dtypes, the seed, and the beginning and
        end of local weights; of a repository on the hub, its revision.
        """
        digest = hashlib.sha256(
            f"random_weights={self._seed} {self._dtype} {self._video_dtype}".encode()
        )
        folders = [self._configs / name for name in (*ENCODER_FOLDERS, "tokenizer")]
        for folder in (*folders, self._speech_configs):
            digest.update(self._weights_of(folder).encode())
            for file in sorted(folder.glob("*.json")):
                if not file.name.endswith(".index.json"):
                    digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()

    def load_denoiser(self, device: torch.device) -> Denoiser:
        """Load the frozen denoiser.

        Raises:
            InputError: a tensor is missing, unknown or has another shape.
        """
        model = self.empty_denoiser()
        files = self._denoiser_files()
        if files:
            load_weights(model, locate_tensors(files), device=device, dtype=self._dtype)
        else:
            if self._seed is None:
                raise InputError(f"base.path: '{self._path}' holds no weights of the denoiser")
            model.to_empty(device=device)
            draw_weights(model, self._seed, self._dtype)
        return model.requires_grad_(False).eval()

    def load_encoders(self, device: torch.device) -> Encoders:
        """Prepare the encoders; nothing is read yet."""
        # transformers is slow to import, and encoded shards make do without it.
        from kit.models.encoders import WanEncoders

        return WanEncoders(
            folder=self._folder,
            speech_folder=self._speech_folder,
            device=device,
            text_dtype=self._dtype,
            video_dtype=self._video_dtype,
            fps=self.geometry.fps,
            text_length=self._text_length,
            random_weights=self._seed,
        )

    def empty_denoiser(self) -> Denoiser:
        """Build the denoiser without memory."""
        # diffusers takes seconds to import, and a recipe is read without it.
        from kit.models.audio import AudioSizes
        from kit.models.wan import Wan

        config = _read_config(self._configs / "transformer")
        audio = self._configs / "audio"
        sizes = AudioSizes(**_read_config(audio)) if audio.is_dir() else AudioSizes()
        with torch.device("meta"):
            return Wan(config, audio=sizes, text_length=self._text_length)

    @cached_property
    def _folder(self) -> Path:
        return _resolve(self._path, "base.path", WEIGHT_FILES)

    @cached_property
    def _speech_folder(self) -> Path:
        if self._audio_encoder is None:
            return self._folder / "audio_encoder"
        return _resolve(self._audio_encoder, "base.audio_encoder", WEIGHT_FILES)

    @cached_property
    def _configs(self) -> Path:
        return _resolve(self._path, "base.path", CONFIG_FILES)

    @cached_property
    def _speech_configs(self) -> Path:
        if self._audio_encoder is None:
            return self._configs / "audio_encoder"
        return _resolve(self._audio_encoder, "base.audio_encoder", CONFIG_FILES)

    def _weights_of(self, folder: Path) -> str:
        roots = {self._configs: self._path, self._speech_configs: self._audio_encoder}
        for root, name in roots.items():
            if name is not None and not Path(name).is_dir() and folder.is_relative_to(root):
                return root.name  # the hub's cache names its folders after revisions
        return " ".join(f"{file.name}={_glance(file)}" for file in weight_files(folder))

    def _denoiser_files(self) -> list[Path]:
        files = weight_files(self._folder / "transformer")
        files += weight_files(self._folder / "audio")
        return files if self._audio_weights is None else [*files, self._audio_weights]

    def _unfit_tensors(self) -> list[str]:
        stored = locate_tensors(self._denoiser_files())
        return [f"base.path: {line}" for line in mismatches(self.empty_denoiser(), stored)]

    def _missing_from(self, place: str, name: str) -> list[str]:
        folder = Path(name)
        if not folder.is_dir():
            is_on_hub = HUB_NAME.fullmatch(name) is not None
            return [] if is_on_hub else [f"{place}: there is no folder '{name}'"]
        if place == "base.audio_encoder":
            return [f"{place}: {line}" for line in self._missing_files(folder)]
        parts = ["transformer", *ENCODER_FOLDERS]
        parts += [] if self._audio_encoder is not None else ["audio_encoder"]
        lines = [line for part in parts for line in self._missing_files(folder / part)]
        if not (folder / "tokenizer" / "tokenizer_config.json").is_file():
            lines.append(f"there is no '{folder / 'tokenizer' / 'tokenizer_config.json'}'")
        return [f"{place}: {line}" for line in lines]

    def _missing_files(self, folder: Path) -> list[str]:
        if not (folder / "config.json").is_file():
            return [f"there is no '{folder / 'config.json'}'"]
        if self._seed is not None:
            return []
        # A full file in `audio_weights` makes the transformer's own weights unnecessary.
        if folder.name == "transformer" and self._audio_weights is not None:
            return []
        files = weight_files(folder)
        absent = [f"there is no '{file}'" for file in files if not file.is_file()]
        return absent if files else [f"there are no safetensors in '{folder}'"]


def _glance(file: Path) -> str:
    """Hash size, first and last bytes: enough to tell trainings apart, in no time."""
    with file.open("rb") as stream:
        head = stream.read(GLANCE_BYTES)
        stream.seek(max(file.stat().st_size - GLANCE_BYTES, 0))
        tail = stream.read()
    return hashlib.sha256(b"%d" % file.stat().st_size + head + tail).hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def _resolve(name: str, place: str, patterns: Sequence[str]) -> Path:
    """Find a local folder, or the local copy of a hub repository, fetching files if need be."""
    if Path(name).is_dir():
        return Path(name)
    if HUB_NAME.fullmatch(name) is None:
        raise InputError(f"{place}: there is no folder '{name}'")
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=[*patterns])
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{place}: '{name}' is no folder here, and the hub does not give it: {error}"
        ) from error
