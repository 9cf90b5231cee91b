"""Where the networks of a base lie: files, configurations and names, in every layout people have.

Each network is looked for in three places: a file or folder that the recipe names, a folder of its
own as in diffusers' layout, and a file as in Wan2.1's own. What its keys are called and how large
it is shows in the files, so that the layouts mix.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kit.errors import InputError
from kit.models import encoder_keys, keys, sizes
from kit.models.checkpoints import StoredTensor, locate_tensors
from kit.models.keys import Names
from kit.models.quantised import pair_factors
from kit.models.tensor_files import read_header, weight_files

WAN, INFINITETALK = "Wan-AI/Wan2.1-I2V-14B-480P", "MeiGen-AI/InfiniteTalk"
COMFY = "Comfy-Org/Wan_2.1_ComfyUI_repackaged"

ENCODERS = ("vae", "text_encoder", "image_encoder", "audio_encoder")
DENOISER = ("transformer", "audio")

TOKENIZERS = ("tokenizer", "google/umt5-xxl", "umt5-xxl")
"""Folders of the tokenizer: diffusers', Wan2.1's, and a plain copy of Google's."""

PUBLIC_TOKENIZER = (
    f"folder google/umt5-xxl of {WAN} (about 20 MB; the copy inside ComfyUI's files is not read)"
)


@dataclass(frozen=True)
class Kind:
    """One kind of network, the same in every layout.

    Attributes:
        title: what it is, in words.
        option: key of a recipe's base that names its file.
        names: translates the keys of its files.
        unused: patterns of keys that it has no place for, and why.
        sizes: how its configuration follows from its files.
        original: pattern of its files in Wan2.1's own layout.
        public: where the public weights are.
    """

    title: str
    option: str
    names: Callable[[Collection[str]], Names]
    unused: Mapping[str, str]
    sizes: sizes.Sizes
    original: str | None
    public: str


KINDS = {
    "transformer": Kind(
        title="transformer",
        option="transformer",
        names=keys.denoiser_names,
        unused=keys.UNUSED,
        sizes=sizes.TRANSFORMER,
        original="diffusion_pytorch_model*.safetensors",
        public=f"config.json, diffusion_pytorch_model-*-of-00007.safetensors and their index of "
        f"{WAN}, or split_files/diffusion_models/wan2.1_i2v_480p_14B_fp16.safetensors of {COMFY}",
    ),
    "audio": Kind(
        title="audio parts",
        option="audio_weights",
        names=keys.denoiser_names,
        unused=keys.UNUSED,
        sizes=sizes.AUDIO,
        original=None,
        public=f"single/infinitetalk.safetensors of {INFINITETALK} (multi/ for several speakers), "
        f"or split_files/model_patches/wan2.1_infiniteTalk_single_fp16.safetensors of {COMFY}",
    ),
    "vae": Kind(
        title="video autoencoder",
        option="vae",
        names=encoder_keys.video_names,
        unused={},
        sizes=sizes.VIDEO,
        original="Wan2.1_VAE.pth",
        public=f"Wan2.1_VAE.pth of {WAN}, or split_files/vae/wan_2.1_vae.safetensors of {COMFY}",
    ),
    "text_encoder": Kind(
        title="text encoder",
        option="text_encoder",
        names=encoder_keys.TEXT_DIALECTS.names,
        unused=encoder_keys.UNUSED_TEXT,
        sizes=sizes.TEXT,
        original="models_t5_*.pth",
        public=f"models_t5_umt5-xxl-enc-bf16.pth of {WAN}, or "
        f"split_files/text_encoders/umt5_xxl_fp16.safetensors of {COMFY}",
    ),
    "image_encoder": Kind(
        title="image encoder",
        option="image_encoder",
        names=encoder_keys.IMAGE_DIALECTS.names,
        unused=encoder_keys.UNUSED_IMAGE,
        sizes=sizes.IMAGE,
        original="models_clip_*.pth",
        public=f"models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth of {WAN}, or "
        f"split_files/clip_vision/clip_vision_h.safetensors of {COMFY}",
    ),
    "audio_encoder": Kind(
        title="speech encoder",
        option="audio_encoder",
        names=encoder_keys.SPEECH_DIALECTS.names,
        unused=encoder_keys.UNUSED_SPEECH,
        sizes=sizes.SPEECH,
        original=None,
        public="TencentGameMate/chinese-wav2vec2-base@refs/pr/1, or "
        "wav2vec2-chinese-base_fp16.safetensors of Kijai/wav2vec2_safetensors",
    ),
}
"""All networks of a base, by the names of their folders in diffusers' layout."""


