"""LoRA files of the public, merged while the denoiser is read: every dialect, and nothing lost."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
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
        "8 tensors for 4 layers, rank 3, without image layers, as for text-to-video",
    )


UNMATCHED = {
    "diffusion_model.blocks.9.self_attn.q.lora_down.weight": "no such layer",
    "diffusion_model.blocks.0.self_attn.k.lora_up.weight": "a factor without the other",
    "diffusion_model.patch_embedding.diff": "is [48, 16, 1, 2, 2], not [48, 36, 1, 2, 2]",
    "diffusion_model.blocks.0.self_attn.v.alpha": "alpha without factors",
    "diffusion_model.blocks.0.self_attn.o.hada_w1_a": "not understood as part of a LoRA",
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


def test_other_adapters_are_refused(folder: Path) -> None:
    file = written(folder / "dora.safetensors", {"x.dora_scale": torch.ones(3)})
    with pytest.raises(InputError, match="holds DoRA"):
        base_with(folder, LoraFile(file)).load_denoiser(CPU)


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
