"""Adapter files merged while the denoiser is read: every kind and dialect, and nothing lost."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from kit.draws import draw_normal
from kit.errors import InputError
from kit.models.audio import AudioSizes
from kit.models.inspection import survey_file
from kit.models.keys import public_name
from kit.models.lora_files import LoraFile, match_lora
from kit.models.wan import Wan
from kit.models.wan_base import WanBase

TINY_BASE = Path(__file__).parents[1] / "data" / "tiny_base"
STUDIO_WEIGHTS = TINY_BASE.parent / "studio_base/transformer/diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")
PUBLIC_14B = {"in_channels": 36, "out_channels": 16, "image_dim": 1280, "added_kv_proj_dim": 5120}
RANK = 3

State = dict[str, Tensor]

LAYERS = {
    "transformer.blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "transformer.blocks.1.attn2.add_k_proj": "blocks.1.cross_attn.k_img",
    "transformer.blocks.1.ffn.net.0.proj": "blocks.1.ffn.0",
    "transformer.condition_embedder.time_proj": "time_projection.1",
    "transformer.blocks.0.audio_cross_attn.kv_linear": "blocks.0.audio_cross_attn.kv_linear",
    "audio_proj.proj1_vf": "audio_proj.proj1_vf",
}
"""Some layers by our names and by the public ones."""


def diffusers_name(ours: str) -> str:
    return ours.removeprefix("transformer.")


DIALECTS: dict[str, Callable[[str, str], tuple[str, str]]] = {
    "kohya": lambda ours, public: (
        f"diffusion_model.{public}.lora_down.weight",
        f"diffusion_model.{public}.lora_up.weight",
    ),
    "ai-toolkit": lambda ours, public: (
        f"diffusion_model.{public}.lora_A.weight",
        f"diffusion_model.{public}.lora_B.weight",
    ),
    "musubi": lambda ours, public: (
        f"lora_unet_{public.replace('.', '_')}.lora_down.weight",
        f"lora_unet_{public.replace('.', '_')}.lora_up.weight",
    ),
    "VideoX-Fun": lambda ours, public: (
        f"lora_unet__{public.replace('.', '_')}.lora_down.weight",
        f"lora_unet__{public.replace('.', '_')}.lora_up.weight",
    ),
    "diffusers": lambda ours, public: (
        f"transformer.{diffusers_name(ours)}.lora_A.weight",
        f"transformer.{diffusers_name(ours)}.lora_B.weight",
    ),
    "peft": lambda ours, public: (
        f"transformer.{diffusers_name(ours)}.lora_A.default.weight",
        f"transformer.{diffusers_name(ours)}.lora_B.default.weight",
    ),
    "DiffSynth": lambda ours, public: (
        f"{public}.lora_A.default.weight",
        f"{public}.lora_B.default.weight",
    ),
    "former diffusers": lambda ours, public: (
        f"{public}_lora.down.weight",
        f"{public}_lora.up.weight",
    ),
    "dotted": lambda ours, public: (f"{public}.lora.down.weight", f"{public}.lora.up.weight"),
    "transformers": lambda ours, public: (
        f"{public}.lora_linear_layer.down.weight",
        f"{public}.lora_linear_layer.up.weight",
    ),
    "without weight": lambda ours, public: (f"{public}.lora_A", f"{public}.lora_B"),
}
"""Keys of a layer's two factors, in the words of each program."""


@pytest.fixture(scope="module")
def drawn() -> State:
    """A tiny denoiser's weights under our names."""
    base = WanBase(path=str(TINY_BASE), random_weights=5, dtype="float32")
    return dict(base.load_denoiser(CPU).state_dict())


@pytest.fixture
def folder(tmp_path: Path, drawn: State) -> Path:
    """A base folder with the denoiser alone."""
    for name in ("transformer", "audio"):
        (tmp_path / name).mkdir()
        config = (TINY_BASE / name / "config.json").read_text()
        (tmp_path / name / "config.json").write_text(config)
    public = {public_name(name) or name: value for name, value in drawn.items()}
    save_file(public, tmp_path / "dit.safetensors")
    return tmp_path


def base_with(folder: Path, *loras: LoraFile, **options: Any) -> WanBase:
    file = str(folder / "dit.safetensors")
    settings = {"transformer": file, "dtype": "float32", **options}
    return WanBase(path=str(folder), loras=loras, **settings)


