"""A base in Wan2.1's own layout computes what the public InfiniteTalk code computes with it."""

import copy

import pytest
import torch

from kit.models.base import Encoders
from kit.models.wan_base import WanBase
from tests import published
from tests.originals import draw_states, write_original

CPU = torch.device("cpu")
LIMIT = 2e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> WanBase:
    folder = write_original(tmp_path_factory.mktemp("wan"), draw_states(published.SEED))
    audio = str(folder / "infinitetalk.safetensors")
    return WanBase(path=str(folder), audio_weights=audio, dtype="float32")


@pytest.fixture(scope="module")
def encoders(base: WanBase) -> Encoders:
    return base.load_encoders(CPU)


@pytest.mark.parametrize(("name", "speakers"), published.SPEAKERS.items())
@torch.no_grad()
def test_velocity(base: WanBase, name: str, speakers: int) -> None:
    denoiser, expected = base.load_denoiser(CPU), published.facts()[name]
    velocity = denoiser(*published.noisy_latents(), published.conditions(speakers))
    published.assert_agrees(velocity, expected, LIMIT)


def test_what_is_heard_and_who_speaks_matters(base: WanBase) -> None:
    velocities = [published.facts()[name]["values"] for name in published.SPEAKERS]
    for one, other in zip(velocities, velocities[1:] + velocities[:1], strict=True):
        assert (torch.tensor(one) - torch.tensor(other)).abs().max() > 1e-3


def test_video(encoders: Encoders) -> None:
    expected = published.facts()
    latents = encoders.encode_video(published.video())
    published.assert_agrees(latents, expected["video to latents"], LIMIT)
    pixels = encoders.decode_video(published.latents())
    published.assert_agrees(pixels, expected["latents to video"], LIMIT)


def test_text(encoders: Encoders) -> None:
    (states,) = encoders.encode_text([published.TEXT])
    published.assert_agrees(states[None], published.facts()["text"], LIMIT)


def test_picture(encoders: Encoders) -> None:
    tokens = encoders.encode_image(published.picture())
    published.assert_agrees(tokens, published.facts()["picture"], LIMIT)


def test_speech(encoders: Encoders) -> None:
    features = encoders.encode_speech(published.speech())
    published.assert_agrees(features, published.facts()["speech"], LIMIT)


def test_a_difference_would_be_seen(encoders: Encoders) -> None:
    features = encoders.encode_speech(published.speech())
    expected = copy.deepcopy(published.facts()["speech"])
    with pytest.raises(AssertionError):
        published.assert_agrees(features + 1e-3 * features.std(), expected, LIMIT)