@dataclass(frozen=True)
class Part:
    """One network of a base, as it was found.

    Attributes:
        name: key of `KINDS`.
        folder: holds its configuration, if it has one.
        files: its weights; empty if there are none.
        given: what its config.json says.
    """

    name: str
    folder: Path
    files: tuple[Path, ...]
    given: Mapping[str, Any]

    @property
    def kind(self) -> Kind:
        """What kind of network it is."""
        return KINDS[self.name]

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Where its tensors lie, by our names; unknown keys stay as they are.

        Raises:
            InputError: a file is not there or cannot be read.
        """
        return locate_tensors(self.files, self.kind.names, self.kind.unused)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its configuration.

        Raises:
            InputError: neither config.json nor the files tell it.
        """
        return config_of(self, self.tensors if self.is_complete else {})

    @property
    def place(self) -> str:
        """What a message calls it."""
        if not self.files:
            return str(self.folder)
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0]}{more}"

    @property
    def is_complete(self) -> bool:
        """Whether it has files, and all of them are there."""
        return bool(self.files) and not self.absent()

    @property
    def is_in_own_folder(self) -> bool:
        """Whether it lies in a folder of its own, as in diffusers' layout."""
        return all(file.parent == self.folder for file in self.files)

    def problems(self, *, is_drawn: bool) -> list[str]:
        """Say which files are missing or hold something else, and where to get them.

        Args:
            is_drawn: whether weights are drawn where there are no files, which takes config.json.

        Raises:
            InputError: a file cannot be read.
        """
        if self.absent():
            return self.absent()
        if not self.files and is_drawn:
            return [] if self.given else [f"there is no '{self.folder / 'config.json'}'"]
        if not self.files:
            return [self.missing()]
        held = [name for file in self.files for name in recognise(file)]
        if self.name in held or self.name in DENOISER:
            return []
        others = " and ".join(KINDS[name].title for name in held) or "nothing known"
        return [f"{self.place} should hold the {self.kind.title}, but holds: {others}"]

    def absent(self) -> list[str]:
        """Say which of its files are not there."""
        return [f"there is no '{file}'" for file in self.files if not file.is_file()]

    def missing(self) -> str:
        """Say that it is not there, and where to get it."""
        kind = self.kind
        elsewhere = f"if it lies elsewhere, name it in base.{kind.option}"
        return f"no {kind.title}: get {kind.public}; {elsewhere}"


@dataclass(frozen=True)
class Layout:
    """All networks of a base.

    Attributes:
        parts: by the names of `KINDS`.
        tokenizer: folder of the tokenizer; None if there is none.
    """

    parts: Mapping[str, Part]
    tokenizer: Path | None

    @cached_property
    def denoiser_tensors(self) -> dict[str, StoredTensor]:
        """Where the denoiser's tensors lie; those of audio files win.

        Raises:
            InputError: a file is not there or cannot be read.
        """
        return self.parts["transformer"].tensors | self.parts["audio"].tensors

    def denoiser_problems(self) -> list[str]:
        """Say which part of the denoiser none of its files hold, and where to get it."""
        if not self.has_denoiser_files:
            return []
        held = {keys.is_audio(name) for name in self.denoiser_tensors if keys.public_name(name)}
        lacking = [name for name in DENOISER if (name == "audio") not in held]
        return [self.parts[name].missing() for name in lacking]

    def denoiser_config(self, name: str) -> dict[str, Any]:
        """Find the configuration of the transformer, or of the audio parts.

        Either may lie in the other's files.
        """
        located = self.denoiser_tensors if self.has_denoiser_files else {}
        own = {n: tensor for n, tensor in located.items() if keys.is_audio(n) == (name == "audio")}
        return config_of(self.parts[name], own)

    @property
    def has_denoiser_files(self) -> bool:
        """Whether no file of the denoiser is missing that is known of."""
        return not any(self.parts[name].absent() for name in DENOISER)


def find_layout(folder: Path, named: Mapping[str, Path]) -> Layout:
    """Find the networks of a base.

    Args:
        folder: in diffusers' layout or in Wan2.1's own, or with some parts of either.
        named: files or folders that a recipe names, by the names of `KINDS`.
    """
    parts = {name: find_part(name, folder, named.get(name)) for name in KINDS}
    tokenizers = (folder / name for name in TOKENIZERS)
    found = (path for path in tokenizers if (path / "tokenizer_config.json").is_file())
    return Layout(parts, next(found, None))


def find_part(name: str, folder: Path, named: Path | None = None) -> Part:
    """Find one network: in what the recipe names, else in its own folder, else in the base's."""
    own = named if named is not None and named.is_dir() else folder / name
    files = weight_files(named or own)
    original = KINDS[name].original
    if named is None and not files and original is not None:
        files = weight_files(folder, original)
    given = _read_config(own / "config.json")
    if name == "transformer" and not given:
        given = sizes.translate_config(_read_config(folder / "config.json"), folder / "config.json")
    return Part(name, own, tuple(files), given)


def config_of(part: Part, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Complete what a part's config.json says by what its tensors tell."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return sizes.complete_config(part.kind.sizes, part.given, shapes, part.place)


def recognise(file: Path) -> list[str]:
    """Name the kinds of network that a file holds, by its keys; none for a file of another sort.

    Raises:
        InputError: the file cannot be read.
    """
    found = pair_factors(read_header(file).tensors)
    known = {name: kind.names(found) for name, kind in KINDS.items()}
    best = max(known, key=lambda name: len(known[name]))
    if best not in DENOISER:
        return [best]
    is_audio = {keys.is_audio(name) for names in known[best].values() for name in names}
    return [name for name in DENOISER if (name == "audio") in is_audio]


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"'{file}' is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"'{file}' holds no entries")
    return content
