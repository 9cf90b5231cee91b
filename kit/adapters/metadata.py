"""What the headers of exported files say, in the three dialects that programs read.

Sources: kohya's `ss_*` keys, Stability-AI's ModelSpec 1.0, and diffusers' `lora_adapter_metadata`.
No paths and no user names go in.
"""

import json
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig
from ruamel.yaml import YAML

from kit.adapters.files import AdapterInfo

ARCHITECTURES = {"wan": "wan2.1/lora"}
"""ModelSpec's architecture by the base's type; Source: musubi-tuner."""


def metadata(info: AdapterInfo, layers: Iterable[str], alpha: float) -> dict[str, str]:
    """Describe an exported adapter.

    Args:
        info: of the adapter.
        layers: modules with factors, as diffusers names them below `transformer.`.
        alpha: that a reader should assume; the rank where the scale is in the factors.
    """
    recipe = YAML(typ="safe", pure=True).load(info.recipe)
    values = {
        "format": "pt",
        **_kohya(info, recipe, alpha),
        **_model_spec(info),
        "lora_adapter_metadata": json.dumps(_peft(info, layers, alpha)),
    }
    return {key: str(value) for key, value in values.items() if value is not None}


def _kohya(info: AdapterInfo, recipe: dict[str, Any], alpha: float) -> dict[str, Any]:
    optimizer, trainer = recipe.get("optimizer", {}), recipe.get("trainer", {})
    objective = recipe.get("objective", {})
    return {
        "ss_base_model_version": info.base,
        "ss_network_module": "networks.lora",
        "ss_network_dim": info.rank,
        "ss_network_alpha": alpha,
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


def _model_spec(info: AdapterInfo) -> dict[str, Any]:
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURES.get(info.base, f"{info.base}/lora"),
        "modelspec.implementation": "charakit",
        "modelspec.title": info.name,
    }


def _peft(info: AdapterInfo, layers: Iterable[str], alpha: float) -> dict[str, Any]:
    config: dict[str, Any] = LoraConfig(  # type: ignore[no-untyped-call]
        r=info.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number will do
        target_modules=sorted(layers),
    ).to_dict()
    plain = {
        key: value
        for key, value in config.items()
        if isinstance(value, bool | int | float | str | list) or value is None
    }
    plain["target_modules"] = sorted(config["target_modules"])
    return {f"transformer.{key}": value for key, value in plain.items()}
