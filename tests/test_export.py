"""Exported adapters do in other programs what they do here."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from kit.adapters.export import Exported, export_adapter
from kit.adapters.files import AdapterInfo, write_adapter
from kit.adapters.full import Full
from kit.adapters.lora import Lora, trained_parameters
from kit.batch import Batch
from kit.draws import draw_normal
from kit.errors import InputError
from kit.models.keys import our_name, public_name
from kit.models.wan import Wan
from kit.models.wan_base import WanBase

MakeWan = Callable[[], Wan]
TINY_BASE = Path(__file__).parents[1] / "data" / "tiny_base"
RECIPE = """
seed: 3
objective: {type: flow_matching, sigma: uniform, shift: 7.0}
optimizer: {type: adamw, lr: 0.0001}
trainer: {max_steps: 50, accumulate: 2, precision: bf16-mixed}
"""


@pytest.fixture(scope="module")
def trained(tiny_denoiser: MakeWan) -> Wan:
    """A denoiser with moved factors on trunk and audio; alpha is not the rank."""
    denoiser = tiny_denoiser()
    Lora(rank=4, alpha=8.0).inject(denoiser, seed=0)
    with torch.no_grad():
        for name, parameter in trained_parameters(denoiser).items():
            parameter.copy_(0.1 * draw_normal(tuple(parameter.shape), name))
    return denoiser


@pytest.fixture(scope="module")
def adapter(trained: Wan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "adapter.safetensors"
    parts = ("attention", "ffn", "audio")
    info = AdapterInfo("ann", "wan", "lora", parts, (), 40, RECIPE)
    write_adapter(path, trained_parameters(trained), info)
    return path


def export(adapter: Path, target: str, out: Path) -> tuple[Exported, dict[str, Tensor]]:
    exported = export_adapter(adapter, target, out, public_name)
    return exported, load_file(exported.files[0])


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as reader:
        found: dict[str, str] = reader.metadata()
    return found


def without_audio(denoiser: Wan) -> Wan:
    """Copy a denoiser without its audio layers' output, which diffusers' network does not have."""
    silent = copy.deepcopy(denoiser)
    for name, parameter in silent.named_parameters():
        if "audio_cross_attn.proj" in name:
            nn.init.zeros_(parameter)
    return silent


def velocity(denoiser: Wan, batch: Batch) -> Tensor:
    with torch.no_grad():
        predicted: Tensor = denoiser(batch.latents, torch.full((3,), 0.7), batch.conditions)
    return predicted


def diffusers_velocity(network: nn.Module, batch: Batch) -> Tensor:
    conditions = batch.conditions
    mask = conditions.reference_mask[..., None, None].expand(-1, -1, -1, 8, 8)
    text = nn.functional.pad(conditions.text, (0, 0, 0, 512 - conditions.text.shape[1]))
    with torch.no_grad():
        predicted: Tensor = network(
            torch.cat([batch.latents, mask, conditions.reference], dim=1),
            torch.full((3,), 700.0),
            text,
            conditions.image,
        ).sample
    return predicted


def merge(denoiser: Wan, exported: dict[str, Tensor], prefix: str) -> None:
    """Add up @ down to the weights, by the public names alone, as other programs do."""
    weights = dict(denoiser.named_parameters())
    suffix = ".lora_up.weight"
    with torch.no_grad():
        for key in (key for key in exported if key.endswith(suffix)):
            layer = key.removesuffix(suffix)
            change = exported[key] @ exported[f"{layer}.lora_down.weight"]
            weights[f"{our_name(layer.removeprefix(prefix))}.weight"].add_(change)


def test_diffusers_loads_it_and_computes_the_same(
    trained: Wan, tiny_denoiser: MakeWan, adapter: Path, batch: Batch, tmp_path: Path
) -> None:
    state = tiny_denoiser().transformer.state_dict()
    network = WanTransformer3DModel.from_config(dict(trained.transformer.config)).eval()
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    export(adapter, "diffusers", tmp_path)
    tensors, facts = WanPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    before = diffusers_velocity(network, batch)
    network.load_lora_adapter(tensors, prefix="transformer", metadata=facts)
    after = diffusers_velocity(network, batch)
    expected = velocity(without_audio(trained), batch)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert (after - before).norm() > 0.1 * before.norm()


def test_merged_by_public_names_it_computes_the_same(
    trained: Wan, tiny_denoiser: MakeWan, adapter: Path, batch: Batch, tmp_path: Path
) -> None:
    exported, trunk = export(adapter, "comfyui", tmp_path)
    audio = load_file(exported.files[1])
    assert all(key.startswith("diffusion_model.blocks.") for key in trunk)
    merged = tiny_denoiser()
    merge(merged, trunk, "diffusion_model.")
    merge(merged, audio, "")
    torch.testing.assert_close(velocity(merged, batch), velocity(trained, batch))
    assert not torch.allclose(velocity(tiny_denoiser(), batch), velocity(trained, batch), atol=0.1)


@pytest.mark.parametrize("target", ["comfyui", "diffusers"])
def test_audio_goes_to_a_file_of_its_own(adapter: Path, target: str, tmp_path: Path) -> None:
    exported, trunk = export(adapter, target, tmp_path)
    audio = load_file(exported.files[1])
    ours = load_file(adapter)
    assert exported.files[1].name == "ann_audio.safetensors"
    assert set(exported.matched) == set(trunk)
    assert len(trunk) + len(audio) == len(ours)
    assert not any("audio" in key for key in trunk)
    assert all(key.startswith("diffusion_model.") and "audio" in key for key in audio)
    assert set(exported.unmatched) == {name for name in ours if "audio" in name}
    assert all("ann_audio.safetensors" in reason for reason in exported.unmatched.values())


@pytest.mark.parametrize(("target", "alpha"), [("diffusers", 8.0), ("comfyui", 4.0)])
def test_three_dialects_of_metadata(
    adapter: Path, target: str, alpha: float, tmp_path: Path
) -> None:
    exported, _ = export(adapter, target, tmp_path)
    found = header(exported.files[0])
    assert found["ss_network_dim"] == "4"
    assert float(found["ss_network_alpha"]) == alpha
    assert found["ss_steps"] == "40"
    assert found["ss_max_train_steps"] == "50"
    assert found["ss_discrete_flow_shift"] == "7.0"
    assert found["modelspec.sai_model_spec"] == "1.0.0"
    assert found["modelspec.architecture"] == "wan2.1/lora"
    assert found["modelspec.title"] == found["ss_output_name"] == "ann"
    facts = json.loads(found["lora_adapter_metadata"])
    assert facts["transformer.r"] == 4
    assert facts["transformer.lora_alpha"] == alpha
    assert "blocks.0.attn1.to_q" in facts["transformer.target_modules"]
    assert not any("audio" in layer for layer in facts["transformer.target_modules"])


def test_an_adapter_of_audio_alone_is_one_file(tiny_denoiser: MakeWan, tmp_path: Path) -> None:
    denoiser, path = tiny_denoiser(), tmp_path / "adapter.safetensors"
    Lora(parts=[], train_fully=["audio"]).inject(denoiser, seed=0)
    info = AdapterInfo("bob", "wan", "lora", (), ("audio",), 1, RECIPE)
    write_adapter(path, trained_parameters(denoiser), info)
    exported, tensors = export(path, "comfyui", tmp_path / "out")
    assert [file.name for file in exported.files] == ["bob_audio.safetensors"]
    assert exported.matched == ()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, dict(denoiser.named_parameters())[our_name(key) or ""])


@pytest.mark.parametrize("is_adapter", [True, False])
def test_nothing_is_written_on_an_error(adapter: Path, tmp_path: Path, is_adapter: bool) -> None:
    out = tmp_path / "out"
    source = adapter if is_adapter else tmp_path / "nowhere.safetensors"
    target = "difusers" if is_adapter else "diffusers"
    message = "did you mean 'diffusers'" if is_adapter else "no file"
    with pytest.raises(InputError, match=message):
        export_adapter(source, target, out, public_name)
    assert not out.exists()


def test_a_fully_trained_denoiser_becomes_a_base(
    tiny_denoiser: MakeWan, batch: Batch, tmp_path: Path
) -> None:
    denoiser = tiny_denoiser()
    Full(start=0.5).inject(denoiser, seed=0)
    for parameter in denoiser.parameters():
        parameter.data = parameter.half().float()
    info = AdapterInfo("ann", "wan", "lora", (), ("all",), 9, RECIPE)
    write_adapter(tmp_path / "all.safetensors", trained_parameters(denoiser), info)
    shutil.copytree(TINY_BASE, tmp_path / "base")
    export_adapter(tmp_path / "all.safetensors", "base", tmp_path / "base", public_name)
    loaded = WanBase(path=str(tmp_path / "base"), random_weights=1, dtype="float32")
    again = loaded.load_denoiser(torch.device("cpu"))
    sigma = torch.full((len(batch.keys),), 0.5)
    with torch.no_grad():
        expected = denoiser(batch.latents, sigma, batch.conditions)
        assert torch.equal(again(batch.latents, sigma, batch.conditions), expected)


def test_an_adapter_is_no_base(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only a fully trained denoiser is a base"):
        export_adapter(adapter, "base", tmp_path, public_name)
