"""A video among several processes is the video of one."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

from kit.batch import Conditions
from kit.draws import draw_normal
from kit.models.split import Processes
from kit.models.wan import Wan
from kit.models.wan_base import WanBase
from tests.processes import run_together

TINY_BASE = Path(__file__).parents[1] / "data" / "tiny_base"
FRAMES = 5


def load() -> Wan:
    base = WanBase(path=str(TINY_BASE), random_weights=0, dtype="float32")
    wan = base.load_denoiser(torch.device("cpu"))
    assert isinstance(wan, Wan)
    # All that starts at zero would hide what is lost.
    for number, parameter in enumerate(wan.parameters()):
        parameter.data = parameter.data + 0.05 * draw_normal(tuple(parameter.shape), number)
    return wan


def make_inputs(wan: Wan, num_speakers: int) -> tuple[Tensor, Tensor, Conditions]:
    config = wan.transformer.config
    audio_dim = wan.audio_proj.proj1_vf.in_features // 8
    masks = torch.zeros(1, num_speakers, 4, 6)
    for speaker in range(num_speakers):
        masks[:, speaker, :, 3 * speaker : 3 * speaker + 3] = 1
    frames = 4 * FRAMES - 3
    conditions = Conditions(
        text=draw_normal((1, 7, config.text_dim), "text"),
        image=draw_normal((1, 257, config.image_dim), "image"),
        reference=draw_normal((1, 16, FRAMES, 4, 6), "reference"),
        reference_mask=torch.zeros(1, 4, FRAMES),
        audio=draw_normal((1, num_speakers, frames, 5, 1, audio_dim), "audio"),
        num_speakers=torch.tensor([num_speakers]),
        speaker_masks=masks,
    )
    return draw_normal((1, 16, FRAMES, 4, 6), "noisy"), torch.tensor([0.7]), conditions


def predict(num_speakers: int, every: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Predict and find gradients, alone or as one of several processes that share the video."""
    wan = load()
    wan.requires_grad_(True)
    wan.checkpoint_activations(every)
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
        group = distributed.group.WORLD
        assert group is not None
        wan.processes = Processes(group, distributed.get_rank(), distributed.get_world_size())
    velocity = wan(*make_inputs(wan, num_speakers))
    (velocity * draw_normal(tuple(velocity.shape), "loss")).sum().backward()
    gradients = {name: p.grad for name, p in wan.named_parameters() if p.grad is not None}
    return velocity.detach(), gradients


@pytest.mark.parametrize(("world", "num_speakers", "every"), [(2, 1, 0), (2, 2, 1), (3, 1, 0)])
def test_equals_one_process(world: int, num_speakers: int, every: int) -> None:
    expected, gradients = predict(num_speakers)
    found = run_together(world, predict, num_speakers, every)
    for velocity, _ in found:
        torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        parts = [own.get(name, torch.zeros(())) for _, own in found]
        mean = torch.stack([part.expand(gradient.shape) for part in parts]).mean(0)
        scale = float(gradient.abs().max())
        torch.testing.assert_close(mean, gradient, atol=1e-5 * scale + 1e-7, rtol=1e-4)
