"""Uni3C's controller: parity with the release, its files, and residuals one block at a time."""

import importlib
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kit.batch import Conditions
from kit.draws import draw_normal
from kit.errors import InputError
from kit.models.attention import grid_rotation
from kit.models.audio import AudioSizes
from kit.models.inside import UNTOUCHED
from kit.models.memory import afresh
from kit.models.tokens import unpatchify
from kit.models.wan import Wan, embed_time, predict

controllers = importlib.import_module("kit.plugins.uni3c.controller")
weights = importlib.import_module("kit.plugins.uni3c.weights")

REFERENCE = Path(__file__).parents[2] / "shared" / "fixtures" / "uni3c"
CPU = torch.device("cpu")
RELEASED = controllers.Sizes(
    in_channels=36,
    guide_channels=7,
    guide_dim=256,
    base_dim=5120,
    time_dim=5120,
    dim=1024,
    ffn_dim=4096,
    num_heads=16,
    num_layers=20,
)
RELEASED_BLOCK = {
    "norm1.linear.weight": (3072, 5120), "norm1.linear.bias": (3072,),
    "norm1.norm.weight": (1024,), "norm1.norm.bias": (1024,),
    "norm2.linear.weight": (3072, 5120), "norm2.linear.bias": (3072,),
    "norm2.norm.weight": (1024,), "norm2.norm.bias": (1024,),
    "self_attn.to_q.weight": (1024, 1024), "self_attn.to_q.bias": (1024,),
    "self_attn.to_k.weight": (1024, 1024), "self_attn.to_k.bias": (1024,),
    "self_attn.to_v.weight": (1024, 1024), "self_attn.to_v.bias": (1024,),
    "self_attn.to_out.0.weight": (1024, 1024), "self_attn.to_out.0.bias": (1024,),
    "self_attn.norm_q.weight": (1024,), "self_attn.norm_k.weight": (1024,),
    "ffn.0.weight": (4096, 1024), "ffn.0.bias": (4096,),
    "ffn.2.weight": (1024, 4096), "ffn.2.bias": (1024,),
}  # fmt: skip
RELEASED_ENDS = {
    "controlnet_patch_embedding.weight": (5120, 36, 1, 2, 2),
    "controlnet_patch_embedding.bias": (5120,),
    "controlnet_mask_embedding.mask_proj.0.weight": (256, 7, 4, 8, 8),
    "controlnet_mask_embedding.mask_proj.0.bias": (256,),
    "controlnet_mask_embedding.mask_proj.1.weight": (256,),
    "controlnet_mask_embedding.mask_proj.1.bias": (256,),
    "controlnet_mask_embedding.mask_zero_proj.weight": (5120, 256, 1, 2, 2),
    "controlnet_mask_embedding.mask_zero_proj.bias": (5120,),
    "controlnet.proj_in.weight": (1024, 5120),
    "controlnet.proj_in.bias": (1024,),
}

SMALL = controllers.Sizes(
    in_channels=12,
    guide_channels=7,
    guide_dim=8,
    base_dim=24,
    time_dim=10,
    dim=16,
    ffn_dim=20,
    num_heads=2,
    num_layers=3,
)


def draw_controller(sizes: Any = SMALL) -> Any:
    controller = controllers.Controller(sizes)
    for seed, parameter in enumerate(controller.parameters()):
        parameter.data = 0.2 * draw_normal(tuple(parameter.shape), seed)
    return controller.requires_grad_(False)


def draw_inputs(sizes: Any = SMALL) -> dict[str, Tensor]:
    return {
        "render": draw_normal((1, 4, 2, 4, 6), 1),
        "guide": draw_normal((1, 7, 5, 32, 48), 2),
        "noisy": draw_normal((1, 8, 2, 4, 6), 3),
        "time": draw_normal((1, sizes.time_dim), 4),
        "tokens": draw_normal((3, 12, sizes.base_dim), 5),
    }


def start(controller: Any, given: dict[str, Tensor], **options: Any) -> Any:
    rendered = controller.embed_render(given["render"], given["guide"])
    return controllers.Control(controller, rendered, given["noisy"], given["time"], **options)


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def released() -> Any:
    """The reference's controller, its inputs and its outputs."""
    if not REFERENCE.exists():
        pytest.skip("the reference outputs are not beside the checkout")
    sizes = json.loads((REFERENCE / "config.json").read_text())
    controller = weights.load_controller(
        REFERENCE / "controlnet.safetensors",
        CPU,
        torch.float32,
        num_heads=sizes["controller"]["num_heads"],
    )
    return controller, load_file(REFERENCE / "controller.safetensors"), sizes["dit"]


def released_control(
    controller: Any, given: dict[str, Tensor], time: Tensor, guided: bool, strength: float
) -> Any:
    guide = torch.cat([given["render_mask"], given["camera"]], dim=1) if guided else None
    rendered = controller.embed_render(given["render_latent"], guide)
    noisy = given["hidden"][:, :20]
    return controllers.Control(controller, rendered, noisy, time, strength=strength)


