"""How other programs read adapters for Wan: through their own code, or by their tables of keys.

A consumer reads an exported file for a trunk of given sizes, and tells which layers it changes,
how, and which keys it has no use for.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.adapters.export import TRUNK, is_trunk
from kit.models import deltas
from kit.models.keys import public_name
from kit.models.lora_files import adapter_file
from kit.models.tensor_files import open_tensors, read_header

Forward = Callable[[Tensor, Tensor], Tensor]
"""(weight of the base [outputs, inputs], x [..., inputs]) -> output without bias, in float64."""


@dataclass(frozen=True)
class Loaded:
    """What a consumer made of a file.

    Attributes:
        layers: that it changes, by our names.
        unknown: keys of the file that it has no use for.
    """

    layers: Mapping[str, Forward]
    unknown: tuple[str, ...]


def load_by_diffusers(path: Path, denoiser: nn.Module) -> Loaded:
    """Load a file as `WanPipeline.load_lora_weights` does."""
    from diffusers import WanPipeline
    from peft import get_peft_model_state_dict

    net = _empty_trunk(denoiser)
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": None}
    pipeline = cast(Any, WanPipeline)(transformer=net, **parts)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="read")
    held = {f"{TRUNK}{key}" for key in get_peft_model_state_dict(net, adapter_name="read")}
    return _loaded(net, read_header(path).tensors, held)


def load_by_peft(path: Path, denoiser: nn.Module) -> Loaded:
    """Load a folder, or its file of weights, as `PeftModel.from_pretrained` does."""
    from peft import PeftModel, get_peft_model_state_dict

    file = adapter_file(path)
    net = _empty_trunk(denoiser)
    model = PeftModel.from_pretrained(cast(Any, net), str(file.parent))
    return _loaded(net, read_header(file).tensors, get_peft_model_state_dict(model))


def _empty_trunk(denoiser: nn.Module) -> Any:
    """Build diffusers' Wan of a denoiser's sizes, with a single zero for each parameter.

    On the meta device, adapters would lose their numbers too: PEFT brings them to their layer's.
    """
    from diffusers import WanTransformer3DModel

    config = cast(Any, denoiser.transformer).config
    with torch.device("meta"):
        net: nn.Module = cast(Any, WanTransformer3DModel).from_config(config)
    zero = torch.zeros((), dtype=torch.float64)
    for name, parameter in list(net.named_parameters()):
        layer, _, own = name.rpartition(".")
        frozen = nn.Parameter(zero.expand(parameter.shape), requires_grad=False)
        setattr(net.get_submodule(layer), own, frozen)
    return net


def _loaded(net: nn.Module, keys: Iterable[str], held: Iterable[str]) -> Loaded:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {
        f"{TRUNK}{name}": _forward_of(cast(nn.Module, module))
        for name, module in net.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    return Loaded(layers, tuple(sorted(set(keys).difference(held))))


def _forward_of(module: nn.Module) -> Forward:
    base: Any = module.base_layer

    def forward(weight: Tensor, x: Tensor) -> Tensor:
        empty, base.weight = base.weight, nn.Parameter(weight, requires_grad=False)
        try:
            with torch.no_grad():
                output: Tensor = module.eval()(x)
            return output
        finally:
            base.weight = empty

    return forward


@dataclass(frozen=True)
class KeyTable:
    """Which keys a program reads that is not installed here.

    Attributes:
        names: make its names of a layer of the public one.
        ends: what follows them, and the factor that stands there.
    """

    names: tuple[Callable[[str], str], ...]
    ends: Mapping[str, str]


def _dotted(layer: str) -> str:
    return f"diffusion_model.{layer}"


def _underscored(layer: str) -> str:
    return f"lora_unet_{layer.replace('.', '_')}"


COMFYUI = KeyTable(
    names=(_dotted, _underscored),
    ends={
        ".lora_up.weight": "lora_up",
        ".lora_down.weight": "lora_down",
        ".lora_B.weight": "lora_up",
        ".lora_A.weight": "lora_down",
        **{f".{name}": name for name in (*deltas.LOHA, *deltas.LOKR)},
        ".alpha": "alpha",
    },
)
"""Sources: `model_lora_keys_unet` and `load_lora` in ComfyUI's comfy/lora.py, and its
comfy/weight_adapter for alpha / rank, 1 without alpha. Its reading of DoRA is left out."""

MUSUBI = KeyTable(
    names=(_underscored,),
    ends={
        ".lora_up.weight": "lora_up",
        ".lora_down.weight": "lora_down",
        **{f".{name}": name for name in deltas.LOHA},
        **{f".{name}": name for name in ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
        ".alpha": "alpha",
    },
)
"""Sources: musubi-tuner's utils/lora_utils.py, networks/loha.py and networks/lokr.py, which wants
the first factor of a Kronecker product whole."""


def load_by_table(table: KeyTable, path: Path, denoiser: nn.Module) -> Loaded:
    """Load a file as a program with such a table does."""
    known = {name(public): ours for ours, public in _trunk(denoiser) for name in table.names}
    found: dict[str, dict[str, str]] = {}
    keys = read_header(path).tensors
    for key in keys:
        end = next((end for end in table.ends if key.endswith(end)), "")
        layer = known.get(key.removesuffix(end))
        if end and layer is not None:
            found.setdefault(layer, {})[table.ends[end]] = key
    whole = {layer: own for layer, own in found.items() if deltas.kind_of(own.keys() - {"alpha"})}
    used = {key for own in whole.values() for key in own.values()}
    layers = {layer: partial(_change, path, own) for layer, own in whole.items()}
    return Loaded(layers, tuple(sorted(keys.keys() - used)))


def _trunk(denoiser: nn.Module) -> Iterator[tuple[str, str]]:
    """Name the linear layers of Wan's trunk: ours, and the public name."""
    for name, parameter in denoiser.named_parameters():
        layer = name.removesuffix(".weight")
        public = public_name(layer)
        if parameter.ndim == 2 and layer != name and public and is_trunk(layer):
            yield layer, public


def _change(path: Path, keys: Mapping[str, str], weight: Tensor, x: Tensor) -> Tensor:
    with open_tensors(path, weight.device) as read:
        factors = {name: read(key).to(weight.dtype) for name, key in keys.items()}
    alpha = factors.pop("alpha", None)
    scale = 1.0 if alpha is None else deltas.scale_of(factors, float(alpha))
    return F.linear(x, deltas.adapt(weight, factors, scale=scale))


Consumer = Callable[[Path, nn.Module], Loaded]

CONSUMERS: dict[str, Consumer] = {
    "diffusers": load_by_diffusers,
    "comfyui": partial(load_by_table, COMFYUI),
    "kohya": partial(load_by_table, MUSUBI),
    "peft": load_by_peft,
}
"""Format to who reads it."""

UNSUPPORTED = {
    ("dora", "comfyui"): "ComfyUI divides by the norm of the base's weights, not of the changed "
    "ones, so that a dora does something else there; --to base merges it",
    ("dora", "kohya"): "its readers drop the magnitudes of a dora; --to base merges it",
    ("loha", "diffusers"): "diffusers knows no loha; --rank makes plain factors of it",
    ("lokr", "diffusers"): "diffusers' pipelines refuse a lokr; --rank makes plain factors of it",
}
"""Kinds of adapters that the reader of a format does not read as they were trained, and what to do.

Sources: comfy/weight_adapter/base.py (`weight_decompose`; Comfy-Org/ComfyUI pull request 15458);
musubi-tuner's utils/lora_utils.py; diffusers 0.42, `WanLoraLoaderMixin.load_lora_weights`."""