def factors(drawn: State, ours: str) -> tuple[Tensor, Tensor]:
    outputs, inputs = drawn[f"{ours}.weight"].flatten(1).shape
    return draw_normal((RANK, inputs), 1, ours), draw_normal((outputs, RANK), 2, ours)


def written(file: Path, tensors: Mapping[str, Tensor], **header: str) -> str:
    save_file(dict(tensors), file, metadata=header or None)
    return str(file)


def assert_changed(base: WanBase, drawn: State, changes: Mapping[str, Tensor]) -> None:
    """Compare with sums that were made directly; what is not named must be as it was."""
    for name, value in base.load_denoiser(CPU).state_dict().items():
        if name in changes:
            torch.testing.assert_close(value, drawn[name] + changes[name], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(value, drawn[name]), name


@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_adds_its_product(
    folder: Path, drawn: State, dialect: str, alpha: float | None
) -> None:
    tensors: State = {}
    changes: State = {}
    for ours, public in LAYERS.items():
        down, up = factors(drawn, ours)
        down_key, up_key = DIALECTS[dialect](ours, public)
        tensors |= {down_key: down, up_key: up}
        if alpha is not None:
            layer = down_key.split(".lora_")[0].removesuffix(".lora.down.weight")
            tensors[f"{layer.removesuffix('_lora.down.weight')}.alpha"] = torch.tensor(alpha)
        scale = 0.7 * (1 if alpha is None else alpha / RANK)
        changes[f"{ours}.weight"] = scale * (up @ down)
    file = written(folder / "lora.safetensors", tensors)
    base = base_with(folder, LoraFile(file, strength=0.7))
    assert base_problems(base) == []
    assert_changed(base, drawn, changes)


def base_problems(base: WanBase) -> list[str]:
    """Give the problems of LoRA files; the folder holds no encoders."""
    return [line for match in base._matches for line in match.problems()]


def test_differences_and_convolutions_as_distilled_models_have_them(
    folder: Path, drawn: State
) -> None:
    block, theirs = "transformer.blocks.0", "diffusion_model.blocks.0"
    patch = "transformer.patch_embedding.weight"
    down, up = factors(drawn, "transformer.patch_embedding")
    names = {
        f"{theirs}.diff_m": f"{block}.scale_shift_table",
        f"{theirs}.norm3.diff": f"{block}.norm2.weight",
        f"{theirs}.norm3.diff_b": f"{block}.norm2.bias",
        f"{theirs}.cross_attn.norm_k_img.diff": f"{block}.attn2.norm_added_k.weight",
        f"{theirs}.self_attn.q.diff_b": f"{block}.attn1.to_q.bias",
        "diffusion_model.head.diff_m": "transformer.scale_shift_table",
        "diffusion_model.head.head.diff": "transformer.proj_out.weight",
        "diffusion_model.img_emb.proj.0.diff": (
            "transformer.condition_embedder.image_embedder.norm1.weight"
        ),
    }
    differences = {
        key: draw_normal(tuple(drawn[ours].shape), 3, key) for key, ours in names.items()
    }
    convolution = {
        "diffusion_model.patch_embedding.lora_down.weight": down.reshape(RANK, 36, 1, 2, 2),
        "diffusion_model.patch_embedding.lora_up.weight": up.reshape(-1, RANK, 1, 1, 1),
    }
    file = written(folder / "lora.safetensors", differences | convolution)
    changes = {ours: differences[key] for key, ours in names.items()}
    changes[patch] = (up @ down).reshape(drawn[patch].shape)
    assert_changed(base_with(folder, LoraFile(file)), drawn, changes)


def test_several_files_add_up(folder: Path, drawn: State) -> None:
    ours = "transformer.blocks.0.attn1.to_q"
    down, up = factors(drawn, ours)
    pair = dict(zip(DIALECTS["kohya"](ours, LAYERS[ours]), (down, up), strict=True))
    diff = {"diffusion_model.blocks.0.self_attn.q.diff": torch.ones(48, 48)}
    one = written(folder / "one.safetensors", pair | diff)
    two = written(folder / "two.safetensors", pair)
    base = base_with(folder, LoraFile(one, strength=0.5), LoraFile(two, strength=-2.0))
    change = 0.5 * (up @ down) + 0.5 - 2 * (up @ down)
    assert_changed(base, drawn, {f"{ours}.weight": change})


def test_alpha_stated_once_for_all_is_honoured(folder: Path, drawn: State) -> None:
    """As diffusers and `kit export --to diffusers` write it."""
    ours = "transformer.blocks.0.attn1.to_q"
    down, up = factors(drawn, ours)
    pair = dict(zip(DIALECTS["diffusers"](ours, LAYERS[ours]), (down, up), strict=True))
    settings = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 6})
    file = written(folder / "lora.safetensors", pair, lora_adapter_metadata=settings)
    change = {f"{ours}.weight": 6 / RANK * (up @ down)}
    assert_changed(base_with(folder, LoraFile(file)), drawn, change)


