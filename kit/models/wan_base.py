"""Wan2.1 image-to-video with InfiniteTalk's audio parts, as a recipe names it."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kit.errors import InputError
from kit.models import keys
from kit.models.base import Base, Denoiser, Encoders, Geometry
from kit.models.checkpoints import (
    assign,
    by_file,
    draw_parameters,
    dtype_of,
    mismatches,
    parameter_shapes,
    read_weights,
    require_match,
)
from kit.models.hollow import hollow_out
from kit.models.layouts import (
    ENCODERS,
    KINDS,
    PUBLIC_TOKENIZER,
    Layout,
    Part,
    find_layout,
    find_part,
)
from kit.models.lora_files import LoraFile, Match, match_lora, merge_changes
from kit.models.repositories import CONFIG_FILES, WEIGHT_FILES, is_remote, resolve
from kit.models.sizes import wan_config

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16"]
Quantisation = Literal["nf4", "nf4_double", "int8", "fp8"]
GLANCE_BYTES = 1 << 20
DRAWN_WITH_LORAS = "base.loras: these files change trained weights, but the denoiser's are drawn"


class WanBase(Base):
    """Wan2.1 image-to-video 14B, or a smaller configuration of it, with audio parts.

    Args:
        path: folder in diffusers' layout (transformer/, vae/, text_encoder/, tokenizer/,
            image_encoder/, audio_encoder/) or in Wan2.1's own, with all of the parts or some; or
            such a repository on the Hugging Face hub, as `organisation/name` or
            `organisation/name@revision`. What weights do not tell of their sizes stands in
            config.json below the part's name: transformer/, audio/ and so on.
        transformer: file, or folder of shards, in place of the one in `path`: as diffusers,
            Wan2.1 or ComfyUI have it; in float8 and int8 too, which become `dtype` on the way.
        audio_weights: file with the audio parts, such as InfiniteTalk's, MultiTalk's or a model
            patch of ComfyUI. It may hold the transformer as well, and then wins over it.
        vae: file of the video autoencoder, likewise.
        text_encoder: file of umT5, likewise; its tokenizer is read from `path`.
        image_encoder: file of CLIP's image encoder, likewise.
        audio_encoder: file, folder or hub repository of the speech encoder.
        loras: LoRA files to merge into the denoiser while it is read.
        dtype: of the denoiser and the text encoder; parts that need float32 keep it.
        video_dtype: of the video autoencoder; on a CPU, bfloat16 is several times as fast.
        quantise: how the linear layers of attention and FFN are held in the denoiser; all else
            stays in `dtype`. `nf4` takes 4.5 bits for a weight, `nf4_double` 4.13, `int8` and `fp8`
            8; only `fp8` can be distributed or offloaded. An adapter can train on it; its weights
            cannot.
        full_blocks: numbers of the blocks that are not quantised; -1 is the last one.
        decode_tile: side in pixels of the overlapping tiles in which videos are decoded, so that
            less memory is needed; whole frames without it. Their borders are blended.
        random_weights: seed from which the weights of parts without weight files are drawn; such
            parts need only their configurations. For tests, demonstrations and new small bases.
        text_length: text tokens that the network sees; the public weights expect 512.
    """

    def __init__(
        self,
        *,
        path: str,
        transformer: str | None = None,
        audio_weights: str | None = None,
        vae: str | None = None,
        text_encoder: str | None = None,
        image_encoder: str | None = None,
        audio_encoder: str | None = None,
        loras: Sequence[LoraFile] = (),
        dtype: Dtype = "bfloat16",
        video_dtype: Dtype = "float32",
        quantise: Quantisation | None = None,
        full_blocks: Sequence[int] = (0, -1),
        decode_tile: Annotated[int, Field(ge=64, multiple_of=32)] | None = None,
        random_weights: Annotated[int | None, Field(ge=0)] = None,
        text_length: Annotated[int, Field(ge=1)] = 512,
    ) -> None:
        given = {
            "transformer": transformer,
            "audio": audio_weights,
            "vae": vae,
            "text_encoder": text_encoder,
            "image_encoder": image_encoder,
        }
        self._path = path
        self._named = {name: Path(file) for name, file in given.items() if file is not None}
        self._audio_encoder = audio_encoder
        self._loras = tuple(loras)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._video_dtype: torch.dtype = getattr(torch, video_dtype)
        self._quantise = quantise
        self._full_blocks = tuple(full_blocks)
        self._decode_tile = decode_tile
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

    def problems(self, *, encoders: bool = True) -> list[str]:
        """List missing files; where none is missing, what does not fit together.

        Repositories on the hub are not looked at.
        """
        found = self._absent()
        if found or is_remote(self._path):
            return found
        try:
            return self._missing(encoders) or self._unfit(encoders)
        except InputError as error:
            return [f"base: {line}" for line in str(error).splitlines()]

    def notes(self) -> list[str]:
        """Say what is not here and will be fetched, and what LoRA files change."""
        places = {"path": self._path, "audio_encoder": self._audio_encoder}
        fetched = [
            f"base.{key}: no folder '{name}' here; it will be fetched from the hub"
            for key, name in places.items()
            if name is not None and is_remote(name)
        ]
        return fetched + [f"base.loras: {match.summary()}" for match in self._matches]

    def fingerprint(self) -> str:
        """Hash what the features of the encoders depend on.

        These are their configurations, the dtypes, the seed, and the beginning and
        end of local weights; of a repository on the hub, its revision.
        """
        digest = hashlib.sha256(
            f"random_weights={self._seed} {self._dtype} {self._video_dtype}".encode()
        )
        layout = self._find(CONFIG_FILES, with_speech=True)
        places = {name: (part.folder, part.files) for name, part in layout.parts.items()}
        places["tokenizer"] = (layout.tokenizer or Path(self._path) / "tokenizer", ())
        for name in ("vae", "text_encoder", "image_encoder", "tokenizer", "audio_encoder"):
            folder, files = places[name]
            digest.update(self._identity(name, files).encode())
            for file in sorted(folder.glob("*.json")):
                if not file.name.endswith(".index.json"):
                    digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()

    def load_denoiser(self, device: torch.device) -> Denoiser:
        """Load the frozen denoiser, with LoRA files merged.

        Raises:
            InputError: a tensor is missing, unknown or has another shape.
        """
        layout, model = self._open()
        shapes, put = parameter_shapes(model), assign
        if self._quantise is not None:
            # bitsandbytes takes seconds to import, and most bases do without it.
            from kit.models.low_bits import assign_quantised, exchange_layers

            exchange_layers(model, self._quantise, self._full_blocks, self._dtype)
            put = assign_quantised
        for name, value in self._read(layout, shapes, device):
            put(model, name, value)
        return model.requires_grad_(False).eval()

    def hollow_denoiser(self) -> Denoiser:
        """Build the denoiser without memory, to be filled share by share; see `Base`."""
        assert self._quantise is None
        _, model = self._open()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtype_of(name, self._dtype))
        hollow_out(model)
        return model.eval()

    def parameters(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Read the denoiser's parameters one by one; see `Base`.

        Raises:
            InputError: as `load_denoiser`.
        """
        layout, model = self._open()
        every = parameter_shapes(model)
        shapes = every if names is None else {name: every[name] for name in names}
        yield from self._read(layout, shapes, torch.device("cpu"), in_order=names is not None)

    def configurations(self, layout: str) -> Mapping[str, Mapping[str, Any]]:
        """Say what `config.json` files hold; see `Base`."""
        transformer = self._outline.denoiser_config("transformer")
        audio = self._outline.denoiser_config("audio")
        if layout == "wan":
            return {"config.json": wan_config(transformer, self._text_length)} | {
                "audio/config.json": audio
            }
        named = {"_class_name": "WanTransformer3DModel", **transformer}
        return {"transformer/config.json": named, "audio/config.json": audio}

    def _open(self) -> tuple[Layout, Denoiser]:
        """Find what the denoiser is read from and build it without memory."""
        layout = self._find(WEIGHT_FILES)
        model = empty_denoiser(layout, self._text_length)
        if layout.denoiser_tensors:
            require_match(model, layout.denoiser_tensors)
            self._require_loras()
        elif self._seed is None:
            raise InputError(f"base.path: {layout.parts['transformer'].missing()}")
        elif self._loras:
            raise InputError(DRAWN_WITH_LORAS)
        return layout, model

    def _read(
        self,
        layout: Layout,
        shapes: Mapping[str, tuple[int, ...]],
        device: torch.device,
        *,
        in_order: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        """Read or draw parameters of the denoiser one by one, in the dtype that each is to have."""
        if self._seed is not None and not layout.denoiser_tensors:
            values = draw_parameters(shapes, self._seed)
        else:
            stored = {name: layout.denoiser_tensors[name] for name in shapes}
            stored, changes = stored if in_order else by_file(stored), merge_changes(self._matches)
            values = read_weights(stored, shapes, device=device, changes=changes)
        for name, value in values:
            yield name, value.to(device, dtype_of(name, self._dtype))

    def load_encoders(self, device: torch.device) -> Encoders:
        """Prepare the encoders; nothing is read yet."""
        # transformers is slow to import, and encoded shards make do without it.
        from kit.models.encoders import WanEncoders

        return WanEncoders(
            layout=self._find(WEIGHT_FILES, with_speech=True),
            device=device,
            text_dtype=self._dtype,
            video_dtype=self._video_dtype,
            fps=self.geometry.fps,
            text_length=self._text_length,
            random_weights=self._seed,
            decode_tile=self._decode_tile,
        )

    def empty_denoiser(self) -> Denoiser:
        """Build the denoiser without memory."""
        return empty_denoiser(self._outline, self._text_length)

    @cached_property
    def _outline(self) -> Layout:
        """All but the speech encoder, with configurations at least."""
        return self._find(CONFIG_FILES)

    @cached_property
    def _matches(self) -> list[Match]:
        if not self._loras:
            return []
        shapes = parameter_shapes(self.empty_denoiser())
        return [match_lora(lora, shapes) for lora in self._loras]

    def _find(self, patterns: Sequence[str], *, with_speech: bool = False) -> Layout:
        """Find the base's parts, and fetch the files of those that are remote."""
        named = dict(self._named)
        if with_speech and self._audio_encoder is not None:
            speech = resolve(self._audio_encoder, "base.audio_encoder", patterns)
            named["audio_encoder"] = speech
        return find_layout(resolve(self._path, "base.path", patterns), named)

    def _absent(self) -> list[str]:
        """Say which files and folders are not there that the recipe names."""
        found = []
        if not Path(self._path).is_dir() and not is_remote(self._path):
            found.append(f"base.path: there is no folder '{self._path}'")
        named = {KINDS[name].option: str(file) for name, file in self._named.items()}
        speech = self._audio_encoder
        if speech is not None and not is_remote(speech):
            named["audio_encoder"] = speech
        absent = {option: file for option, file in named.items() if not Path(file).exists()}
        return found + [f"base.{o}: there is no file '{file}'" for o, file in absent.items()]

    def _local_parts(self, encoders: bool = True) -> dict[str, Part]:
        """Find the parts that are here or should be."""
        parts = dict(self._outline.parts)
        if not encoders:
            return {name: part for name, part in parts.items() if name not in ENCODERS}
        speech = self._audio_encoder
        if speech is not None:
            del parts["audio_encoder"]
            if not is_remote(speech):
                parts["audio_encoder"] = find_part("audio_encoder", Path(self._path), Path(speech))
        return parts

    def _place(self, name: str) -> str:
        """Name the key of the recipe that decides where a part lies."""
        is_named = name in self._named or (name == "audio_encoder" and self._audio_encoder)
        return f"base.{KINDS[name].option if is_named else 'path'}"

    def _missing(self, encoders: bool) -> list[str]:
        """Say which parts are not there, or not what they should be."""
        parts, is_drawn = self._local_parts(encoders), self._seed is not None
        # Files of one part of the denoiser may hold the other, and audio parts have usual sizes.
        if not is_drawn and not parts["transformer"].files:
            del parts["transformer"]
        if not parts["audio"].files:
            del parts["audio"]
        lines = [
            f"{self._place(name)}: {line}"
            for name, part in parts.items()
            for line in part.problems(is_drawn=is_drawn)
        ]
        if not is_drawn or self._outline.denoiser_tensors:
            lines += [f"base.path: {line}" for line in self._outline.denoiser_problems()]
        if encoders and self._outline.tokenizer is None:
            lines.append(f"base.path: no tokenizer in '{self._path}': get {PUBLIC_TOKENIZER}")
        return lines

    def _unfit(self, encoders: bool) -> list[str]:
        """Say which tensors do not fit the networks, and which of LoRA files do not."""
        from kit.models.encoders import encoder_problems

        tensors = self._outline.denoiser_tensors
        if self._loras and not tensors:
            return [DRAWN_WITH_LORAS]
        denoiser = self.empty_denoiser()
        found = mismatches(denoiser, tensors) if tensors else []
        lines = [f"base.path: {line}" for line in found]
        if self._quantise is not None:
            from kit.models.low_bits import quantisation_problems

            lines += quantisation_problems(denoiser, self._quantise, self._full_blocks)
        for name, part in self._local_parts(encoders).items():
            if name in ENCODERS and part.files:
                lines += [f"{self._place(name)}: {line}" for line in encoder_problems(part)]
        matches = [] if lines else self._matches
        return lines + [f"base.loras: {line}" for match in matches for line in match.problems()]

    def _require_loras(self) -> None:
        problems = [line for match in self._matches for line in match.problems()]
        if problems:
            raise InputError("\n".join(f"base.loras: {line}" for line in problems))
        for match in self._matches:
            logger.info("merging %s", match.summary())

    def _identity(self, name: str, files: Sequence[Path]) -> str:
        """Tell the weights of a part from all others."""
        source = self._path if name not in self._named else None
        if name == "audio_encoder" and self._audio_encoder is not None:
            source = self._audio_encoder
        if source is not None and is_remote(source):
            # The hub's cache names its folders after revisions.
            return resolve(source, "base", CONFIG_FILES).name
        return " ".join(f"{file.name}={_glance(file)}" for file in files)


def empty_denoiser(layout: Layout, text_length: int = 512) -> Denoiser:
    """Build the denoiser of a base without memory."""
    # diffusers takes seconds to import, and a recipe is read without it.
    from kit.models.audio import AudioSizes
    from kit.models.wan import Wan

    config = layout.denoiser_config("transformer")
    sizes = AudioSizes(**layout.denoiser_config("audio"))
    with torch.device("meta"):
        return Wan(config, audio=sizes, text_length=text_length)


def _glance(file: Path) -> str:
    """Hash size, first and last bytes: enough to tell trainings apart, in no time."""
    with file.open("rb") as stream:
        head = stream.read(GLANCE_BYTES)
        stream.seek(max(file.stat().st_size - GLANCE_BYTES, 0))
        tail = stream.read()
    return hashlib.sha256(b"%d" % file.stat().st_size + head + tail).hexdigest()
