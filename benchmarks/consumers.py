"""Adapters of all kinds merged by ComfyUI's and musubi-tuner's own code, beside ours.

    git clone https://github.com/Comfy-Org/ComfyUI
    git clone https://github.com/kohya-ss/musubi-tuner
    python benchmarks/consumers.py --comfyui ComfyUI --musubi musubi-tuner

The tiny base's denoiser gets adapters in which every number was drawn. Printed is the largest
difference of a layer's weight, relative to the change that the adapter makes, at strengths 1 and
0.5. Where ComfyUI reads a dora, it is another formula; see `UNSUPPORTED`.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kit.adapters.lora import Lora, adapter_tensors, trained_parameters
from kit.draws import draw_normal
from kit.models.keys import public_name
from kit.models.lora_files import LoraFile, match_lora
from kit.models.tensor_files import open_tensors
from kit.models.wan_base import WanBase

State = dict[str, Tensor]
Merge = Callable[[Path, State, Path, float], State]
"""(checkout, weights of layers by public name, adapter file, strength) -> weights that changed."""

CPU = torch.device("cpu")
TINY_BASE = Path(__file__).parents[1] / "data" / "tiny_base"
STRENGTHS = (1.0, 0.5)
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"alpha": 7.0, "rank": 6},
    "dora": {"kind": "dora", "alpha": 7.0, "rank": 6},
    "loha": {"kind": "loha", "alpha": 7.0, "rank": 6},
    "lokr": {"kind": "lokr", "alpha": 7.0, "rank": 3},
    "lokr, factor 4": {"kind": "lokr", "alpha": 7.0, "rank": 3, "factor": 4},
    "lokr of whole sides": {"kind": "lokr", "alpha": 2.0, "rank": 64},
}
ENDS = {
    ".lora_A.": ".lora_down.",
    ".lora_B.": ".lora_up.",
    ".lora_magnitude_vector": ".dora_scale",
}


class AnyModel(ModuleType):
    """Stands for ComfyUI's module of models, of which only the classes' names are asked for."""

    def __getattr__(self, name: str) -> Any:
        """Make a class that nothing is an instance of."""
        return type(name, (), {})


def comfyui(checkout: Path, weights: State, file: Path, strength: float) -> State:
    """Merge as the node LoraLoader does."""
    sys.path.insert(0, str(checkout))
    sys.modules.setdefault("einops", AnyModel("einops"))
    import comfy
    from comfy.cli_args import args

    comfy.model_base = sys.modules["comfy.model_base"] = AnyModel("comfy.model_base")
    args.cpu = True
    from comfy import lora

    named = {f"diffusion_model.{name}": weight for name, weight in weights.items()}
    config = SimpleNamespace(unet_config={})
    model = SimpleNamespace(state_dict=lambda: named, model_config=config)
    patches = lora.load_lora(load_file(file), lora.model_lora_keys_unet(model, {}))
    return {
        key.removeprefix("diffusion_model."): lora.calculate_weight(
            [(strength, patch, 1.0, None, None)], named[key].clone(), key
        )
        for key, patch in patches.items()
    }


def musubi(checkout: Path, weights: State, file: Path, strength: float) -> State:
    """Merge as wan_generate_video.py does."""
    sys.path.insert(0, str(checkout / "src"))
    from musubi_tuner.utils.lora_utils import load_safetensors_with_lora_and_fp8

    base = file.with_name("base.safetensors")
    save_file(weights, base)
    adapter = load_file(file)
    merged = load_safetensors_with_lora_and_fp8(str(base), [adapter], [strength], False, CPU)
    return {name: w for name, w in merged.items() if not torch.equal(w, weights[name])}


PROGRAMS: dict[str, tuple[Merge, Callable[[str], str]]] = {
    "comfyui": (comfyui, lambda layer: f"diffusion_model.{layer}"),
    "musubi": (musubi, lambda layer: f"lora_unet_{layer.replace('.', '_')}"),
}
"""Name to who merges, and to what is written for a public name of a layer."""


def main() -> None:
    """Compare all kinds with the programs that are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in PROGRAMS:
        parser.add_argument(f"--{name}", type=Path, help="checkout")
    checkouts = vars(parser.parse_args())
    warnings.simplefilter("ignore")
    for name, (merge, write_name) in PROGRAMS.items():
        if checkouts[name] is None:
            print(f"{name}: skipped, no checkout")
            continue
        for kind, options in ADAPTERS.items():
            layers, ours, theirs, differences = compare(checkouts[name], merge, write_name, options)
            print(f"{name:9}{kind:21}{ours:4} of {layers} layers by us, {theirs} by it, ", end="")
            print(f"difference {' '.join(f'{d:.1e}' for d in differences)}")


def compare(
    checkout: Path, merge: Merge, write_name: Callable[[str], str], options: Mapping[str, Any]
) -> tuple[int, int, int, list[float]]:
    """Merge one adapter by both.

    Returns:
        Layers of the adapter, layers that we and they change, largest differences by strength.
    """
    base = WanBase(path=str(TINY_BASE), random_weights=0, dtype="float32")
    denoiser = base.load_denoiser(CPU)
    weights = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    tensors = draw_adapter(denoiser, {"rank": 4, "parts": ["attention", "ffn"], **options})
    num_layers = sum(key.endswith(".alpha") for key in tensors)
    linear = {public_name(n) or n: w for n, w in weights.items() if n.startswith("transformer.")}
    differences = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        save_file(renamed(tensors, write_name), file)
        for strength in STRENGTHS:
            changes = match_lora(LoraFile(str(file), strength), shapes).changes
            with open_tensors(file, CPU) as read:
                ours = {n: c.add_to(weights[n], read) for n, (c,) in changes.items()}
            theirs = merge(checkout, linear, file, strength)
            differences.append(
                max(
                    float((theirs[public_name(n) or n] - w).norm() / (w - weights[n]).norm())
                    for n, w in ours.items()
                )
            )
    return num_layers, len(ours), len(theirs), differences


def draw_adapter(denoiser: Any, options: Mapping[str, Any]) -> State:
    """Give the tensors of an adapter in which every number has moved."""
    lora = Lora(**options)
    lora.inject(denoiser, seed=0)
    trained = trained_parameters(denoiser)
    for name, parameter in trained.items():
        parameter.data += 0.05 * draw_normal(tuple(parameter.shape), name)
    return adapter_tensors(denoiser, trained, lora.kind)


def renamed(tensors: State, write_name: Callable[[str], str]) -> State:
    """Write an adapter's keys as another program reads them."""
    found = {}
    for key, tensor in tensors.items():
        own = next(own for own in (".lora_", ".hada_", ".lokr_", ".alpha") if own in key)
        layer, _, rest = key.partition(own)
        end = f"{own}{rest}"
        for ours, theirs in ENDS.items():
            end = end.replace(ours, theirs)
        # Magnitudes without a second axis stop ComfyUI at layers that are not square.
        value = tensor[:, None] if end == ".dora_scale" else tensor
        found[f"{write_name(public_name(layer) or layer)}{end}"] = value.contiguous()
    return found


if __name__ == "__main__":
    main()
