"""Weights in eight bits: every form gives the denoiser back, within its rounding."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kit.errors import InputError
from kit.models.inspection import survey_file
from kit.models.keys import public_name
from kit.models.layouts import find_part
from kit.models.wan_base import WanBase

TINY_BASE = Path(__file__).parents[1] / "data" / "tiny_base"
CPU = torch.device("cpu")
FLOAT8 = torch.float8_e4m3fn
FLOAT8_STEP = 2.0**-4
"""Relative rounding of three bits of mantissa."""

State = dict[str, Tensor]
Quantise = Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]


@pytest.fixture(scope="module")
def public() -> State:
    """A tiny denoiser's weights under public names."""
    base = WanBase(path=str(TINY_BASE), random_weights=5, dtype="float32")
    state = base.load_denoiser(CPU).state_dict()
    return {public_name(name) or name: value for name, value in state.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base folder with configurations of the denoiser alone."""
    for name in ("transformer", "audio"):
        (tmp_path / name).mkdir()
        config = (TINY_BASE / name / "config.json").read_text()
        (tmp_path / name / "config.json").write_text(config)
    return tmp_path


def plain(key: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield key, weight.to(FLOAT8)


def comfy_former(key: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    factor = weight.abs().max() / 448
    layer = key.removesuffix(".weight")
    yield key, (weight / factor).to(FLOAT8)
    yield f"{layer}.scale_weight", factor
    yield f"{layer}.scale_input", torch.ones(())


def comfy_present(key: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    factor = weight.abs().max() / 448
    layer = key.removesuffix(".weight")
    yield key, (weight / factor).to(FLOAT8)
    yield f"{layer}.weight_scale", factor
    yield f"{layer}.comfy_quant", setting(format="float8_e4m3fn")


def by_rows(key: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    factor = weight.abs().amax(dim=1, keepdim=True) / 448
    yield key, (weight / factor).to(FLOAT8)
    yield f"{key.removesuffix('.weight')}.weight_scale", factor


def quanto(limit: int, dtype: torch.dtype) -> Quantise:
    def quantise(key: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        layer = key.removesuffix(".weight")
        factor = (weight.abs().amax(dim=1, keepdim=True) / limit).to(torch.bfloat16)
        numbers = weight / factor.float()
        yield f"{key}._data", (numbers.round() if dtype == torch.int8 else numbers).to(dtype)
        yield f"{key}._scale", factor
        yield f"{layer}.input_scale", torch.ones(())
        yield f"{layer}.output_scale", torch.ones(())

    return quantise


FORMS: dict[str, tuple[Quantise, float]] = {
    "plain float8": (plain, FLOAT8_STEP),
    "ComfyUI's former form": (comfy_former, FLOAT8_STEP),
    "ComfyUI's present form": (comfy_present, FLOAT8_STEP),
    "LightX2V's rows": (by_rows, FLOAT8_STEP),
    "quanto's float8": (quanto(448, FLOAT8), FLOAT8_STEP),
    "quanto's int8": (quanto(120, torch.int8), 1 / 120),
}
"""How each program stores a layer, and the largest error, relative to the largest number."""


def setting(**values: object) -> Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def write(file: Path, public: State, quantise: Quantise, prefix: str = "") -> Path:
    stored: State = {f"{prefix}scaled_fp8": torch.empty(2, dtype=FLOAT8)}
    for key, value in public.items():
        is_layer = value.ndim == 2 and key.endswith(".weight")
        parts = quantise(key, value) if is_layer else [(key, value.half())]
        stored |= {f"{prefix}{name}": part.contiguous() for name, part in parts}
    save_file(stored, file)
    return file


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_within_its_rounding(
    folder: Path, public: State, form: str, prefix: str
) -> None:
    quantise, rounding = FORMS[form]
    file = write(folder / "dit.safetensors", public, quantise, prefix)
    base = WanBase(path=str(folder), transformer=str(file), dtype="float32")
    loaded = base.load_denoiser(CPU).state_dict()
    for name, value in loaded.items():
        expected = public[public_name(name) or name]
        assert value.dtype == torch.float32
        assert (value - expected).abs().max() <= rounding * expected.abs().max(), name


def test_numbers_times_factor_are_exact(folder: Path, public: State) -> None:
    file = write(folder / "dit.safetensors", public, by_rows)
    base = WanBase(path=str(folder), transformer=str(file), dtype="bfloat16")
    key = "blocks.1.cross_attn.k_img.weight"
    numbers, factor = (part for _, part in by_rows(key, public[key]))
    loaded = base.load_denoiser(CPU).get_parameter("transformer.blocks.1.attn2.add_k_proj.weight")
    assert torch.equal(loaded, (numbers.float() * factor).bfloat16())


def test_quantised_encoders_are_read(tmp_path: Path) -> None:
    """As in ComfyUI's umT5, and in quanto's under the original names."""
    from kit.models.encoders import draw_network, load_network

    drawn = draw_network(find_part("text_encoder", TINY_BASE), 1, torch.float32).state_dict()
    kept = {key: value for key, value in drawn.items() if "embed_tokens" not in key}
    file = write(tmp_path / "umt5.safetensors", kept, comfy_former)
    part = find_part("text_encoder", tmp_path, file)
    loaded = load_network(part, torch.float32, CPU).state_dict()
    for name, value in drawn.items():
        assert (loaded[name] - value).abs().max() <= FLOAT8_STEP * value.abs().max(), name


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("plain float8", "float8_e4m3fn and float16"),
        ("ComfyUI's former form", "float8_e4m3fn (scaled, as ComfyUI once wrote)"),
        ("LightX2V's rows", "float8_e4m3fn (scaled, as ComfyUI and LightX2V write)"),
        ("quanto's int8", "int8 (by quanto)"),
    ],
)
def test_check_names_the_form(folder: Path, public: State, form: str, name: str) -> None:
    survey = survey_file(write(folder / "dit.safetensors", public, FORMS[form][0]))
    assert survey.heading == "transformer and audio parts"
    assert name in survey.lines[0]


UNREADABLE: dict[str, tuple[State, str]] = {
    "another format": ({"x.comfy_quant": setting(format="nvfp4")}, "quantised as nvfp4; valid: "),
    "rotated": (
        {"x.comfy_quant": setting(format="int8_tensorwise", convrot=True)},
        "int8_tensorwise with rotation; valid: ",
    ),
    "no setting": ({"x.comfy_quant": setting(size=3)}, "its layers' formats cannot be read"),
    "blocks": (
        {"x.weight": torch.zeros(4, 4).to(FLOAT8), "x.weight_scale": torch.ones(4, 2)},
        r"x\.weight_scale is \[4, 2\]; valid: one factor, or one for each of 4",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_other_forms_are_refused(folder: Path, case: str) -> None:
    tensors, words = UNREADABLE[case]
    save_file(tensors, folder / "dit.safetensors")
    base = WanBase(path=str(folder), transformer=str(folder / "dit.safetensors"))
    with pytest.raises(InputError, match=words):
        base.load_denoiser(CPU)


def test_integers_without_a_factor_are_refused(folder: Path, public: State) -> None:
    key = "blocks.0.ffn.0.weight"
    file = folder / "dit.safetensors"
    save_file(public | {key: public[key].to(torch.int8)}, file)
    base = WanBase(path=str(folder), transformer=str(file))
    with pytest.raises(InputError, match=rf"integer \(without a factor.*\): {key}"):
        base.load_denoiser(CPU)
