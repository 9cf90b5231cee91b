"""Write an adapter for other programs, in the names and with the scales that they read.

What these programs adapt is Wan's trunk. The audio layers are no part of it, and neither are
parameters that trained whole: see `kit.adapters.merged` for them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kit.adapters.files import AdapterInfo, write_tensors
from kit.adapters.kinds import ALPHA, KINDS, MAGNITUDE, by_layer, rank_of
from kit.adapters.metadata import metadata, peft_config
from kit.atomic import write_text
from kit.models.keys import is_audio

TRUNK = "transformer."
"""Our names start so where diffusers' Wan has the same layer."""

PublicName = Callable[[str], str | None]
"""Translates our name of a layer or tensor to the public checkpoint's, if it has one."""

Layers = Mapping[str, Mapping[str, Tensor]]
"""Tensors of an adapter, by our name of the layer and their names below it."""

NATIVE_NAMES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
"""What Wan's own programs call factors; others have the same names everywhere."""


@dataclass(frozen=True)
class Trunk:
    """The factors of an adapter on Wan's trunk.

    Attributes:
        info: of the adapter.
        layers: scaled already: alpha is the rank, which readers agree on who ignore it.
        public_name: of the base's layers.
        dtype: to write in.
        trigger: word in captions that calls for what was learnt; may be empty.
    """

    info: AdapterInfo
    layers: Layers
    public_name: PublicName
    dtype: torch.dtype
    trigger: str = ""

    @property
    def header(self) -> dict[str, str]:
        """Metadata in the dialects of all programs."""
        return metadata(self.info, self.ranks(), self.trigger)

    def named(self, name: Callable[[str, str], str]) -> dict[str, Tensor]:
        """Give the tensors under the names that a function makes of layer and tensor.

        Magnitudes stay in float32: rounded, they would be off by as much as training moved them.
        """
        return {
            name(layer, own): tensor if own == MAGNITUDE else tensor.to(self.dtype)
            for layer, tensors in self.layers.items()
            for own, tensor in tensors.items()
        }

    def ranks(self) -> dict[str, int]:
        """Tell the rank of each layer, by diffusers' name."""
        return {layer.removeprefix(TRUNK): self._rank(t) for layer, t in self.layers.items()}

    def alphas(self, name: Callable[[str, str], str]) -> dict[str, Tensor]:
        """State the alpha of each layer, for readers who look for it."""
        ranks = {layer: self._rank(tensors) for layer, tensors in self.layers.items()}
        return {name(layer, ALPHA): torch.tensor(float(rank)) for layer, rank in ranks.items()}

    def _rank(self, tensors: Mapping[str, Tensor]) -> int:
        rank = rank_of(tensors)
        # PEFT factors nothing from a rank on that is large enough.
        return max(max(tensor.shape) for tensor in tensors.values()) if rank is None else rank


def scaled_layers(tensors: Mapping[str, Tensor], kind: str) -> dict[str, dict[str, Tensor]]:
    """Sort an adapter's factors by layer, and multiply alpha / rank into them. In float32"""
    layers = {}
    for layer, names in by_layer(tensors, kind).items():
        factors = {own: tensors[key].float() for own, key in names.items() if own != ALPHA}
        rank = rank_of(factors)
        if rank is not None and ALPHA in names:
            scaled = next(own for own in KINDS[kind].scaled if own in factors)
            factors[scaled] = factors[scaled] * (float(tensors[names[ALPHA]]) / rank)
        layers[layer] = factors
    return layers


def is_trunk(layer: str) -> bool:
    """Tell whether a layer, by our name, is one of Wan's trunk."""
    return layer.startswith(TRUNK) and not is_audio(layer)


def _diffusers(trunk: Trunk, out: Path) -> list[Path]:
    file = out / "pytorch_lora_weights.safetensors"
    write_tensors(file, trunk.named(lambda layer, own: f"{layer}.{own}"), trunk.header)
    return [file]


def _comfyui(trunk: Trunk, out: Path) -> list[Path]:
    def name(layer: str, own: str) -> str:
        return f"diffusion_model.{trunk.public_name(layer)}.{NATIVE_NAMES.get(own, own)}"

    return _native(trunk, out / f"{trunk.info.name}_comfyui.safetensors", name)


def _kohya(trunk: Trunk, out: Path) -> list[Path]:
    def name(layer: str, own: str) -> str:
        public = (trunk.public_name(layer) or "").replace(".", "_")
        return f"lora_unet_{public}.{NATIVE_NAMES.get(own, own)}"

    return _native(trunk, out / f"{trunk.info.name}_kohya.safetensors", name)


def _native(trunk: Trunk, file: Path, name: Callable[[str, str], str]) -> list[Path]:
    write_tensors(file, trunk.named(name) | trunk.alphas(name), trunk.header)
    return [file]


def _peft(trunk: Trunk, out: Path) -> list[Path]:
    config = out / "adapter_config.json"
    facts = peft_config(trunk.info, trunk.ranks())
    write_text(config, json.dumps(facts, indent=2) + "\n")
    file = out / "adapter_model.safetensors"
    names = trunk.named(lambda layer, own: f"base_model.model.{layer.removeprefix(TRUNK)}.{own}")
    write_tensors(file, names, {"format": "pt"})
    return [config, file]


FORMATS: dict[str, Callable[[Trunk, Path], list[Path]]] = {
    "diffusers": _diffusers,
    "comfyui": _comfyui,
    "kohya": _kohya,
    "peft": _peft,
}
"""Name to writer of the factors on Wan's trunk."""
