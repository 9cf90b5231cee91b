"""What the headers of exported files say, in the three dialects that programs read.

Sources: kohya's `ss_*` keys, Stability-AI's ModelSpec 1.0, and diffusers' `lora_adapter_metadata`.
No paths and no user names go in.
"""

import json
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML

from kit.adapters.files import AdapterInfo
from kit.adapters.kinds import KINDS, Size

_MODULES = {
    "lora": "networks.lora",
    "dora": "networks.lora",
    "loha": "networks.loha",
    "lokr": "networks.lokr",
}
"""Modules of musubi-tuner that train such adapters."""

ARCHITECTURES = {"wan": "wan2.1/lora"}
"""ModelSpec's architecture by the base's type; Source: musubi-tuner."""


def metadata(info: AdapterInfo, ranks: Mapping[str, int], trigger: str = "") -> dict[str, str]:
    """Describe an exported adapter, whose scale is in its factors: alpha is the rank.

    Args:
        info: of the adapter.
        ranks: of its layers, by diffusers' names below `transformer.`.
        trigger: word in captions that calls for what was learnt.
    """
    recipe = recipe_of(info)
    peft = peft_config(info, ranks)
    values = {
        "format": "pt",
        **_kohya(info, recipe, ranks),
        **_model_spec(info, trigger),
        "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in peft.items()}),
    }
    return {key: str(value) for key, value in values.items() if value is not None}


def recipe_of(info: AdapterInfo) -> dict[str, Any]:
    """Read the recipe that an adapter was trained by, as plain values."""
    recipe: dict[str, Any] = YAML(typ="safe", pure=True).load(info.recipe)
    return recipe


def _kohya(info: AdapterInfo, recipe: dict[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    found = sorted(set(ranks.values()))
    size = found[0] if len(found) == 1 else "Dynamic"
    optimizer, trainer = recipe.get("optimizer", {}), recipe.get("trainer", {})
    objective = recipe.get("objective", {})
    return {
        "ss_base_model_version": info.base,
        "ss_network_module": _MODULES[info.kind],
        "ss_network_dim": size,
        "ss_network_alpha": size,
        "ss_network_args": json.dumps({"algo": info.kind}),
        "ss_learning_rate": optimizer.get("lr"),
        "ss_optimizer": optimizer.get("type"),
        "ss_steps": info.steps,
        "ss_max_train_steps": trainer.get("max_steps"),
        "ss_gradient_accumulation_steps": trainer.get("accumulate"),
        "ss_mixed_precision": trainer.get("precision"),
        "ss_seed": recipe.get("seed"),
        "ss_timestep_sampling": objective.get("sigma"),
        "ss_discrete_flow_shift": objective.get("shift"),
        "ss_output_name": info.name,
    }


def _model_spec(info: AdapterInfo, trigger: str) -> dict[str, Any]:
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURES.get(info.base, f"{info.base}/lora"),
        "modelspec.implementation": "charakit",
        "modelspec.title": info.name,
        "modelspec.trigger_phrase": trigger or None,
    }


def peft_config(info: AdapterInfo, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Give PEFT's configuration of an adapter whose alpha is the rank, as plain values.

    Args:
        info: of the adapter.
        ranks: of its layers, by diffusers' names below `transformer.`.
    """
    factor = recipe_of(info).get("adapter", {}).get("factor", -1)
    first = next(iter(ranks.values()), 1)
    # Names stand for themselves in patterns, since the only other readings are no layers.
    others = {layer: rank for layer, rank in sorted(ranks.items()) if rank != first}
    config = KINDS[info.kind].configure(dict.fromkeys(ranks, Size(first, first)), 0.0, factor)
    plain = {
        key: value
        for key, value in config.to_dict().items()
        if isinstance(value, bool | int | float | str | list) or value is None
    }
    return plain | {
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": dict(others),
    }
