"""What both programs compute: one denoising step of the same network on the same inputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kit.batch import Conditions
from kit.draws import draw_normal
from kit.models.audio import AudioSizes
from kit.models.checkpoints import draw_weights
from kit.models.wan import Wan
from kit.reference import first_frame_mask

TEXT_SCALE, AUDIO_SCALE = 5.0, 4.0
TEXT_TOKENS, NEGATIVE_TOKENS = 64, 128
"""A caption of three sentences, and about what the public negative prompt comes to."""


@dataclass(frozen=True)
class Case:
    """Sizes of a step; all that is not here is as in the public 14B weights.

    Attributes:
        speakers: 1 or 2, side by side.
        dtype: of the weights, float32 or bfloat16.
        grid: latent frames, rows and columns of video tokens.
        dim: width of the network; heads have 64 channels, the feed-forward layers 4 * dim.
        blocks: depth.
        audio_intermediate_dim: width inside the audio projector.
    """

    speakers: int
    dtype: str
    grid: tuple[int, int, int] = (9, 20, 20)
    dim: int = 768
    blocks: int = 8
    audio_intermediate_dim: int = 64

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.dim // 64


@dataclass(frozen=True)
class Inputs:
    """What a step is given.

    Attributes:
        noisy: [1, 16, F, H, W]
        sigma: noise level. []
        conditions: all present.
        null_text: states of the negative text. [1, L, D]
    """

    noisy: Tensor
    sigma: Tensor
    conditions: Conditions
    null_text: Tensor


def draw_network(case: Case) -> Wan:
    """Draw our network; all its weights can be told exactly in the case's dtype."""
    config = {
        "num_attention_heads": case.heads,
        "attention_head_dim": 64,
        "in_channels": 36,
        "out_channels": 16,
        "ffn_dim": 4 * case.dim,
        "num_layers": case.blocks,
        "image_dim": 1280,
        "added_kv_proj_dim": case.dim,
    }
    sizes = AudioSizes(intermediate_dim=case.audio_intermediate_dim)
    with torch.device("meta"):
        network = Wan(config, audio=sizes)
    network.to_empty(device="cpu")
    draw_weights(network, 1, case.torch_dtype)
    for parameter in network.parameters():
        parameter.data.copy_(parameter.to(case.torch_dtype))
    return network.requires_grad_(False).eval()


@contextmanager
def one_block(network: Any) -> Iterator[None]:
    """Leave one block of a network, for a first call: it loads and compiles what all calls need."""
    blocks = network.blocks
    network.blocks = blocks[:1]
    yield
    network.blocks = blocks


def draw_inputs(case: Case) -> Inputs:
    """Draw what a step is given."""
    num_frames, rows, columns = case.grid
    video = (1, 16, num_frames, 2 * rows, 2 * columns)
    return Inputs(
        noisy=draw_normal(video, "noisy"),
        sigma=torch.tensor(0.7),
        conditions=Conditions(
            text=draw_normal((1, TEXT_TOKENS, 4096), "text"),
            image=draw_normal((1, 257, 1280), "image"),
            reference=draw_normal(video, "reference"),
            reference_mask=first_frame_mask(1, num_frames),
            audio=draw_normal((1, case.speakers, 4 * num_frames - 3, 5, 12, 768), "audio"),
            num_speakers=torch.tensor([case.speakers]),
            speaker_masks=_side_by_side(case.speakers, 2 * rows, 2 * columns),
        ),
        null_text=draw_normal((1, NEGATIVE_TOKENS, 4096), "null_text"),
    )


def _side_by_side(speakers: int, height: int, width: int) -> Tensor:
    """Give each speaker a box, with background around it. [1, S, H, W]"""
    masks = torch.zeros(1, speakers, height, width)
    share = width // speakers
    for speaker in range(speakers):
        masks[0, speaker, 4:-4, speaker * share + 2 : (speaker + 1) * share - 2] = 1
    return masks
