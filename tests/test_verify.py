"""Exported adapters do in every program what they were trained to do, or are refused."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kit.adapters.consumers import CONSUMERS, UNSUPPORTED
from kit.adapters.export import FORMATS
from kit.adapters.files import AdapterInfo, write_adapter
from kit.adapters.kinds import KINDS
from kit.adapters.lora import Lora, adapter_tensors, trained_parameters
from kit.adapters.verify import verify
from kit.draws import draw_normal
from kit.errors import InputError
from kit.models.keys import is_audio
from kit.models.wan import Wan
from kit.models.wan_base import WanBase
from kit.run.export import Settings, export

MakeWan = Callable[[], Wan]
State = dict[str, Tensor]
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"alpha": 8.0},
    "lora of attention alone": {"parts": ["attention"]},
    "lora with ranks by part": {"ranks": {"ffn": 2}, "alphas": {"ffn": 6.0, "audio": 1.0}},
    "lora, rank-stabilised": {"rank_stabilised": True},
    "dora": {"kind": "dora", "alpha": 2.0},
    "loha": {"kind": "loha", "alpha": 8.0},
    "lokr": {"kind": "lokr", "alpha": 2.0, "rank": 2},
    "lokr of one factored side": {"kind": "lokr", "alpha": 2.0, "rank": 2, "factor": 4},
    "lokr of whole sides": {"kind": "lokr", "alpha": 2.0, "rank": 64},
}
SUPPORTED = [
    (name, consumer)
    for name in OPTIONS
    for consumer in CONSUMERS
    if (name[:4], consumer) not in UNSUPPORTED
]


def write(path: Path, denoiser: Wan, options: Mapping[str, Any]) -> Path:
    """Write an adapter in which every number has moved."""
    lora = Lora(**{"rank": 4, **options})
    lora.inject(denoiser, seed=0)
    trained = trained_parameters(denoiser)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.add_(0.05 * draw_normal(tuple(parameter.shape), name))
    recipe = f"adapter: {{factor: {lora.factor}}}"
    info = AdapterInfo("ann", "wan", lora.kind, lora.parts, lora.train_fully, 1, recipe)
    write_adapter(path, adapter_tensors(denoiser, trained, lora.kind), info)
    return path


def export_to(adapter: Path, consumer: str, dtype: Any = "float32") -> Path:
    """Export without audio, and give the file of weights."""
    settings = Settings(dtype=dtype, with_audio=False)
    *_, file = export(adapter, [consumer], None, lambda line: None, settings=settings)
    return file


@pytest.fixture
def adapter(tiny_denoiser: MakeWan, tmp_path: Path) -> Path:
    return write(tmp_path / "adapter.safetensors", tiny_denoiser(), OPTIONS["lora"])


@pytest.fixture(scope="module")
def empty(tiny_base: WanBase) -> Any:
    return tiny_base.empty_denoiser()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "consumer"), SUPPORTED)
def test_consumers_do_what_was_trained(
    tiny_denoiser: MakeWan, empty: Any, tmp_path: Path, name: str, consumer: str, dtype: Any
) -> None:
    adapter = write(tmp_path / "adapter.safetensors", tiny_denoiser(), OPTIONS[name])
    found = verify(export_to(adapter, consumer, dtype), consumer, adapter, empty)
    assert found.problems() == []
    parts = {"attention", "ffn"}.intersection(OPTIONS[name].get("parts", empty.parts()))
    assert set(found.matched) == {layer for part in parts for layer in empty.parts()[part]}
    assert all(is_audio(parameter) for parameter in found.elsewhere)
    assert f"as {consumer} reads it: {len(found.matched)} layers matched, 0 miss" in found.summary()


@pytest.mark.parametrize(("kind", "consumer"), UNSUPPORTED)
def test_what_no_consumer_reads_as_trained_is_refused(
    tiny_denoiser: MakeWan, empty: Any, tmp_path: Path, kind: str, consumer: str
) -> None:
    adapter = write(tmp_path / "adapter.safetensors", tiny_denoiser(), {"kind": kind})
    with pytest.raises(InputError, match=re.escape(UNSUPPORTED[kind, consumer])):
        verify(adapter, consumer, adapter, empty)


def test_every_kind_has_a_consumer_and_every_format_is_known() -> None:
    assert CONSUMERS.keys() == FORMATS.keys()
    assert {kind for kind, _ in UNSUPPORTED} <= KINDS.keys()
    assert all(any((kind, name) not in UNSUPPORTED for name in CONSUMERS) for kind in KINDS)


def rename(tensors: State, **names: str) -> State:
    pattern = re.compile("|".join(names))
    return {pattern.sub(lambda found: names[found[0]], key): t for key, t in tensors.items()}


def leave_out(tensors: State, part: str) -> State:
    return {key: tensor for key, tensor in tensors.items() if part not in key}


Damage = tuple[str, Callable[[State], State], list[str]]
DAMAGES: dict[str, Damage] = {
    "a layer is left out": (
        "comfyui",
        lambda tensors: leave_out(tensors, "blocks.0.self_attn.q."),
        ["1 layers do not change: transformer.blocks.0.attn1.to_q"],
    ),
    "a factor is left out": (
        "kohya",
        lambda tensors: leave_out(tensors, "blocks_0_self_attn_q.lora_up"),
        [
            "1 layers do not change: transformer.blocks.0.attn1.to_q",
            "2 keys have no use: lora_unet_blocks_0_self_attn_q.alpha, ",
        ],
    ),
    "the names of another program": (
        "comfyui",
        lambda tensors: rename(tensors, diffusion_model="transformer"),
        ["24 layers do not change: ", "72 keys have no use: transformer.blocks.0"],
    ),
    "keys and values are swapped": (
        "comfyui",
        lambda tensors: rename(tensors, **{"f_attn.k.": "f_attn.v.", "f_attn.v.": "f_attn.k."}),
        [" off, more than "],
    ),
    "another scale": (
        "kohya",
        lambda tensors: {key: 1.1 * tensor for key, tensor in tensors.items()},
        [" off, more than 2.4e-07"],
    ),
    "an alpha beside the factors": (
        "diffusers",
        lambda tensors: tensors | {"transformer.blocks.0.attn1.to_q.alpha": torch.ones(())},
        ["diffusers does not read it: Invalid LoRA checkpoint"],
    ),
    "a key of no layer": (
        "peft",
        lambda tensors: rename(tensors, **{"attn1.to_q.lora_A": "attn1.to_x.lora_A"}),
        ["2 keys have no use: base_model.model.blocks.0.attn1.to_x.lora_A", " off, more than "],
    ),
}
"""What may go wrong with a file, of which program, and what is said of it."""


@pytest.mark.parametrize(("consumer", "damage", "told"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_told(
    adapter: Path, empty: Any, consumer: str, damage: Callable[[State], State], told: list[str]
) -> None:
    file = export_to(adapter, consumer)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    save_file(damage(load_file(file)), file, metadata=header)
    problems = verify(file, consumer, adapter, empty).problems()
    assert len(problems) == len(told)
    assert all(part in line for part, line in zip(told, problems, strict=True)), problems


def test_another_alpha_in_the_configuration_of_peft_is_told(adapter: Path, empty: Any) -> None:
    file = export_to(adapter, "peft")
    config = file.with_name("adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 2}))
    (problem,) = verify(file.parent, "peft", adapter, empty).problems()
    assert " is 0.5 off, more than " in problem


def test_another_alpha_in_the_header_of_diffusers_is_told(adapter: Path, empty: Any) -> None:
    file = export_to(adapter, "diffusers")
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    settings = json.loads(header["lora_adapter_metadata"]) | {"transformer.lora_alpha": 2}
    save_file(load_file(file), file, {**header, "lora_adapter_metadata": json.dumps(settings)})
    (problem,) = verify(file, "diffusers", adapter, empty).problems()
    assert " is 0.5 off, more than " in problem


def test_bad_input_is_refused(adapter: Path, empty: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown format 'comfy'; did you mean 'comfyui'"):
        verify(adapter, "comfy", adapter, empty)
    foreign = export_to(adapter, "comfyui")
    with pytest.raises(InputError, match="was not written by this kit"):
        verify(foreign, "comfyui", foreign, empty)
    with pytest.raises(InputError, match="there is no file"):
        verify(tmp_path / "gone.safetensors", "comfyui", adapter, empty)
