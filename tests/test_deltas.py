"""The formulas of all kinds of adapters are those by which PEFT trains them."""

from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor, nn

from kit.draws import draw_normal
from kit.models.deltas import COMPLETE, adapt, decompose, kind_of, product, rank_of

NAMES = {"lora_A.weight": "lora_down", "lora_B.weight": "lora_up"}
ALPHA = 6
KINDS: dict[str, PeftConfig] = {
    "LoRA": LoraConfig(r=3, lora_alpha=ALPHA, target_modules=["layer"]),
    "rank-stabilised LoRA": LoraConfig(
        r=4, lora_alpha=ALPHA, target_modules=["layer"], use_rslora=True
    ),
    "DoRA": LoraConfig(r=3, lora_alpha=ALPHA, target_modules=["layer"], use_dora=True),
    "LoHa": LoHaConfig(r=3, alpha=ALPHA, target_modules=["layer"]),
    "LoKr": LoKrConfig(r=1, alpha=ALPHA, target_modules=["layer"]),
    "LoKr of two factored sides": LoKrConfig(
        r=1, alpha=ALPHA, target_modules=["layer"], decompose_both=True
    ),
    "LoKr of whole sides": LoKrConfig(r=5, alpha=ALPHA, target_modules=["layer"]),
}


def trained(config: PeftConfig) -> Any:
    """Give a layer with an adapter of which nothing is zero."""
    model = nn.ModuleDict({"layer": nn.Linear(12, 20)})
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        noise = draw_normal(tuple(parameter.shape), name)
        parameter.data = 2 + noise if "magnitude" in name else noise
    return model["layer"]


def tensors_of(layer: Any) -> dict[str, Tensor]:
    """Name the tensors of an adapter as we do."""
    found = {}
    for name, parameter in layer.named_parameters():
        if ".default" in name:
            plain = name.replace(".default", "")
            found[NAMES.get(plain, plain)] = parameter.data
    return found


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_adapted_weights_are_those_that_peft_merges(config: PeftConfig) -> None:
    layer = trained(config)
    factors, weight = tensors_of(layer), layer.base_layer.weight.data.clone()
    magnitude = factors.pop("lora_magnitude_vector.weight", None)
    scale = layer.scaling["default"]
    if magnitude is None:
        torch.testing.assert_close(scale * product(factors), layer.get_delta_weight("default"))
    ours = adapt(weight, factors, scale=scale, magnitude=magnitude)
    layer.merge()
    torch.testing.assert_close(ours, layer.base_layer.weight.data)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_set_of_factors_tells_its_kind_and_rank(config: Any) -> None:
    layer = trained(config)
    factors = tensors_of(layer)
    factors.pop("lora_magnitude_vector.weight", None)
    kind = kind_of(factors)
    assert kind == ("LoRA" if isinstance(config, LoraConfig) else type(config).__name__[:4])
    is_whole = factors.keys() == {"lokr_w1", "lokr_w2"}
    shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
    assert rank_of(shapes) == (None if is_whole else config.r)


def test_incomplete_sets_have_no_kind() -> None:
    for names in COMPLETE:
        assert all(kind_of(names - {name}) is None for name in names)
        assert kind_of(names | {"core"}) is None


@pytest.mark.parametrize("shape", [(20,), (20, 1), (1, 12)])
def test_magnitudes_are_set_along_their_axes(shape: tuple[int, ...]) -> None:
    weight, magnitude = draw_normal((20, 12), "weight"), 1 + draw_normal(shape, "m").abs()
    decomposed = decompose(weight, magnitude)
    norms = decomposed.norm(dim=0 if shape[0] == 1 else 1)
    torch.testing.assert_close(norms, magnitude.flatten())
    cosines = torch.cosine_similarity(weight, decomposed, dim=0 if shape[0] == 1 else 1)
    torch.testing.assert_close(cosines, torch.ones_like(cosines))


def test_strength_goes_from_the_base_to_the_adapted_weight() -> None:
    weight, magnitude = draw_normal((20, 12), "weight"), torch.rand(20)
    factors = {"lora_up": draw_normal((20, 3), "up"), "lora_down": draw_normal((3, 12), "down")}
    for known in (None, magnitude):
        full = adapt(weight, factors, scale=0.7, magnitude=known)
        part = adapt(weight, factors, scale=0.7, magnitude=known, strength=0.3)
        torch.testing.assert_close(part, weight + 0.3 * (full - weight))
        assert torch.equal(adapt(weight, factors, scale=0.7, magnitude=known, strength=0), weight)
