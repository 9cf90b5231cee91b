"""Write an adapter for other programs, and say which of its tensors they know.

Both formats hold the trunk of Wan. The audio layers are no part of the Wan that these programs
adapt, so they go to a file of their own under their public names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from kit.adapters.files import AdapterInfo, load_adapter
from kit.adapters.metadata import metadata
from kit.errors import InputError, did_you_mean

TRUNK = "transformer."
"""Our names start so where diffusers' Wan has the same layer."""


@dataclass(frozen=True)
class Exported:
    """What became of an adapter.

    Attributes:
        files: written.
        matched: keys that the program knows.
        unmatched: our names of tensors that it does not, and why.
    """

    files: tuple[Path, ...]
    matched: tuple[str, ...]
    unmatched: Mapping[str, str]


PublicName = Callable[[str], str | None]
"""Translates our name of a layer or tensor to the public checkpoint's, if it has one."""


def export_adapter(source: Path, target: str, out: Path, public_name: PublicName) -> Exported:
    """Write an adapter file in the format of another program.

    Args:
        source: adapter file of this kit.
        target: a name from `FORMATS`.
        out: folder to write to.
        public_name: of the base's tensors.

    Raises:
        InputError: no such format, or the source cannot be read.
    """
    if target not in FORMATS:
        raise InputError(f"export: unknown format '{target}'{did_you_mean(target, FORMATS)}")
    tensors, info = load_adapter(source)
    out.mkdir(parents=True, exist_ok=True)
    trunk = {n: t for n, t in tensors.items() if n.startswith(TRUNK) and "audio" not in n}
    trunk = {n: t for n, t in trunk.items() if ".lora_" in n}
    rest = {name: tensor for name, tensor in tensors.items() if name not in trunk}
    files, matched = [], dict[str, Tensor]()
    if trunk:
        name, matched, header = FORMATS[target](trunk, info, public_name)
        save_file(matched, out / name, metadata=header)
        files.append(out / name)
    if rest:
        path = out / f"{info.name}_audio.safetensors"
        save_file(_public(rest, info, public_name), path, metadata={"format": "pt"})
        files.append(path)
    reason = f"no layer of Wan's trunk; in {info.name}_audio.safetensors"
    return Exported(tuple(files), tuple(matched), dict.fromkeys(rest, reason))


_Written = tuple[str, dict[str, Tensor], dict[str, str]]


def _diffusers(
    tensors: Mapping[str, Tensor], info: AdapterInfo, public_name: PublicName
) -> _Written:
    layers = {_layer(name).removeprefix(TRUNK) for name in tensors}
    header = metadata(info, layers, info.alpha)
    return "pytorch_lora_weights.safetensors", dict(tensors), header


def _comfyui(tensors: Mapping[str, Tensor], info: AdapterInfo, public_name: PublicName) -> _Written:
    # Some loaders ignore alpha, all agree where it equals the rank: the scale goes into `up`.
    layers = {_layer(name).removeprefix(TRUNK) for name in tensors}
    written = {
        f"diffusion_model.{name}": tensor
        for name, tensor in _public(tensors, info, public_name).items()
    }
    return f"{info.name}_comfyui.safetensors", written, metadata(info, layers, float(info.rank))


FORMATS: dict[str, Callable[[Mapping[str, Tensor], AdapterInfo, PublicName], _Written]] = {
    "diffusers": _diffusers,
    "comfyui": _comfyui,
}
"""Name to writer."""


def _public(
    tensors: Mapping[str, Tensor], info: AdapterInfo, public_name: PublicName
) -> dict[str, Tensor]:
    """Rename tensors to public names; factors become lora_down and lora_up, scaled already."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = _layer(name)
        public = public_name(layer)
        assert public is not None, f"{layer} has no public name"
        if ".lora_A." in name:
            renamed[f"{public}.lora_down.weight"] = tensor
        elif ".lora_B." in name:
            renamed[f"{public}.lora_up.weight"] = tensor * (info.alpha / info.rank)
        else:
            renamed[public] = tensor
    return renamed


def _layer(name: str) -> str:
    return name.split(".lora_")[0]