LAYER = "transformer.blocks.0.attn1.to_q"
KINDS: dict[str, dict[str, tuple[int, ...]]] = {
    "LoRA": {"lora_A.weight": (RANK, 48), "lora_B.weight": (48, RANK)},
    "LoHa": {
        "hada_w1_a": (48, RANK),
        "hada_w1_b": (RANK, 48),
        "hada_w2_a": (48, RANK),
        "hada_w2_b": (RANK, 48),
    },
    "LoKr": {"lokr_w1": (4, 6), "lokr_w2_a": (12, RANK), "lokr_w2_b": (RANK, 8)},
    "LoKr of factored sides": {
        "lokr_w1_a": (6, RANK),
        "lokr_w1_b": (RANK, 4),
        "lokr_w2_a": (8, RANK),
        "lokr_w2_b": (RANK, 12),
    },
    "LoKr of whole sides": {"lokr_w1": (6, 6), "lokr_w2": (8, 8)},
}
"""Shapes of the factors of a layer from 48 to 48, by PEFT's names."""


def side(factors: State, name: str) -> Tensor:
    return factors[name] if name in factors else factors[f"{name}_a"] @ factors[f"{name}_b"]


PRODUCTS: dict[str, Callable[[State], Tensor]] = {
    "LoRA": lambda factors: factors["lora_B.weight"] @ factors["lora_A.weight"],
    "LoHa": lambda factors: side(factors, "hada_w1") * side(factors, "hada_w2"),
    "LoKr": lambda factors: torch.einsum(
        "ij,kl->ikjl", side(factors, "lokr_w1"), side(factors, "lokr_w2")
    ).reshape(48, 48),
}
"""The formulas of the papers."""


def kohya_name(name: str) -> str:
    renamed = name.replace("lora_A.", "lora_down.").replace("lora_B.", "lora_up.")
    return renamed.replace("lora_magnitude_vector", "dora_scale")


WRITERS: dict[str, Callable[[str], str]] = {
    "ours": lambda name: f"{LAYER}.{name}",
    "peft": lambda name: f"base_model.model.blocks.0.attn1.to_q.{name}",
    "native": lambda name: f"diffusion_model.blocks.0.self_attn.q.{kohya_name(name)}",
    "kohya": lambda name: f"lora_unet_blocks_0_self_attn_q.{kohya_name(name)}",
    "LyCORIS": lambda name: f"lycoris_blocks_0_attn1_to_q.{kohya_name(name)}",
}
"""The key of a layer's tensor, in the words of each program."""


@pytest.mark.parametrize("magnitude_shape", [None, (48,), (48, 1), (1, 48)])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_merges_by_its_formula(
    folder: Path, drawn: State, kind: str, writer: str, magnitude_shape: tuple[int, ...] | None
) -> None:
    weight = drawn[f"{LAYER}.weight"]
    tensors = {name: draw_normal(shape, 4, name) for name, shape in KINDS[kind].items()}
    # Files do not tell the rank of whole sides, so that nobody scales them.
    scale = 1 if "whole" in kind else 1.5 / RANK
    changed = weight + scale * PRODUCTS[kind[:4]](tensors)
    tensors["alpha"] = torch.tensor(1.5)
    if magnitude_shape is not None:
        magnitude = 1 + draw_normal((48,), 4, "magnitude").abs()
        tensors["lora_magnitude_vector"] = magnitude.reshape(magnitude_shape)
        is_of_inputs = magnitude_shape[0] == 1
        norms = changed.norm(dim=0 if is_of_inputs else 1)
        factors = magnitude / norms
        changed = changed * (factors if is_of_inputs else factors[:, None])
    named = {WRITERS[writer](name): tensor for name, tensor in tensors.items()}
    base = base_with(folder, LoraFile(written(folder / "x.safetensors", named), strength=0.7))
    assert base_problems(base) == []
    assert_changed(base, drawn, {f"{LAYER}.weight": 0.7 * (changed - weight)})


