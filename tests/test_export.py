"""Exported adapters do in other programs what they do here."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from ruamel.yaml import YAML
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from kit.adapters.consumers import UNSUPPORTED
from kit.adapters.export import FORMATS, NATIVE_NAMES, scaled_layers
from kit.adapters.files import AdapterInfo, load_adapter, write_adapter
from kit.adapters.full import Full
from kit.adapters.hub import _front_matter
from kit.adapters.kinds import KINDS
from kit.adapters.lora import Lora, adapter_tensors, apply_adapter, trained_parameters
from kit.adapters.merged import write_shards
from kit.adapters.metadata import recipe_of
from kit.batch import Batch
from kit.cli import main
from kit.draws import draw_normal
from kit.errors import InputError
from kit.models.deltas import product
from kit.models.keys import our_name, public_name
from kit.models.wan import Wan
from kit.models.wan_base import WanBase
from kit.run.export import Settings, export
from tests.originals import draw_states, write_original

MakeWan = Callable[[], Wan]
SEED = 4
TINY_BASE = Path(__file__).parents[1] / "data" / "tiny_base"
RECIPE = """
seed: 3
base: {{type: wan, path: {wan}, audio_weights: {wan}/infinitetalk.safetensors, dtype: float32}}
adapter: {{type: lora, kind: {kind}}}
objective: {{type: flow_matching, sigma: uniform, shift: 7.0}}
optimizer: {{type: adamw, lr: 0.0001}}
trainer: {{max_steps: 50, accumulate: 2, precision: bf16-mixed}}
"""
FLOAT32 = Settings(dtype="float32")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in Wan2.1's own layout."""
    return write_original(tmp_path_factory.mktemp("wan"), draw_states(SEED))


@pytest.fixture(scope="module")
def make_denoiser(wan: Path) -> MakeWan:
    def load() -> Wan:
        audio = str(wan / "infinitetalk.safetensors")
        denoiser = WanBase(path=str(wan), audio_weights=audio, dtype="float32").load_denoiser(CPU)
        assert isinstance(denoiser, Wan)
        return denoiser

    return load


def train(denoiser: Wan, path: Path, wan: Path, **options: Any) -> Path:
    """Move all that would train, and write it as a run would."""
    path.parent.mkdir(exist_ok=True)
    lora = Lora(**options)
    lora.inject(denoiser, seed=0)
    with torch.no_grad():
        for name, parameter in trained_parameters(denoiser).items():
            parameter.add_(0.1 * draw_normal(tuple(parameter.shape), name))
    recipe = RECIPE.format(wan=wan, kind=lora.kind)
    info = AdapterInfo("ann", "wan", lora.kind, lora.parts, lora.train_fully, 40, recipe)
    write_adapter(path, adapter_tensors(denoiser, trained_parameters(denoiser), lora.kind), info)
    return path


@pytest.fixture(scope="module")
def trained(make_denoiser: MakeWan) -> Wan:
    """A denoiser with moved factors on trunk and audio; alpha is not the rank."""
    return make_denoiser()


