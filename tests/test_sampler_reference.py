"""The whole sampling loop against the reference program, with its weights, noise and features."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from kit.batch import Conditions
from kit.models.audio import AudioSizes
from kit.models.encoders import VideoEncoder
from kit.models.keys import our_name
from kit.models.wan import Wan
from kit.sampling.chunks import Chunk
from kit.sampling.color import match_color
from kit.sampling.frames import StillSource
from kit.sampling.pipeline import TalkSampler
from kit.sampling.scene import Scene, chunk_conditions
from tests.outside import reference


class Done(NamedTuple):
    """What became of one chunk; `predicted` is [steps, branches, C, F, H, W]."""

    chunk: Chunk
    conditions: Conditions
    predicted: Tensor
    latents: Tensor
    decoded: Tensor
    pixels: Tensor


Run = list[Done]


class Fixture:
    """A run of the reference program: its weights, inputs and results."""

    def __init__(self) -> None:
        path = reference("sampler_single.safetensors")
        self.tensors = load_file(path)
        with safe_open(path, "pt") as reader:
            self.facts = json.loads(reader.metadata()["meta"])

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def denoiser(self) -> Wan:
        sizes = self.facts["config"]
        config = {
            "num_attention_heads": sizes["num_heads"],
            "attention_head_dim": sizes["dim"] // sizes["num_heads"],
            "in_channels": 36,
            "image_dim": 1280,
            "added_kv_proj_dim": sizes["dim"],
            **{name: sizes[name] for name in ("text_dim", "freq_dim", "ffn_dim", "num_layers")},
        }
        names = ("intermediate_dim", "output_dim", "context_tokens")
        model = Wan(config, audio=AudioSizes(**{name: sizes[name] for name in names}))
        weights = self.group("weights/")
        model.load_state_dict({our_name(key) or key: value for key, value in weights.items()})
        return model.eval()

    def sampler(self) -> TalkSampler:
        return TalkSampler(
            steps=self.facts["steps"],
            shift=self.facts["shift"],
            text_scale=self.facts["text_scale"],
            audio_scale=self.facts["audio_scale"],
            num_frames=self.facts["frame_num"],
            context_frames=self.facts["motion_frame"],
            color_correction=self.facts["color"],
        )


class GivenFeatures:
    """The fixture's video autoencoder; its features of text, image and speech are given."""

    device = torch.device("cpu")

    def __init__(self, fixture: Fixture) -> None:
        weights = fixture.group("vae/")
        vae = AutoencoderKLWan(base_dim=len(weights["encoder.conv1.weight"]), z_dim=16)
        vae.load_state_dict(convert_wan_vae_to_diffusers(weights))  # type: ignore[no-untyped-call]
        self.video = VideoEncoder(vae)
        self.inputs = fixture.group("inputs/")
        self.images = [self.inputs[f"chunk{i}.clip"] for i in range(fixture.facts["chunks"])]

    def encode_video(self, pixels: Tensor) -> Tensor:
        return self.video.encode(pixels[0])[None]

    def decode_video(self, latents: Tensor) -> Tensor:
        return self.video.decode(latents[0])[None]

    def encode_text(self, texts: Sequence[str]) -> list[Tensor]:
        return [self.inputs["text"], self.inputs["text_null"]]

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.images.pop(0)

    def encode_speech(self, waveform: Tensor) -> Tensor:
        return self.inputs["audio0"][None]

    def release(self, *parts: str) -> None:
        """Nothing was loaded."""


class SourceFrames:
    """The fixture's source video."""

    def __init__(self, frames: Tensor, size: int) -> None:
        self.stills = [StillSource(frame.numpy(), (size, size)) for frame in frames]

    def frame(self, index: int) -> Tensor:
        return self.stills[min(index, len(self.stills) - 1)].frame(0)

    def again(self) -> "SourceFrames":
        return self


class Recording(nn.Module):
    """A denoiser that keeps what it predicted. Each prediction: [branches, C, F, H, W]"""

    def __init__(self, denoiser: Wan) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.predicted: list[Tensor] = []

    def forward(self, noisy: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        velocity: Tensor = self.denoiser(noisy, sigma, conditions)
        self.predicted.append(velocity)
        return velocity


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return Fixture()


@pytest.fixture(scope="module")
def run(fixture: Fixture) -> Run:
    """Follow `TalkSampler.sample`, but with the noise of the reference program."""
    encoders, sampler = GivenFeatures(fixture), fixture.sampler()
    source = SourceFrames(encoders.inputs["source_video"], fixture.facts["size"])
    scene = Scene("", torch.zeros(1, 1), source, torch.ones(1, 8, 8))
    with torch.no_grad():
        encoded = sampler.encode(encoders, scene)
        done: list[Done] = []
        for chunk in sampler.plan(encoded.num_frames):
            frame = source.frame(chunk.start)
            conditions = chunk_conditions(encoders, encoded, chunk, frame)
            given = done[-1].pixels[:, -sampler.context_frames :] if done else frame[:, None]
            recording = Recording(fixture.denoiser())
            latents = sampler.denoise(
                sampler.guided(recording, conditions, encoded.null_text),
                encoders.inputs[f"chunk{chunk.index}.noise"][None],
                encoders.encode_video(given[None]),
                lambda step: None,
            )
            decoded = encoders.decode_video(latents)[0]
            pixels = match_color(decoded, source.frame(0), sampler.color_correction)
            predicted = torch.stack(recording.predicted)
            done.append(Done(chunk, conditions, predicted, latents, decoded, pixels))
    return done


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def test_chunks_and_their_conditions(fixture: Fixture, run: Run) -> None:
    inter = fixture.group("inter/")
    assert len(run) == fixture.facts["chunks"] == 3
    for done in run:
        name, conditions = f"chunk{done.chunk.index}", done.conditions
        assert torch.equal(conditions.audio[0], inter[f"{name}.audio"])
        assert (conditions.reference - inter[f"{name}.y"][:, 4:]).abs().max() < 1e-4
        assert torch.equal(conditions.reference_mask, inter[f"{name}.y"][:, :4, :, 0, 0])


def test_levels(fixture: Fixture) -> None:
    sigmas = fixture.sampler().sigmas
    for step in range(fixture.facts["steps"]):
        expected = fixture.tensors[f"inter/chunk0.step{step}.timestep"]
        assert 1000 * sigmas[step] == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.parametrize("branch", ["cond", "drop_text", "uncond"])
def test_velocities_of_the_first_chunk(fixture: Fixture, run: Run, branch: str) -> None:
    number = ["cond", "drop_text", "uncond"].index(branch)
    for step in range(fixture.facts["steps"]):
        expected = fixture.tensors[f"inter/chunk0.step{step}.velocity_{branch}"]
        assert relative(run[0].predicted[step, number], expected) < 1e-4


def test_decoded_chunks(fixture: Fixture, run: Run) -> None:
    for done in run:
        expected = fixture.group(f"inter/chunk{done.chunk.index}.")
        assert relative(done.latents[0], expected["x0"]) < 1e-4
        assert (done.decoded - expected["decoded"]).abs().max() < 1e-3


def test_the_video(fixture: Fixture, run: Run) -> None:
    shown = [
        done.pixels[:, done.chunk.num_context : done.chunk.num_context + done.chunk.num_shown]
        for done in run
    ]
    video, expected = torch.cat(shown, dim=1), fixture.tensors["outputs/video"]
    assert video.shape == expected.shape
    assert (video - expected).abs().max() < 2e-3
    assert (video - expected).abs().mean() < 1e-5
