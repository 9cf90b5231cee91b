"""Quantised bases: what is rounded and what is not, what it costs, and adapters on top of it."""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, quantize_4bit
from bitsandbytes.nn.modules import Int8Params, Params4bit
from safetensors.torch import save_file
from torch import Tensor, nn

from kit.adapters.lora import Lora, adapter_tensors, apply_adapter, trained_parameters
from kit.batch import Batch
from kit.draws import draw_normal
from kit.errors import InputError
from kit.models import low_bits
from kit.models.base import Denoiser
from kit.models.checkpoints import parameter_shapes
from kit.models.float8 import Float8Linear
from kit.models.lora_files import LoraFile
from kit.models.low_bits import FORMS
from kit.models.wan_base import Quantisation, WanBase
from kit.run.fit import fit
from kit.run.parts import quantisation_problems
from kit.run.rounding import Inputs, measure_rounding, stream_blocks
from kit.training.curves import read_curves
from tests.processes import run_together
from tests.test_sharded_fit import assert_alike, train

TINY_BASE = Path(__file__).parents[1] / "data" / "tiny_base"
RECIPE = Path(__file__).parent / "recipes" / "tiny.yaml"
CPU = torch.device("cpu")
WIDTH, FFN_WIDTH, NUM_BLOCKS = 64, 128, 2
FFN_SHAPES = ((FFN_WIDTH, WIDTH), (WIDTH, FFN_WIDTH))

ROUNDING = {"nf4": 0.1, "nf4_double": 0.1, "int8": 0.01, "fp8": 0.03}
"""Largest relative error of a matrix of normal numbers: in four bits 0.092 was measured with
bitsandbytes' plain torch code; of integers of eight the step is a row's largest number over 127, of
floats an eighth to a sixteenth of the number itself, which is 0.024 on the average."""

MakeBase = Callable[..., WanBase]


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in a width that four bits can have, for weights are rounded 64 at a time."""
    folder = tmp_path_factory.mktemp("wide") / "base"
    shutil.copytree(TINY_BASE, folder)
    file = folder / "transformer" / "config.json"
    wider = {"attention_head_dim": WIDTH // 2, "added_kv_proj_dim": WIDTH}
    file.write_text(json.dumps(json.loads(file.read_text()) | wider))
    return folder


@pytest.fixture(scope="module")
def base(wide_base: Path) -> MakeBase:
    """Make a base with drawn weights, whose first block is not quantised."""

    def make(form: str | None, **options: Any) -> WanBase:
        settings = {"path": str(wide_base), "random_weights": 0, "dtype": "float32"}
        return WanBase(**{**settings, "quantise": form, "full_blocks": [0], **options})

    return make


@pytest.fixture
def stored(base: MakeBase, wide_base: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a base whose denoiser lies in a file."""
    file = tmp_path / "denoiser.safetensors"
    save_file(base(None).load_denoiser(CPU).state_dict(), file)
    return {"transformer": str(file), "random_weights": None}


def inputs_of(batch: Batch) -> Inputs:
    return batch.latents, torch.full((len(batch.keys),), 0.7), batch.conditions


def velocity(denoiser: Denoiser, batch: Batch) -> Tensor:
    with torch.no_grad():
        predicted: Tensor = denoiser(*inputs_of(batch))
    return predicted


def error(some: Tensor, other: Tensor) -> float:
    return float((some.float() - other.float()).norm() / other.float().norm())


def unpacked(weight: nn.Parameter) -> Tensor:
    if isinstance(weight, Params4bit):
        matrix: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return matrix
    if isinstance(weight, Int8Params):
        matrix = int8_vectorwise_dequant(weight.data, weight.SCB)
        return matrix
    return weight.data


def unpacked_layer(denoiser: Denoiser, name: str) -> Tensor:
    """Give the weight of a layer as it is multiplied by."""
    layer = denoiser.get_submodule(name.removesuffix(".weight"))
    weight = unpacked(layer.get_parameter("weight"))
    return weight.float() * layer.factor[:, None] if isinstance(layer, Float8Linear) else weight


