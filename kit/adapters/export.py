"""Write an adapter for other programs, and say which of its tensors they know.

Both formats hold the trunk of Wan. The audio layers are no part of the Wan that these programs
adapt, so they go to a file of their own under their public names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kit.adapters.files import AdapterInfo, load_adapter, write_tensors
from kit.adapters.metadata import metadata
from kit.errors import InputError, did_you_mean
from kit.models.keys import is_audio

TRUNK = "transformer."
"""Our names start so where diffusers' Wan has the same layer."""


@dataclass(frozen=True)
class Exported:
    """What became of an adapter.

    Attributes:
        files: written.
        matched: keys written for layers of Wan's trunk, by the table of its public names.
        unmatched: our names of tensors that it does not, and why.
    """

    files: tuple[Path, ...]
    matched: tuple[str, ...]
    unmatched: Mapping[str, str]


PREFIX = "diffusion_model."
"""What ComfyUI and the public InfiniteTalk code expect before the names of factors."""

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
    return FORMATS[target](tensors, info, out, public_name)


def _diffusers(
    tensors: Mapping[str, Tensor], info: AdapterInfo, out: Path, public_name: PublicName
) -> Exported:
    trunk, rest = _split(tensors)
    header = metadata(info, _layers(trunk), info.alpha)
    file = out / "pytorch_lora_weights.safetensors"
    return _save(file, trunk, header, rest, info, public_name)


def _comfyui(
    tensors: Mapping[str, Tensor], info: AdapterInfo, out: Path, public_name: PublicName
) -> Exported:
    # Some loaders ignore alpha, all agree where it equals the rank: the scale goes into `up`.
    trunk, rest = _split(tensors)
    header = metadata(info, _layers(trunk), float(info.rank))
    named = _public(trunk, info, public_name)
    written = {PREFIX + name: tensor for name, tensor in named.items()}
    return _save(out / f"{info.name}_comfyui.safetensors", written, header, rest, info, public_name)


def _base(
    tensors: Mapping[str, Tensor], info: AdapterInfo, out: Path, public_name: PublicName
) -> Exported:
    """Write the denoiser's part of a base folder, in half precision."""
    if info.train_fully != ("all",):
        raise InputError("export: only a fully trained denoiser is a base; this is an adapter")
    halves = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    audio = {name: tensor for name, tensor in halves.items() if is_audio(name)}
    trunk = {n.removeprefix(TRUNK): t for n, t in halves.items() if n not in audio}
    files = {
        out / "transformer" / "diffusion_pytorch_model.safetensors": trunk,
        out / "audio" / "model.safetensors": _public(audio, info, public_name),
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, content, {"format": "pt"})
    return Exported(tuple(files), tuple(tensors), {})


Writer = Callable[[Mapping[str, Tensor], AdapterInfo, Path, PublicName], Exported]

FORMATS: dict[str, Writer] = {"diffusers": _diffusers, "comfyui": _comfyui, "base": _base}
"""Name to writer."""


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Part the factors on Wan's trunk from all the rest."""
    trunk = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(TRUNK) and ".lora_" in name and not is_audio(name)
    }
    return trunk, {name: tensor for name, tensor in tensors.items() if name not in trunk}


def _save(
    file: Path,
    trunk: dict[str, Tensor],
    header: dict[str, str],
    rest: Mapping[str, Tensor],
    info: AdapterInfo,
    public_name: PublicName,
) -> Exported:
    files = []
    if trunk:
        write_tensors(file, trunk, header)
        files.append(file)
    if rest:
        files.append(file.parent / f"{info.name}_audio.safetensors")
        # Factors are looked for below this prefix; whole tensors are public files of their own.
        audio = {
            (PREFIX if ".lora_" in name else "") + name: tensor
            for name, tensor in _public(rest, info, public_name).items()
        }
        write_tensors(files[-1], audio, {"format": "pt"})
    reason = f"no layer of Wan's trunk; in {info.name}_audio.safetensors"
    return Exported(tuple(files), tuple(trunk), dict.fromkeys(rest, reason))


def _layers(tensors: Mapping[str, Tensor]) -> set[str]:
    return {_layer(name).removeprefix(TRUNK) for name in tensors}


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
