"""The same step in this project."""

from collections.abc import Callable
from functools import partial

from case import AUDIO_SCALE, TEXT_SCALE, Inputs, one_block
from torch import Tensor

from kit.models.wan import Wan
from kit.sampling.pipeline import TalkSampler


def make_step(network: Wan, inputs: Inputs, *, together: bool) -> Callable[[], Tensor]:
    """Make a denoising step of one chunk; the first call also finds what all steps share."""
    sampler = TalkSampler(text_scale=TEXT_SCALE, audio_scale=AUDIO_SCALE, together=together)
    with one_block(network.transformer):
        network(inputs.noisy, inputs.sigma[None], inputs.conditions)
    velocity = sampler.guided(network, inputs.conditions, inputs.null_text)
    return partial(velocity, inputs.noisy, inputs.sigma)