def test_residuals_equal_the_release(released: Any) -> None:
    controller, given, _ = released
    control = released_control(controller, given, given["controller.temb"], True, 1.0)
    nothing = torch.zeros_like(given["controller.state.0"])
    for number in range(3):
        expected = given[f"controller.state.{number}"]
        assert relative(control.after(number, nothing), expected) < 1e-6


def test_what_goes_in_equals_the_release(released: Any) -> None:
    controller, given, _ = released
    guide = torch.cat([given["render_mask"], given["camera"]], dim=1)
    embedded = controller.controlnet_mask_embedding(guide)
    assert relative(embedded, given["mask_camera_embedding"]) < 1e-6
    rendered = controller.embed_render(given["render_latent"], guide)
    embedded = controller.embed(given["hidden"][:, :20], rendered)
    assert relative(embedded, controller.controlnet.proj_in(given["controller.input"])) < 1e-6


@pytest.fixture(scope="module")
def released_wan(released: Any) -> Wan:
    """The reference's base as ours; its audio parts say nothing."""
    audio = AudioSizes(num_layers=2, audio_dim=6, intermediate_dim=8, output_dim=10)
    model = Wan(released[2], audio=audio)
    state = load_file(REFERENCE / "dit.safetensors")
    found = model.load_state_dict({f"transformer.{k}": v for k, v in state.items()}, strict=False)
    assert not found.unexpected_keys
    assert all("audio" in key or "norm_x" in key for key in found.missing_keys)
    for block in model.transformer.blocks:
        torch.nn.init.zeros_(block.audio_cross_attn.proj.weight)
        torch.nn.init.zeros_(block.audio_cross_attn.proj.bias)
    return model.requires_grad_(False)


def predict_with(wan: Wan, given: dict[str, Tensor], control: Any) -> Tensor:
    """Run the base as `Wan.forward` does; there, the mask is the same all over a frame."""
    net, sigma, grid = wan.transformer, given["timestep"] / 1000, (3, 3, 4)
    conditions = Conditions(
        text=given["text"],
        image=given["image"],
        reference=given["hidden"][:, 20:],
        reference_mask=torch.zeros(1, 4, 3),
        audio=draw_normal((1, 1, 9, 5, 2, 6), 1),
        num_speakers=torch.tensor([1]),
        speaker_masks=torch.ones(1, 1, 6, 8),
    )
    time, modulation = embed_time(net.condition_embedder, sigma)
    rotation = grid_rotation(grid, net.config.attention_head_dim, CPU)
    context = wan._context(conditions, modulation, rotation, UNTOUCHED, afresh)
    x = net.patch_embedding(given["hidden"]).flatten(2).transpose(1, 2)
    for number, block in enumerate(net.blocks):
        x = control.after(number, block(x, context))
    return unpatchify(predict(net, x, time), grid)


@pytest.mark.parametrize(
    ("expected", "guided", "strength"),
    [
        ("dit_plain", True, 0.0),
        ("dit_with_control", True, 1.0),
        ("dit_with_control_no_mask_no_camera", False, 1.0),
    ],
)
def test_our_base_under_control_equals_the_release(
    released: Any, released_wan: Wan, expected: str, guided: bool, strength: float
) -> None:
    controller, given, _ = released
    time, _ = embed_time(released_wan.transformer.condition_embedder, given["timestep"] / 1000)
    assert relative(time, given["controller.temb"]) < 1e-5
    control = released_control(controller, given, time, guided, strength)
    assert relative(predict_with(released_wan, given, control), given[expected]) < 1e-5


def test_the_public_weights_fit() -> None:
    controller = weights.empty_controller(RELEASED)
    expected = RELEASED_ENDS | {
        f"controlnet.controlnet_blocks.{number}.{name}": shape
        for number in range(20)
        for name, shape in RELEASED_BLOCK.items()
    }
    for number in range(20):
        expected[f"controlnet.proj_out.{number}.weight"] = (5120, 1024)
        expected[f"controlnet.proj_out.{number}.bias"] = (5120,)
    found = {name: tuple(value.shape) for name, value in controller.state_dict().items()}
    assert len(found) == 490
    assert found == expected
    assert sum(value.numel() for value in controller.parameters()) == 997_887_744
    assert weights.read_sizes(found) == RELEASED


def test_a_new_controller_says_nothing() -> None:
    given = draw_inputs()
    control = start(controllers.Controller(SMALL), given)
    for number in range(5):
        assert torch.equal(control.after(number, given["tokens"]), given["tokens"])


def test_strength_zero_is_nothing_and_computes_nothing() -> None:
    given = draw_inputs()
    control = start(draw_controller(), given | {"noisy": torch.empty(0)}, strength=0.0)
    for number in range(3):
        assert control.after(number, given["tokens"]) is given["tokens"]


def test_strength_scales_what_is_added() -> None:
    controller, given = draw_controller(), draw_inputs()
    x = given["tokens"]
    one = start(controller, given).after(1, x) - x
    half = start(controller, given, strength=-0.5).after(1, x) - x
    torch.testing.assert_close(half, -0.5 * one)