CONFIGS: dict[str, PeftConfig] = {
    "LoRA": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["attn1.to_q", "ffn.net.2"],
        use_rslora=True,
        rank_pattern={"ffn.net.2": 2},
        alpha_pattern={"^blocks.1.ffn.net.2": 5},
    ),
    "DoRA": LoraConfig(r=4, lora_alpha=6, target_modules=["attn1.to_q"], use_dora=True),
    "LoHa": LoHaConfig(r=2, alpha=6, target_modules=["attn1.to_q", "add_k_proj"]),
    "LoKr": LoKrConfig(r=2, alpha=6, target_modules=["attn1.to_q"], decompose_factor=4),
    "LoKr of whole sides": LoKrConfig(r=64, alpha=6, target_modules=["attn1.to_q", "ffn.net.2"]),
}


@pytest.mark.parametrize("path", ["peft", "peft/adapter_model.safetensors"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_folders_of_peft_merge_as_peft_merges(
    folder: Path, drawn: State, config: PeftConfig, path: str
) -> None:
    net = base_with(folder).load_denoiser(CPU).transformer
    model: Any = get_peft_model(cast(Any, net), config)
    for name, parameter in model.named_parameters():
        if ".default" in name:
            parameter.data += 0.1 * draw_normal(tuple(parameter.shape), 5, name)
    model.save_pretrained(str(folder / "peft"))
    merged = model.merge_and_unload().state_dict()
    base = base_with(folder, LoraFile(str(folder / path)))
    assert base_problems(base) == []
    changes = {}
    for name, value in merged.items():
        ours = f"transformer.{name}"
        if not torch.equal(value, drawn[ours]):
            changes[ours] = value - drawn[ours]
    assert changes
    assert_changed(base, drawn, changes)


def test_recipes_name_folders_of_peft(folder: Path) -> None:
    (folder / "peft").mkdir()
    file = written(folder / "peft" / "adapter_model.safetensors", {"x.alpha": torch.ones(())})
    checked = TypeAdapter(LoraFile)
    assert checked.validate_python({"file": str(folder / "peft")}).file == file
    for wrong in (str(folder), 5):
        with pytest.raises(ValueError, match="file"):
            checked.validate_python({"file": wrong})


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_configuration_of_peft_is_told(folder: Path, text: str) -> None:
    written(folder / "adapter_model.safetensors", {"x.alpha": torch.ones(())})
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match="adapter_config.json' is no configuration of an adapter"):
        match_lora(LoraFile(str(folder)), {})


def test_adapters_of_this_kit_bring_whole_parameters(folder: Path, drawn: State) -> None:
    """Of parts that trained fully, beside factors."""
    down, up = factors(drawn, LAYER)
    names = ["audio_proj.proj1.weight", "transformer.blocks.1.norm_x.bias"]
    whole = {name: draw_normal(tuple(drawn[name].shape), 6, name) for name in names}
    pair = {f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}
    alpha = {f"{LAYER}.alpha": torch.tensor(6.0)}
    file = written(folder / "x.safetensors", pair | alpha | whole, charakit="{}")
    changes = {name: 0.25 * (value - drawn[name]) for name, value in whole.items()}
    changes[f"{LAYER}.weight"] = 0.25 * 6 / RANK * (up @ down)
    assert_changed(base_with(folder, LoraFile(file, strength=0.25)), drawn, changes)
    other = written(folder / "other.safetensors", pair | whole)
    (problem,) = base_problems(base_with(folder, LoraFile(other)))
    assert "2 of its 4 tensors have no place" in problem


def test_differences_and_whole_tensors_in_the_words_of_comfyui(folder: Path, drawn: State) -> None:
    block, theirs = "transformer.blocks.0", "diffusion_model.blocks.0"
    names = {
        f"{theirs}.modulation.diff": f"{block}.scale_shift_table",
        f"{theirs}.norm3.w_norm": f"{block}.norm2.weight",
        f"{theirs}.norm3.b_norm": f"{block}.norm2.bias",
        f"{theirs}.self_attn.q.set_weight": f"{block}.attn1.to_q.weight",
        f"{theirs}.self_attn.q.bias.set_weight": f"{block}.attn1.to_q.bias",
    }
    tensors = {key: draw_normal(tuple(drawn[ours].shape), 3, key) for key, ours in names.items()}
    changes = {
        ours: tensors[key] - (drawn[ours] if "set" in key else 0) for key, ours in names.items()
    }
    file = written(folder / "x.safetensors", tensors)
    assert_changed(base_with(folder, LoraFile(file)), drawn, changes)


INCOMPLETE: dict[str, dict[str, tuple[int, ...]]] = {
    "no complete set of factors": {
        "lora_down.weight": (RANK, 48),
        "lora_mid.weight": (RANK, RANK, 3, 3),
        "lora_up.weight": (48, RANK),
    },
    "magnitude [7] is none of [48, 48]": {
        "lora_down.weight": (RANK, 48),
        "lora_up.weight": (48, RANK),
        "dora_scale": (7,),
    },
    "factors [48, 3] and [3, 48] and [48, 3] and [3, 24] do not make [48, 48]": {
        **KINDS["LoHa"],
        "hada_w2_b": (RANK, 24),
    },
    "factors [6, 6] and [6, 6] do not make [48, 48]": {"lokr_w1": (6, 6), "lokr_w2": (6, 6)},
}


@pytest.mark.parametrize("reason", INCOMPLETE)
def test_a_layer_is_changed_by_all_of_its_tensors_or_by_none(
    folder: Path, drawn: State, reason: str
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in drawn.items()}
    tensors = {WRITERS["native"](n): torch.ones(shape) for n, shape in INCOMPLETE[reason].items()}
    match = match_lora(LoraFile(written(folder / "x.safetensors", tensors)), shapes)
    assert not match.changes
    assert match.unmatched == dict.fromkeys(tensors, reason)


def test_what_is_stated_twice_is_told(folder: Path, drawn: State) -> None:
    down, up = factors(drawn, LAYER)
    key = "diffusion_model.blocks.0.self_attn.q"
    pair = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    file = written(folder / "x.safetensors", pair | {f"{key}.lora_A.weight": down.clone()})
    (problem,) = base_problems(base_with(folder, LoraFile(file)))
    assert "1 of its 3 tensors have no place" in problem


def test_surveys_name_the_kind(folder: Path) -> None:
    tensors = {WRITERS["kohya"](n): torch.ones(shape) for n, shape in KINDS["LoHa"].items()}
    survey = survey_file(Path(written(folder / "x.safetensors", tensors)))
    expected = "4 tensors for 1 layers, LoHa, rank 3, without image layers, as for text-to-video"
    assert survey.lines == (expected,)


def test_an_alpha_beside_the_factors_wins_over_that_of_the_header(
    folder: Path, drawn: State
) -> None:
    down, up = factors(drawn, LAYER)
    pair = dict(zip(DIALECTS["kohya"](LAYER, LAYERS[LAYER]), (down, up), strict=True))
    alpha = {f"diffusion_model.{LAYERS[LAYER]}.alpha": torch.tensor(1.5)}
    settings = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 6})
    file = written(folder / "lora.safetensors", pair | alpha, lora_adapter_metadata=settings)
    change = {f"{LAYER}.weight": 1.5 / RANK * (up @ down)}
    assert_changed(base_with(folder, LoraFile(file)), drawn, change)