def test_every_form_can_be_asked_for() -> None:
    assert set(get_args(Quantisation)) == set(FORMS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_and_ffn_are_rounded_and_nothing_else(
    base: MakeBase, form: str, dtype: str
) -> None:
    full = base(None, dtype=dtype).load_denoiser(CPU)
    quantised = base(form, dtype=dtype).load_denoiser(CPU)
    layers = [name for part in ("attention", "ffn") for name in full.parts()[part]]
    rounded = {f"{name}.weight" for name in layers if name.startswith("transformer.blocks.1.")}
    assert parameter_shapes(quantised) == parameter_shapes(full)
    for name, value in full.named_parameters():
        held = quantised.get_parameter(name)
        if name in rounded:
            assert held.dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn), name
            assert 0 < error(unpacked_layer(quantised, name), value) < ROUNDING[form], name
        else:
            assert held.dtype == value.dtype and torch.equal(held, value), name


@pytest.mark.parametrize("form", FORMS)
def test_files_and_drawn_weights_are_rounded_alike(
    base: MakeBase, stored: dict[str, Any], form: str, batch: Batch
) -> None:
    read = base(form, **stored).load_denoiser(CPU)
    drawn = base(form).load_denoiser(CPU)
    assert torch.equal(velocity(read, batch), velocity(drawn, batch))


def test_lora_files_are_merged_before_rounding(
    base: MakeBase, stored: dict[str, Any], tmp_path: Path
) -> None:
    layer, file = "transformer.blocks.1.ffn.net.0.proj", tmp_path / "lora.safetensors"
    up, down = draw_normal((FFN_WIDTH, 4), "up"), draw_normal((4, WIDTH), "down")
    save_file({f"{layer}.lora_B.weight": up, f"{layer}.lora_A.weight": down}, file)
    options = {**stored, "loras": [LoraFile(str(file))]}
    plain, merged, rounded = (
        made.load_denoiser(CPU).get_parameter(f"{layer}.weight")
        for made in (base(None), base(None, **options), base("nf4", **options))
    )
    assert error(merged, plain) > 1
    assert error(unpacked(rounded), merged) < ROUNDING["nf4"]


