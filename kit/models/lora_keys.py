"""Keys of adapter files in the dialects of all programs: of which layer, and what of it.

Sources: kohya, diffusers, peft, LyCORIS, ComfyUI, LightX2V, musubi-tuner, SimpleTuner.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping

from kit.models.deltas import LOHA, LOKR
from kit.models.keys import public_name

ENDS = {
    ".lora_down.weight": "lora_down",
    ".lora_up.weight": "lora_up",
    ".lora_A.weight": "lora_down",
    ".lora_B.weight": "lora_up",
    ".lora_A.default.weight": "lora_down",
    ".lora_B.default.weight": "lora_up",
    ".lora_A": "lora_down",
    ".lora_B": "lora_up",
    "_lora.down.weight": "lora_down",
    "_lora.up.weight": "lora_up",
    ".lora.down.weight": "lora_down",
    ".lora.up.weight": "lora_up",
    ".lora_linear_layer.down.weight": "lora_down",
    ".lora_linear_layer.up.weight": "lora_up",
    **{f".{name}": name for name in LOHA + LOKR},
    **{f".{name}.default": name for name in LOHA + LOKR},
    ".lora_mid.weight": "core",
    ".hada_t1": "core",
    ".hada_t2": "second core",
    ".lokr_t2": "core",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".dora_scale": "magnitude",
    ".alpha": "alpha",
    ".diff": "difference",
    ".diff_b": "difference of bias",
    ".diff_m": "difference of modulation",
    ".w_norm": "difference",
    ".b_norm": "difference of bias",
    ".set_weight": "whole",
}
"""Ends of keys, and what the tensor is to the layer named before it."""

LONE = {
    "difference": (".weight", ""),
    "difference of bias": (".bias",),
    "difference of modulation": (".modulation",),
    "whole": (".weight", ""),
}
"""Tensors that stand alone, and what follows the layer's name in the parameter's that they change.

All others belong to the layer's weight together."""

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "lora_unet__",
    "lora_unet_",
    "lycoris_",
    "",
)
"""What programs put before the names of layers."""


def role_of(key: str) -> str | None:
    """Say what a tensor is to its layer; None if that is not known."""
    end = _end_of(key)
    return None if end is None else ENDS[end]


def group_keys(keys: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Bring keys together that change a parameter together: by role, each with the layer's name.

    Keys of no known role are left out.
    """
    together: dict[str, dict[str, str]] = {}
    for key in keys:
        end = _end_of(key)
        if end is None:
            continue
        layer, role = key.removesuffix(end), ENDS[end]
        if role in LONE:
            yield _without_prefix(layer), {role: key}
        elif together.setdefault(layer, {}).setdefault(role, key) != key:
            yield _without_prefix(layer), {role: key}
    yield from ((_without_prefix(layer), roles) for layer, roles in together.items())


def parameter_of(layer: str, roles: Collection[str], places: Mapping[str, str]) -> str:
    """Name our parameter that tensors of a layer change; an empty name if there is none."""
    ends = next((LONE[role] for role in roles if role in LONE), (".weight",))
    names = [f"{layer}{end}".replace(".", "_") for end in ends]
    return next((places[name] for name in names if name in places), "")


def places_of(parameters: Iterable[str]) -> dict[str, str]:
    """List our parameters by what files call them, without dots.

    Some programs write underscores for dots, so that all names are compared so.
    """
    places = {}
    for ours in parameters:
        for theirs in (public_name(ours), ours.removeprefix("transformer."), f"multitalk_{ours}"):
            if theirs is not None:
                places[theirs.replace(".", "_")] = ours
    return places


def _end_of(key: str) -> str | None:
    return next((end for end in ENDS if key.endswith(end)), None)


def _without_prefix(layer: str) -> str:
    return layer.removeprefix(next(prefix for prefix in PREFIXES if layer.startswith(prefix)))