def test_files_merge_into_quantised_weights(folder: Path, drawn: State) -> None:
    ours = "transformer.blocks.0.attn1.to_q"
    public = {public_name(name) or name: value for name, value in drawn.items()}
    numbers = public[f"{LAYERS[ours]}.weight"].to(torch.float8_e4m3fn)
    public |= {f"{LAYERS[ours]}.weight": numbers, f"{LAYERS[ours]}.scale_weight": torch.tensor(2.0)}
    save_file(public, folder / "dit.safetensors")
    down, up = factors(drawn, ours)
    pair = dict(zip(DIALECTS["kohya"](ours, LAYERS[ours]), (down, up), strict=True))
    base = base_with(folder, LoraFile(written(folder / "lora.safetensors", pair)), dtype="bfloat16")
    merged = base.load_denoiser(CPU).get_parameter(f"{ours}.weight")
    expected = torch.addmm(2 * numbers.float(), up, down).bfloat16()
    assert torch.equal(merged, expected)


def test_text_to_video_files_fit_and_image_layers_stay(folder: Path, drawn: State) -> None:
    tensors: State = {}
    changes: State = {}
    for ours in (f"transformer.blocks.{i}.attn2.{x}" for i in (0, 1) for x in ("to_q", "to_k")):
        down, up = factors(drawn, ours)
        keys = DIALECTS["kohya"](ours, public_name(ours) or "")
        tensors |= dict(zip(keys, (down, up), strict=True))
        changes[f"{ours}.weight"] = up @ down
    file = written(folder / "t2v.safetensors", tensors)
    assert_changed(base_with(folder, LoraFile(file)), drawn, changes)
    survey = survey_file(Path(file))
    assert survey.heading == "a LoRA file"
    assert survey.lines == (
        "8 tensors for 4 layers, LoRA, rank 3, without image layers, as for text-to-video",
    )