def test_loading_holds_one_matrix_in_full(
    base: MakeBase, stored: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts matrices of the FFN, all of which are rounded, whenever one is."""
    held: list[int] = []

    def counting(value: Tensor, **options: Any) -> Any:
        if value.shape in FFN_SHAPES:
            held.append(num_alive())
        return quantize_4bit(value, **options)

    monkeypatch.setattr(low_bits, "quantize_4bit", counting)
    before = num_alive()
    base("nf4", **stored, full_blocks=[]).load_denoiser(CPU)
    assert len(held) == NUM_BLOCKS * len(FFN_SHAPES)
    assert 1 <= max(held) - before <= 2


def num_alive() -> int:
    """Count matrices of the FFN that have memory of their own."""
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    return sum(1 for tensor in tensors if tensor.shape in FFN_SHAPES and not tensor.is_meta)


@pytest.mark.parametrize("form", FORMS)
def test_training_reaches_the_factors_and_sampling_between_changes_nothing(
    base: MakeBase, form: str, batch: Batch
) -> None:
    denoiser = base(form).load_denoiser(CPU)
    Lora(rank=4).inject(denoiser, seed=0)
    trained = trained_parameters(denoiser)
    move(trained)

    def gradients(every: int) -> list[Tensor]:
        denoiser.train().checkpoint_activations(every)
        denoiser.zero_grad()
        denoiser(*inputs_of(batch)).square().mean().backward()
        return [p.grad.clone() for p in trained.values() if p.grad is not None]

    first = gradients(0)
    velocity(denoiser.eval(), batch)
    again, recomputed = gradients(0), gradients(1)
    assert len(first) == len(trained)
    assert all(gradient.any() for gradient in first)
    assert all(map(torch.equal, first, again))
    for one, other in zip(first, recomputed, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_adapters_fit_quantised_and_full_bases_alike(
    base: MakeBase, form: str, batch: Batch
) -> None:
    for trained_on, used_on in ((form, None), (None, form)):
        denoiser = base(trained_on).load_denoiser(CPU)
        Lora(rank=4).inject(denoiser, seed=0)
        move(trained_parameters(denoiser))
        after = velocity(denoiser.eval(), batch)
        tensors = adapter_tensors(denoiser, trained_parameters(denoiser), "lora")
        other = base(used_on).load_denoiser(CPU)
        before = velocity(other, batch)
        apply_adapter(other, tensors, "lora")
        # The bases differ by their rounding, the adapter by much more.
        assert error(velocity(other, batch), after) < 0.5 * error(before, after)


ADAPTERS = [(form, kind) for form in FORMS for kind in FORMS[form].adapters]


@pytest.mark.parametrize(("form", "kind"), ADAPTERS)
def test_kinds_of_adapters_do_the_same_on_quantised_and_full_bases(
    base: MakeBase, form: str, kind: Any, batch: Batch
) -> None:
    """They begin as nothing, with the factors that a full base gives, and reach what it reaches."""
    after, factors = [], []
    for held in (form, None):
        denoiser = base(held).load_denoiser(CPU)
        before = velocity(denoiser, batch)
        Lora(rank=4, kind=kind, parts=["ffn"]).inject(denoiser, seed=0)
        assert error(velocity(denoiser.eval(), batch), before) < 1e-5
        trained = trained_parameters(denoiser)
        factors.append({name: p.detach().clone() for name, p in trained.items()})
        move({name: p for name, p in trained.items() if "magnitude" not in name})
        after.append(velocity(denoiser, batch) - before)
    assert all(
        torch.equal(factors[0][name], value)
        for name, value in factors[1].items()
        if "magnitude" not in name
    )
    assert error(*after) < 0.5
    assert error(after[1], torch.zeros_like(after[1]) + 1e-3) > 10


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_peft_knows_the_layers(base: MakeBase, form: str) -> None:
    """Then it merges into them, or computes norms of what they hold."""
    denoiser = base(form).load_denoiser(CPU)
    Lora(rank=4, parts=["ffn"]).inject(denoiser, seed=0)
    kinds = {type(denoiser.get_submodule(name)).__name__ for name in denoiser.parts()["ffn"]}
    assert kinds == {"Linear", {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[form]}


def test_errors_are_those_of_the_blocks(base: MakeBase, batch: Batch) -> None:
    """A block that is changed in the last place shows alone there, accumulated from there on."""
    full, other = base(None).load_denoiser(CPU), base(None).load_denoiser(CPU)
    same = measure_rounding(other, iter(full.blocks()), inputs_of(batch))
    assert same.velocity == 0 and {e.accumulated for e in same.blocks} == {0.0}
    other.get_parameter("transformer.blocks.0.ffn.net.2.weight").data.mul_(1.5)
    found = measure_rounding(other, iter(full.blocks()), inputs_of(batch))
    first, second = found.blocks
    assert first.alone == first.accumulated > 0
    assert second.alone == 0 and second.accumulated > 0
    assert found.worst == first
    assert found.velocity == pytest.approx(error(velocity(other, batch), velocity(full, batch)))
    assert not any(block._forward_hooks for block in other.blocks())


def test_blocks_in_full_are_read_one_at_a_time(base: MakeBase, stored: dict[str, Any]) -> None:
    full = base(None).load_denoiser(CPU)
    seen: list[nn.Module] = []
    stream = stream_blocks(base("nf4", **stored), CPU)
    for block, expected in zip(stream, full.blocks(), strict=True):
        assert all(p.is_meta for earlier in seen for p in earlier.parameters())
        assert block.state_dict().keys() == expected.state_dict().keys()
        assert all(map(torch.equal, block.parameters(), expected.parameters()))
        seen.append(block)
    assert len(seen) == NUM_BLOCKS


PROBLEMS = {
    "not there": ({"full_blocks": [0, 2]}, "base.full_blocks: no block 2; valid: -2 to 1"),
    "all of them": (
        {"full_blocks": [0, -1]},
        "base.full_blocks: these are all 2 blocks, and nothing is quantised",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_blocks_that_cannot_be_kept_are_named(base: MakeBase, case: str) -> None:
    options, line = PROBLEMS[case]
    assert base("nf4", **options).problems() == [line]
    assert base(None, **options).problems() == []


def test_rows_that_four_bits_cannot_have_are_named(base: MakeBase) -> None:
    """On a CPU, bitsandbytes 0.50 would silently take wrong factors for them."""
    (line,) = base("nf4", path=str(TINY_BASE)).problems()
    assert line == (
        "base.quantise: nf4 needs rows of a multiple of 64 weights, and 48 are in those of "
        "transformer.blocks.1.attn1.to_q"
    )
    assert base("int8", path=str(TINY_BASE)).problems() == []


UNFIT = {
    "adapter.train_fully=[ffn]": r"base\.quantise: nf4 cannot take whole weights, .* 'ffn'",
    "adapter.kind=loha": r"adapter: a loha does not go with nf4; valid: lora, dora",
    "trainer.offload=weights": r"trainer\.offload: weights in nf4 cannot leave block by block",
}


@pytest.mark.parametrize("override", UNFIT)
def test_adapters_that_cannot_work_are_refused(
    wide_base: Path, encoded_shards: Path, override: str
) -> None:
    words = [*overrides(wide_base, encoded_shards), "adapter.parts=[attention]", override]
    with pytest.raises(InputError, match=UNFIT[override]):
        fit(str(RECIPE), words, lambda line: None)


def test_a_denoiser_that_trains_whole_is_refused(wide_base: Path, encoded_shards: Path) -> None:
    words = [*overrides(wide_base, encoded_shards), "adapter.type=full"]
    with pytest.raises(InputError, match="the adapter has those of 'all'"):
        fit(str(RECIPE), words, lambda line: None)


def test_a_run_tells_the_rounding_first_and_goes_on_bit_for_bit(
    wide_base: Path, encoded_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With moving averages in 8 bits, which only tensors of more than 4096 numbers have."""
    monkeypatch.chdir(tmp_path)
    more = {"adapter.rank": 96, "optimizer.state_bits": 8, "trainer.checkpoint_blocks": 1}
    said: list[str] = []

    def run(name: str, steps: int) -> Path:
        settings = {"name": name, "trainer.max_steps": steps, **more}
        return fit(str(RECIPE), overrides(wide_base, encoded_shards, **settings), said.append)

    whole = run("whole", 4)
    (table,) = [line for line in said if line.startswith("error of the quantised base")]
    saved = json.loads((whole / "rounding.json").read_text())
    assert [block["alone"] > 0 for block in saved["blocks"]] == [False, True]
    assert 0 < saved["velocity"] < 0.5
    assert table.endswith("; worst block 1")
    run("parts", 2)
    said.clear()
    parts = run("parts", 4)
    assert not any("quantised base" in line for line in said)
    assert losses(parts) == losses(whole)
    checkpoint = torch.load(parts / "checkpoints" / "step-00000004.ckpt", weights_only=True)
    assert all(".lora_" in name for name in checkpoint["state_dict"])
    averages = list(tensors_in(checkpoint["optimizer_states"]))
    assert torch.uint8 in {tensor.dtype for tensor in averages}


def overrides(base: Path, shards: Path, **more: Any) -> list[str]:
    values = {
        "name": "run",
        "base.path": base,
        "base.quantise": "nf4",
        "base.full_blocks": "[0]",
        "data.path": shards,
        "data.window_frames": 9,
        "data.windows_per_clip": 2,
        "data.context_frames": 5,
        "data.first_chunk": 0.5,
        "data.num_workers": 0,
        "optimizer.warmup_steps": 2,
        "trainer.max_steps": 4,
        "trainer.save_every": 2,
        "preview": "null",
        **more,
    }
    return [f"{key}={value}" for key, value in values.items()]


def losses(folder: Path) -> list[str]:
    return [row["loss/velocity"] for row in read_curves(folder / "metrics.csv")]


def move(trained: dict[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.add_(0.1 * draw_normal(tuple(parameter.shape), name))


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(inner)


def test_adapters_that_do_not_go_with_a_form_are_refused_in_sampling() -> None:
    assert quantisation_problems(None, "loha", ["ffn"]) == []
    assert quantisation_problems("nf4", "lora", ["audio"]) == []
    (kind,) = quantisation_problems("int8", "dora", [])
    assert kind == "adapter: a dora does not go with int8; valid: lora"
    (whole,) = quantisation_problems("int8", "lora", ["attention"])
    assert "int8 cannot take whole weights, and the adapter has those of 'attention'" in whole


@pytest.mark.parametrize("form", ["nf4", "int8", "fp8"])
def test_several_processes_train_on_a_quantised_base_as_one_does(
    wide_base: Path,
    encoded_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    """Packed weights are held by each of them, others are distributed."""
    monkeypatch.chdir(tmp_path)
    more = {"base.quantise": form, "trainer.max_steps": 3}
    train(overrides(wide_base, encoded_shards, name="alone", **more, **{"trainer.accumulate": 2}))
    run_together(2, train, overrides(wide_base, encoded_shards, name="pair", **more))
    assert_alike("pair", "alone")
