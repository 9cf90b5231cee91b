"""What every base model promises to the rest of the kit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kit.batch import Conditions
from kit.draws import draw_normal
from kit.models import BASES
from kit.models.base import Base, Denoiser, Encoders
from kit.reference import first_frame_mask
from kit.registry import load

SHIPPED = Path(__file__).parents[1] / "data"
SMALL: dict[str, dict[str, Any]] = {
    "wan": {"path": str(SHIPPED / "tiny_base"), "random_weights": 1, "dtype": "float32"},
}
"""Arguments that make a base small enough for a test; every name in BASES needs some."""

CPU = torch.device("cpu")
NUM_FRAMES = 5


@pytest.fixture(params=sorted(BASES), scope="module")
def base(request: pytest.FixtureRequest) -> Base:
    built = load(BASES[request.param])(**SMALL[request.param])
    assert isinstance(built, Base)
    return built


@pytest.fixture(scope="module")
def denoiser(base: Base) -> Denoiser:
    return base.load_denoiser(CPU)


@pytest.fixture(scope="module")
def inputs(base: Base) -> tuple[Tensor, Tensor, Conditions]:
    """A noisy video, its noise level and conditions made by the base's own encoders."""
    encoders, size = base.load_encoders(CPU), 32
    pixels = draw_normal((1, 3, NUM_FRAMES, size, size), 1).clamp(-1, 1)
    latents = encoders.encode_video(pixels)
    speech = encoders.encode_speech(draw_normal((1, 16_000), 2))[:, :NUM_FRAMES]
    conditions = Conditions(
        text=encoders.encode_text(["A person talks."])[0][None],
        image=encoders.encode_image(pixels[:, :, 0]),
        reference=latents,
        reference_mask=first_frame_mask(1, latents.shape[2]),
        audio=speech[None, :, :, None].expand(-1, -1, -1, 5, -1, -1),
        num_speakers=torch.tensor([1]),
        speaker_masks=torch.ones(1, 1, *latents.shape[-2:]),
    )
    return latents + draw_normal(tuple(latents.shape), 3), torch.tensor([0.7]), conditions


def test_sizes_are_those_of_the_geometry(base: Base) -> None:
    geometry = base.geometry
    encoders, size = base.load_encoders(CPU), 16
    pixels = torch.zeros(1, 3, NUM_FRAMES, size, 2 * size)
    latents = encoders.encode_video(pixels)
    rows = size // geometry.pixel_stride
    num_latent_frames = 1 + (NUM_FRAMES - 1) // geometry.frame_stride
    assert latents.shape[2:] == (num_latent_frames, rows, 2 * rows)
    assert encoders.decode_video(latents).shape == pixels.shape
    assert len(encoders.encode_speech(torch.zeros(1, 16_000))[0]) == geometry.fps


def test_encoded_values_are_float32_and_sane(base: Base) -> None:
    encoders: Encoders = base.load_encoders(CPU)
    pixels = draw_normal((1, 3, NUM_FRAMES, 64, 64), 1).clamp(-1, 1)
    latents = encoders.encode_video(pixels)
    values = [latents, encoders.encode_image(pixels[:, :, 0]), *encoders.encode_text(["Hello"])]
    values.append(encoders.encode_speech(draw_normal((1, 16_000), 2)))
    for value in values:
        assert value.dtype == torch.float32
        assert not value.requires_grad
        assert 0.3 < value.std() < 3
    assert encoders.decode_video(latents).abs().max() <= 1


def test_velocity(denoiser: Denoiser, inputs: tuple[Tensor, Tensor, Conditions]) -> None:
    velocity = denoiser(*inputs)
    assert velocity.shape == inputs[0].shape
    assert velocity.dtype == torch.float32
    assert 0.3 < velocity.std() < 3
    assert torch.equal(denoiser(*inputs), velocity)


@pytest.mark.parametrize("name", ["text", "image", "reference", "reference_mask", "audio"])
def test_every_condition_counts(
    denoiser: Denoiser, inputs: tuple[Tensor, Tensor, Conditions], name: str
) -> None:
    noisy, sigma, conditions = inputs
    value = getattr(conditions, name)
    other = {name: value + draw_normal(tuple(value.shape), 5)}
    changed = denoiser(noisy, sigma, Conditions(**{**vars(conditions), **other}))
    assert not torch.allclose(changed, denoiser(*inputs), atol=1e-4)
    assert not torch.allclose(denoiser(noisy, sigma / 2, conditions), denoiser(*inputs), atol=1e-4)


def test_all_parameters_are_frozen_and_named_alike(base: Base, denoiser: Denoiser) -> None:
    empty = base.empty_denoiser()
    shapes = {name: value.shape for name, value in empty.state_dict().items()}
    assert shapes == {name: value.shape for name, value in denoiser.state_dict().items()}
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    assert not denoiser.training


def test_public_names_are_distinct(base: Base, denoiser: Denoiser) -> None:
    names = [base.public_name(name) for name, _ in denoiser.named_parameters()]
    assert None not in names and len(set(names)) == len(names)
    assert base.public_name("nowhere.weight") is None


def test_parts_are_linear_layers_with_public_names(base: Base, denoiser: Denoiser) -> None:
    named = [name for names in denoiser.parts().values() for name in names]
    assert len(set(named)) == len(named) > 0
    for name in named:
        assert isinstance(denoiser.get_submodule(name), nn.Linear)
        assert base.public_name(f"{name}.weight") == f"{base.public_name(name)}.weight"


def test_trainable_parts_receive_gradients(
    base: Base, inputs: tuple[Tensor, Tensor, Conditions]
) -> None:
    denoiser = base.load_denoiser(CPU)
    for part, names in denoiser.trainable_parts().items():
        denoiser.zero_grad(set_to_none=True)
        denoiser.requires_grad_(False)
        for name in names:
            denoiser.get_submodule(name).requires_grad_(True)
        denoiser(*inputs).square().mean().backward()
        for name, parameter in denoiser.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, f"{part}: {name}"
            assert parameter.grad is None or parameter.grad.isfinite().all()


def test_blocks_hold_most_parts(denoiser: Denoiser) -> None:
    inside = {id(module) for block in denoiser.blocks() for module in block.modules()}
    named = [name for names in denoiser.parts().values() for name in names]
    held = [name for name in named if id(denoiser.get_submodule(name)) in inside]
    assert len(denoiser.blocks()) > 1
    assert len(held) > len(named) / 2


def test_a_base_knows_its_problems_and_itself(base: Base) -> None:
    assert base.problems() == []
    assert base.fingerprint() == base.fingerprint()
    assert len(base.fingerprint()) == 64