UNMATCHED = {
    "diffusion_model.blocks.9.self_attn.q.lora_down.weight": "no such layer",
    "diffusion_model.blocks.0.self_attn.k.lora_up.weight": "no complete set of factors",
    "diffusion_model.patch_embedding.diff": "is [48, 16, 1, 2, 2], not [48, 36, 1, 2, 2]",
    "diffusion_model.blocks.0.self_attn.v.alpha": "alpha without factors",
    "diffusion_model.blocks.0.self_attn.o.oft_blocks": "not understood as part of an adapter",
}


@pytest.fixture
def partly_fitting(folder: Path, drawn: State) -> str:
    """A LoRA file of which some tensors have no place."""
    ours = "transformer.blocks.0.attn1.to_q"
    pair = dict(zip(DIALECTS["kohya"](ours, LAYERS[ours]), factors(drawn, ours), strict=True))
    others = {key: torch.ones(48, 3) for key in UNMATCHED}
    others["diffusion_model.patch_embedding.diff"] = torch.ones(48, 16, 1, 2, 2)
    others["diffusion_model.blocks.0.self_attn.v.alpha"] = torch.ones(())
    return written(folder / "other.safetensors", pair | others)


def test_what_has_no_place_is_an_error_that_lists_it(folder: Path, partly_fitting: str) -> None:
    base = base_with(folder, LoraFile(partly_fitting))
    with pytest.raises(InputError, match="5 of its 7 tensors have no place") as caught:
        base.load_denoiser(CPU)
    assert all(f"{key} ({reason})" in str(caught.value) for key, reason in UNMATCHED.items())


def test_what_has_no_place_can_be_left_out_and_is_told(
    folder: Path, drawn: State, partly_fitting: str
) -> None:
    base = base_with(folder, LoraFile(partly_fitting, unmatched="skip"))
    ours = "transformer.blocks.0.attn1.to_q"
    down, up = factors(drawn, ours)
    assert_changed(base, drawn, {f"{ours}.weight": up @ down})
    (note,) = base.notes()
    assert "2 of 7 tensors change 1 parameters, with strength 1; left out: " in note
    assert all(key in note for key in UNMATCHED)


def test_a_file_of_which_nothing_fits_is_always_an_error(folder: Path) -> None:
    file = written(
        folder / "flux.safetensors", {"double_blocks.0.lora_down.weight": torch.ones(3, 3)}
    )
    base = base_with(folder, LoraFile(file, unmatched="skip"))
    with pytest.raises(InputError, match="nothing in it has a place in this denoiser"):
        base.load_denoiser(CPU)