def test_branches_share_a_residual_and_later_blocks_are_left_alone() -> None:
    controller, given = draw_controller(), draw_inputs()
    x, control = given["tokens"], start(controller, given)
    added = control.after(0, x) - x
    torch.testing.assert_close(added[1:], added[:1].expand(2, -1, -1))
    assert added.norm() > 1
    assert control.after(SMALL.num_layers, x) is x


@pytest.mark.parametrize("remember", [False, True])
def test_blocks_one_by_one_equal_all_at_once(remember: bool) -> None:
    controller, given = draw_controller(), draw_inputs()
    rendered = controller.embed_render(given["render"], given["guide"])
    x, expected = controller.embed(given["noisy"], rendered), []
    for number in range(SMALL.num_layers):
        x = controller.update(number, x, given["time"], rendered.grid)
        expected.append(controller.residual(number, x))
    control = start(controller, given, remember=remember)
    # Branch by branch, or with a block left out, blocks are asked for in other orders.
    for number in (0, 1, 2, 0, 2, 1):
        added = control.after(number, torch.zeros_like(expected[number]))
        assert torch.equal(added, expected[number])


def test_precomputing_the_render_equals_one_convolution() -> None:
    controller, given = draw_controller(), draw_inputs()
    patch = controller.controlnet_patch_embedding
    both = torch.cat([given["noisy"], given["render"]], dim=1)
    expected = controller.controlnet.proj_in(patch(both).flatten(2).transpose(1, 2))
    found = controller.embed(given["noisy"], controller.embed_render(given["render"]))
    torch.testing.assert_close(found, expected)


def test_bfloat16_is_near_float32() -> None:
    given = draw_inputs()
    x = torch.zeros(1, 12, SMALL.base_dim)
    exact = start(draw_controller(), given).after(2, x)
    rounded = start(draw_controller().bfloat16(), given).after(2, x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert relative(rounded.float(), exact) < 0.02


@pytest.mark.parametrize("remember", [False, True])
def test_no_list_of_residuals_is_kept(remember: bool) -> None:
    """One state lives between blocks, all if they are to be remembered; residuals never do."""
    controller, given = draw_controller(), draw_inputs()
    states: list[weakref.ref[Tensor]] = []
    residuals: list[weakref.ref[Tensor]] = []
    for made, layers in (
        (states, controller.controlnet.controlnet_blocks),
        (residuals, controller.controlnet.proj_out),
    ):
        for layer in layers:
            layer.register_forward_hook(lambda *call, made=made: made.append(weakref.ref(call[2])))
    control, x = start(controller, given, remember=remember), given["tokens"]
    for number in range(SMALL.num_layers):
        x = control.after(number, x)
        assert len(states) == number + 1
        assert sum(state() is not None for state in states) == (number + 1 if remember else 1)
        assert not any(residual() is not None for residual in residuals)


SPELLINGS = {
    "released": lambda key: key,
    "without prefix": lambda key: key.removeprefix("controlnet."),
    "attention as in Wan": lambda key: (
        key.removeprefix("controlnet.")
        .replace("to_out.0", "o")
        .replace("self_attn.to_", "self_attn.")
    ),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_files_load_in_all_spellings(tmp_path: Path, spelling: str, suffix: str) -> None:
    controller = draw_controller()
    state = {SPELLINGS[spelling](key): value for key, value in controller.state_dict().items()}
    file = tmp_path / f"controller{suffix}"
    if suffix == ".pth":
        torch.save(state, file)
    else:
        save_file(state, file, {"num_heads": "2"})
    heads = {"num_heads": 2} if suffix == ".pth" else {}
    loaded = weights.load_controller(file, CPU, torch.float32, **heads)
    assert loaded.sizes == SMALL
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    given, x = draw_inputs(), torch.zeros(1, 12, SMALL.base_dim)
    found, expected = (start(one, given).after(2, x) for one in (loaded, controller))
    assert torch.equal(found, expected)


def test_a_file_that_does_not_fit_is_one_clear_error(tmp_path: Path) -> None:
    state = dict(draw_controller().state_dict())
    state["controlnet.proj_in.bias"] = torch.zeros(3)
    state["text_embedder.weight"] = state.pop("controlnet.proj_out.1.bias")
    file = tmp_path / "controller.safetensors"
    save_file(state, file)
    with pytest.raises(InputError) as caught:
        weights.load_controller(file, CPU, torch.float32, num_heads=2)
    message = str(caught.value)
    assert "missing: controlnet.proj_out.1.bias" in message
    assert "unknown: text_embedder.weight" in message
    assert "of another shape: controlnet.proj_in.bias (3,), not (16,)" in message


def test_other_files_and_heads_are_refused(tmp_path: Path) -> None:
    state = dict(draw_controller().state_dict())
    file = tmp_path / "controller.safetensors"
    save_file(state, file)
    with pytest.raises(InputError, match="5 heads cannot share 16 channels"):
        weights.load_controller(file, CPU, torch.float32, num_heads=5)
    save_file({"lora.weight": torch.zeros(2)}, file)
    with pytest.raises(InputError, match="it has no controlnet_patch_embedding.weight"):
        weights.load_controller(file, CPU, torch.float32)