@pytest.fixture(scope="module")
def adapter(trained: Wan, wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "adapter.safetensors"
    return train(trained, path, wan, rank=4, alpha=8.0, ranks={"ffn": 2})


def write(adapter: Path, target: str, out: Path, settings: Settings = FLOAT32) -> list[Path]:
    return export(adapter, [target], out, no_report, settings=settings)


def no_report(line: str) -> None:
    """Tell nobody."""


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


def test_diffusers_loads_it_and_computes_the_same(
    trained: Wan, make_denoiser: MakeWan, adapter: Path, batch: Batch, tmp_path: Path
) -> None:
    state = make_denoiser().transformer.state_dict()
    network = WanTransformer3DModel.from_config(dict(trained.transformer.config)).eval()
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    write(adapter, "diffusers", tmp_path)
    folder = tmp_path / "diffusers"
    tensors, facts = WanPipeline.lora_state_dict(folder, return_lora_metadata=True)
    before = diffusers_velocity(network, batch)
    network.load_lora_adapter(tensors, prefix="transformer", metadata=facts)
    after = diffusers_velocity(network, batch)
    expected = velocity(without_audio(trained), batch)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert (after - before).norm() > 0.1 * before.norm()


@pytest.mark.parametrize("target", ["comfyui", "kohya"])
def test_merged_by_public_names_it_computes_the_same(
    trained: Wan,
    make_denoiser: MakeWan,
    adapter: Path,
    batch: Batch,
    tmp_path: Path,
    target: str,
) -> None:
    file, audio = write(adapter, target, tmp_path)
    merged = make_denoiser()
    merge(merged, load_file(file))
    with torch.no_grad():
        for key, value in load_file(audio).items():
            dict(merged.named_parameters())[our_name(key) or key].copy_(value)
    torch.testing.assert_close(
        velocity(merged, batch), velocity(trained, batch), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(velocity(make_denoiser(), batch), velocity(trained, batch), atol=0.1)


def merge(denoiser: Wan, exported: dict[str, Tensor]) -> None:
    """Add alpha / rank * up @ down to the weights, by public names alone, as other programs do."""
    weights = {}
    for name, parameter in denoiser.named_parameters():
        public = public_name(name.removesuffix(".weight")) or ""
        weights[f"diffusion_model.{public}"] = parameter
        weights[f"lora_unet_{public.replace('.', '_')}"] = parameter
    with torch.no_grad():
        for key in (key for key in exported if key.endswith(".lora_up.weight")):
            layer = key.removesuffix(".lora_up.weight")
            down, alpha = exported[f"{layer}.lora_down.weight"], exported[f"{layer}.alpha"]
            weights[layer].add_(exported[key] @ down, alpha=alpha.item() / len(down))


@pytest.mark.parametrize("target", ["comfyui", "diffusers", "kohya", "peft"])
def test_audio_is_merged_into_a_file_of_its_own(
    adapter: Path, wan: Path, target: str, tmp_path: Path
) -> None:
    *_, trunk, audio = write(adapter, target, tmp_path)
    assert audio == tmp_path / "ann_infinitetalk.safetensors"
    assert not any("audio" in key for key in load_file(trunk))
    base, merged = load_file(wan / "infinitetalk.safetensors"), load_file(audio)
    assert {key: value.shape for key, value in merged.items()} == {
        key: value.shape for key, value in base.items()
    }
    changed = {key for key in base if not torch.equal(base[key], merged[key])}
    assert changed == {key for key in base if key.endswith("weight") and "norm" not in key}
    (alone,) = [
        path
        for path in write(adapter, target, tmp_path / "alone", Settings(with_audio=False))
        if path.suffix == ".safetensors"
    ]
    assert alone.parent.name == target


@pytest.mark.parametrize("target", ["comfyui", "diffusers", "kohya"])
def test_three_dialects_of_metadata(adapter: Path, target: str, tmp_path: Path) -> None:
    settings = Settings(dtype="float16", trigger="ann", with_audio=False)
    (file,) = write(adapter, target, tmp_path, settings)
    found = header(file)
    assert {t.dtype for k, t in load_file(file).items() if "alpha" not in k} == {torch.float16}
    assert found["ss_network_dim"] == found["ss_network_alpha"] == "Dynamic"
    assert found["ss_steps"] == "40"
    assert found["ss_max_train_steps"] == "50"
    assert found["ss_discrete_flow_shift"] == "7.0"
    assert found["modelspec.sai_model_spec"] == "1.0.0"
    assert found["modelspec.architecture"] == "wan2.1/lora"
    assert found["modelspec.title"] == found["ss_output_name"] == "ann"
    assert found["modelspec.trigger_phrase"] == "ann"
    facts = json.loads(found["lora_adapter_metadata"])
    assert facts["transformer.r"] == facts["transformer.lora_alpha"] == 4
    assert facts["transformer.rank_pattern"]["blocks.0.ffn.net.2"] == 2
    assert "blocks.0.attn1.to_q" in facts["transformer.target_modules"]
    assert not any("audio" in layer for layer in facts["transformer.target_modules"])
    assert not any(str(adapter.parent) in value for value in found.values())


@pytest.mark.parametrize("fully", [True, False])
def test_an_adapter_of_audio_alone_is_one_file(
    make_denoiser: MakeWan, wan: Path, tmp_path: Path, fully: bool
) -> None:
    denoiser = make_denoiser()
    parts = {"parts": [], "train_fully": ["audio"]} if fully else {"parts": ["audio"]}
    path = train(denoiser, tmp_path / "adapter.safetensors", wan, rank=4, **parts)
    (file,) = write(path, "comfyui", tmp_path / "out")
    assert file.name == "ann_infinitetalk.safetensors"
    places = {name.replace(".base_layer.", "."): p for name, p in denoiser.named_parameters()}
    for key, tensor in load_file(file).items():
        if fully:
            assert torch.equal(tensor, places[our_name(key) or key])


@pytest.mark.parametrize(
    ("target", "words"),
    [("difusers", "did you mean 'diffusers'"), ("comfyui", "dora does something else there")],
)
def test_nothing_is_written_on_an_error(
    make_denoiser: MakeWan, wan: Path, tmp_path: Path, target: str, words: str
) -> None:
    path = train(make_denoiser(), tmp_path / "a.safetensors", wan, kind="dora", rank=2)
    with pytest.raises(InputError, match=words):
        export(path, ["peft", target], tmp_path / "out", no_report)
    with pytest.raises(InputError, match="no file"):
        export(tmp_path / "nowhere.safetensors", ["peft"], tmp_path / "out", no_report)
    assert not (tmp_path / "out").exists()


def test_an_absent_base_is_named(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="base.path: there is no folder 'gone'") as caught:
        export(adapter, ["comfyui"], tmp_path / "out", no_report, overrides=["base.path=gone"])
    assert "--without-audio" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["base", "wan"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_into_its_base_it_computes_the_same(
    make_denoiser: MakeWan, wan: Path, batch: Batch, tmp_path: Path, target: str, kind: str
) -> None:
    denoiser = make_denoiser()
    path = train(denoiser, tmp_path / "a.safetensors", wan, kind=kind, rank=2)
    write(path, target, tmp_path / "out")
    merged = tmp_path / "out" / target
    audio = str(merged / "infinitetalk.safetensors") if target == "wan" else None
    base = WanBase(path=str(merged), audio_weights=audio, dtype="float32")
    assert base.problems(encoders=False) == []
    again = base.load_denoiser(CPU)
    assert isinstance(again, Wan)
    torch.testing.assert_close(
        velocity(again, batch), velocity(denoiser, batch), rtol=1e-4, atol=1e-4
    )


def test_diffusers_opens_the_merged_transformer(
    make_denoiser: MakeWan, wan: Path, tmp_path: Path
) -> None:
    path = train(make_denoiser(), tmp_path / "a.safetensors", wan, rank=2)
    write(path, "base", tmp_path)
    network = WanTransformer3DModel.from_pretrained(tmp_path / "base" / "transformer")
    assert network.config.num_layers == 2


def test_large_bases_are_written_in_shards(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.full((100,), float(n)) for n in range(5)}
    *files, index = write_shards(iter(tensors.items()), tmp_path, limit=900)
    assert [file.name[-19:] for file in files] == [
        f"0000{n}-of-00003.safetensors"[-19:] for n in (1, 2, 3)
    ]
    facts = json.loads(index.read_text())
    assert facts["metadata"]["total_size"] == 2000
    for name, file in facts["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    assert len(facts["weight_map"]) == 5
    # A smaller one leaves nothing of the larger.
    write_shards(iter({"t": torch.zeros(2)}.items()), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["diffusion_pytorch_model.safetensors"]


def test_a_fully_trained_denoiser_becomes_a_base(
    tiny_denoiser: MakeWan, batch: Batch, tmp_path: Path
) -> None:
    denoiser = tiny_denoiser()
    Full(start=0.5).inject(denoiser, seed=0)
    for parameter in denoiser.parameters():
        parameter.data = parameter.half().float()
    recipe = RECIPE.format(wan="gone", kind="lora")
    info = AdapterInfo("ann", "wan", "lora", (), ("all",), 9, recipe)
    write_adapter(tmp_path / "all.safetensors", trained_parameters(denoiser), info)
    shutil.copytree(TINY_BASE, tmp_path / "base")
    write(tmp_path / "all.safetensors", "base", tmp_path, Settings(dtype="float16"))
    loaded = WanBase(path=str(tmp_path / "base"), random_weights=1, dtype="float32")
    again = loaded.load_denoiser(CPU)
    sigma = torch.full((len(batch.keys),), 0.5)
    with torch.no_grad():
        expected = denoiser(batch.latents, sigma, batch.conditions)
        assert torch.equal(again(batch.latents, sigma, batch.conditions), expected)
    with pytest.raises(InputError, match="this adapter trained all fully"):
        write(tmp_path / "all.safetensors", "comfyui", tmp_path)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_resized_factors_are_the_nearest_there_are(
    make_denoiser: MakeWan, wan: Path, tmp_path: Path, kind: str
) -> None:
    path = train(make_denoiser(), tmp_path / "a.safetensors", wan, kind=kind, rank=4, alpha=2.0)
    (file,) = write(path, "kit", tmp_path, Settings(dtype="float32", rank=3))
    small, info = load_adapter(file)
    assert info.kind == "lora"
    tensors, _ = load_adapter(path)
    for layer, factors in scaled_layers(tensors, kind).items():
        change = product(
            {NATIVE_NAMES.get(n, n).removesuffix(".weight"): t for n, t in factors.items()}
        )
        up, down = small[f"{layer}.lora_B.weight"], small[f"{layer}.lora_A.weight"]
        assert down.shape[0] <= 3
        lost = torch.linalg.svdvals(change)[len(down) :].norm()
        torch.testing.assert_close((up @ down - change).norm(), lost, rtol=1e-2, atol=1e-4)
    fresh = make_denoiser()
    apply_adapter(fresh, small, "lora")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_programs_read_what_was_trained(
    make_denoiser: MakeWan, wan: Path, tmp_path: Path, kind: str, dtype: Any
) -> None:
    path = train(make_denoiser(), tmp_path / "a.safetensors", wan, kind=kind, rank=2, alpha=3.0)
    formats = [name for name in FORMATS if (kind, name) not in UNSUPPORTED]
    said: list[str] = []
    settings = Settings(dtype=dtype, with_audio=False, verify=True)
    export(path, formats, tmp_path, said.append, settings=settings)
    summaries = [line for line in said if " reads it: " in line]
    assert len(summaries) == len(formats) >= 2
    assert all("24 layers matched, 0 missing, 0 keys unknown" in line for line in summaries)


def test_what_was_resized_is_verified(
    make_denoiser: MakeWan, wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = train(make_denoiser(), tmp_path / "a.safetensors", wan, kind="loha", rank=2)
    words = ["--to", "diffusers,kit", "--rank", "3", "--verify", "--without-audio"]
    assert main(["export", str(path), *words, "--out", str(tmp_path)]) == 0
    assert "as diffusers reads it: 24 layers matched" in capsys.readouterr().out
    assert main(["export", str(path), "--to", "diffusers", "--verify"]) == 2
    assert "--rank makes plain factors of it" in capsys.readouterr().err


def test_a_folder_for_the_hub(
    make_denoiser: MakeWan, wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = train(make_denoiser(), tmp_path / "run" / "adapter.safetensors", wan, rank=2)
    (tmp_path / "run/previews").mkdir()
    for step in range(6):
        (tmp_path / f"run/previews/step-{step:08d}.mp4").write_bytes(b"video")
    assert main(["export", str(path), "--to", "hub", "--trigger", "ann"]) == 0
    folder = tmp_path / "run" / "hub"
    assert sorted(file.name for file in folder.glob("*")) == [
        "README.md",
        "ann_comfyui.safetensors",
        "ann_infinitetalk.safetensors",
        "previews",
        "pytorch_lora_weights.safetensors",
    ]
    card = (folder / "README.md").read_text()
    _, matter, text = card.split("---\n")
    facts = YAML(typ="safe").load(matter)
    assert facts["license"] == "apache-2.0"
    assert facts["instance_prompt"] == "ann"
    assert facts["widget"][-1]["output"]["url"] == "previews/step-00000005.mp4"
    assert len(facts["widget"]) == len(list((folder / "previews").iterdir())) == 4
    assert "base_model" not in facts  # a folder of one's own is no public base
    assert all(file.name in text for file in folder.glob("*.safetensors"))
    assert str(tmp_path) not in card


def test_public_bases_are_named() -> None:
    recipe = RECIPE.format(wan="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers@main", kind="lora")
    info = AdapterInfo("ann", "wan", "lora", ("ffn",), (), 40, recipe)
    facts = _front_matter(info, recipe_of(info), [], "", [])
    assert facts["base_model"] == "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
    assert facts["base_model_relation"] == "adapter"


@pytest.mark.parametrize(
    ("options", "words", "message"),
    [
        ({}, ["--to", ""], "--to: name at least one of diffusers, comfyui"),
        (
            {"parts": [], "train_fully": ["audio"]},
            ["--to", "kit", "--rank", "2"],
            "--rank: this adapter has no factors",
        ),
        ({}, ["--to", "base", "--rank", "2"], "--rank: has no meaning for base here"),
        ({"kind": "dora"}, ["--to", "kit", "--rank", "2"], "the change of a dora depends on its"),
        (
            {"parts": ["ffn"], "train_fully": ["attention"]},
            ["--to", "comfyui", "--verify"],
            "this adapter trained attention fully; take --to base, then kit extract",
        ),
        (
            {"parts": ["audio"]},
            ["--to", "comfyui", "--without-audio"],
            "nothing to write; the adapter changes audio modules alone",
        ),
        ({}, ["--to", "comfyui", "--verify", "base.path=gone"], "there is no folder 'gone'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    make_denoiser: MakeWan,
    wan: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    words: list[str],
    message: str,
) -> None:
    path = train(make_denoiser(), tmp_path / "a.safetensors", wan, **{"rank": 4, **options})
    assert main(["export", str(path), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ranks_are_positive(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in ("0", "-1"):
        with pytest.raises(SystemExit):
            main(["export", "a.safetensors", "--to", "kit", f"--rank={rank}"])
        assert f"{rank} is less than 1" in capsys.readouterr().err


def test_what_a_smaller_rank_loses_is_told_and_audio_is_merged_whole(
    make_denoiser: MakeWan, wan: Path, tmp_path: Path
) -> None:
    path = train(make_denoiser(), tmp_path / "a.safetensors", wan, rank=4)
    said: list[str] = []
    for rank in (None, 1):
        settings = Settings(dtype="float32", rank=rank)
        export(path, ["comfyui"], tmp_path / str(rank), said.append, settings=settings)
    assert any("rank 1: " in line and "is lost, the worst" in line for line in said)
    whole, small = (
        load_file(tmp_path / name / "ann_infinitetalk.safetensors") for name in ("None", "1")
    )
    assert all(torch.equal(whole[key], small[key]) for key in whole)


def test_an_adapter_on_top_of_another_says_so(
    make_denoiser: MakeWan, wan: Path, tmp_path: Path
) -> None:
    first = train(make_denoiser(), tmp_path / "first.safetensors", wan, rank=2)
    second = train(make_denoiser(), tmp_path / "second.safetensors", wan, rank=2)
    tensors, info = load_adapter(second)
    on_top = info.recipe.replace("dtype: float32", f"dtype: float32, loras: [{{file: {first}}}]")
    write_adapter(second, tensors, replace(info, recipe=on_top))
    said: list[str] = []
    export(second, ["kohya"], tmp_path / "out", said.append, settings=Settings(with_audio=False))
    assert said[-1] == "trained on top of first.safetensors: load that as well"