def test_recipes_name_files_strictly(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kit.cli import main

    recipe = str(Path(__file__).parents[1] / "tests/recipes/tiny_talk.yaml")
    file = written(folder / "lora.safetensors", {"x.lora_up.weight": torch.ones(3, 3)})
    assert main(["check", recipe, f"base.loras=[{{file: {file}, strenght: 2}}]"]) == 2
    assert "base.loras.0" in (said := capsys.readouterr().err) and "strength" in said
    assert main(["check", recipe, "base.loras=[{file: gone.safetensors}]"]) == 2
    assert "'gone.safetensors' does not exist" in capsys.readouterr().err


def test_recipes_merge_files_and_tell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the shipped studio base, whose denoiser is trained."""
    from kit.cli import main

    recipe = str(Path(__file__).parents[1] / "recipes/quickstart_talk.yaml")
    shape = load_file(STUDIO_WEIGHTS)["blocks.0.attn1.to_q.weight"].shape
    key = "diffusion_model.blocks.0.self_attn.q"
    pair = {
        f"{key}.lora_down.weight": torch.ones(1, shape[1]),
        f"{key}.lora_up.weight": torch.ones(shape[0], 1),
    }
    file = written(folder / "lora.safetensors", pair)
    words = [f"base.loras=[{{file: {file}, strength: 0.5}}]", "adapter=null"]
    assert main(["check", recipe, *words]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert f"base.loras: {file}: 2 of 2 tensors change 1 parameters, with strength 0.5" in said


def test_drawn_weights_take_no_files(folder: Path) -> None:
    file = written(folder / "lora.safetensors", {"x.lora_up.weight": torch.ones(3, 3)})
    base = WanBase(path=str(TINY_BASE), random_weights=1, loras=[LoraFile(file)])
    words = "base.loras: these files change trained weights"
    assert base.problems()[0].startswith(words)
    with pytest.raises(InputError, match=words):
        base.load_denoiser(CPU)


@pytest.fixture(scope="module")
def full_size() -> dict[str, tuple[int, ...]]:
    """Shapes of the 14B denoiser by our names."""
    with torch.device("meta"):
        model = Wan(PUBLIC_14B, audio=AudioSizes())
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def write_header(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Write a file whose numbers are a hole: a header of any size, and no memory."""
    entries, offset = {}, 0
    for key, shape in shapes.items():
        end = offset + 2 * torch.Size(shape).numel()
        entries[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + offset)
    return str(file)


def test_distilled_models_files_match_completely_at_full_size(
    tmp_path: Path, full_size: dict[str, tuple[int, ...]]
) -> None:
    """FusionX and lightx2v: factors and biases of all layers, norms, convolution, modulation."""
    shapes: dict[str, tuple[int, ...]] = {}
    changed = set()
    for name, shape in full_size.items():
        public = f"diffusion_model.{public_name(name)}"
        layer = public.removesuffix(".weight").removesuffix(".bias")
        if "audio" in name or "norm_x" in name:
            continue
        changed.add(name)
        if public.endswith(".modulation"):
            shapes[public.replace(".modulation", ".diff_m")] = shape
        elif public.endswith(".bias"):
            shapes[f"{layer}.diff_b"] = shape
        elif len(shape) == 2:
            shapes[f"{layer}.lora_down.weight"] = (64, shape[1])
            shapes[f"{layer}.lora_up.weight"] = (shape[0], 64)
        else:
            shapes[f"{layer}.diff"] = shape
    file = write_header(tmp_path / "lora.safetensors", shapes)
    match = match_lora(LoraFile(file), full_size)
    assert not match.unmatched and not match.problems()
    assert match.changes.keys() == changed and len(changed) == 1303


def test_underscores_are_undone_at_full_size(
    tmp_path: Path, full_size: dict[str, tuple[int, ...]]
) -> None:
    layers = {name.removesuffix(".weight"): s for name, s in full_size.items() if len(s) == 2}
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, (outputs, inputs) in layers.items():
        if ours.endswith("scale_shift_table"):
            continue
        theirs = "lora_unet_" + (public_name(ours) or "").replace(".", "_")
        shapes[f"{theirs}.lora_down.weight"] = (16, inputs)
        shapes[f"{theirs}.lora_up.weight"] = (outputs, 16)
        shapes[f"{theirs}.alpha"] = ()
    match = match_lora(LoraFile(write_header(tmp_path / "lora.safetensors", shapes)), full_size)
    assert not match.unmatched
    assert match.changes.keys() == {f"{ours}.weight" for ours in layers}
