"""What both sides train: the same network, on the same batches."""

from dataclasses import dataclass

import torch
from torch import nn

from kit.adapters.lora import ADAPTER_NAME, Part
from kit.batch import Batch, Conditions
from kit.draws import draw_normal
from kit.models.audio import AudioSizes
from kit.models.checkpoints import draw_weights
from kit.models.wan import Wan
from kit.objectives.flow_matching import FlowMatching
from kit.reference import first_frame_mask

RANK, RATE, CLIP_NORM, SEED = 32, 1e-4, 1.0, 0
OBJECTIVE = FlowMatching(shift=3.0)
FRAMES, SIDE = 5, 24
"""Of the latents: 720 video tokens."""

TEXT_TOKENS, NEGATIVE_TOKENS = 64, 128
"""A caption of three sentences, and about what the public negative prompt comes to."""


@dataclass(frozen=True)
class Shape:
    """A network and how it trains.

    Attributes:
        peer: `diffusers`, whose Wan has no audio, or `infinitetalk`.
        dtype: of the frozen weights; below float32, autocast takes it too.
        checkpoint: recompute every n-th block in the backward pass; 0 none.
        text_dim: width of the text states.
    """

    peer: str
    dtype: str
    checkpoint: int
    text_dim: int = 512

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def uses_autocast(self) -> bool:
        """Whether factors, which are float32, are multiplied in the dtype of the weights."""
        return self.dtype != "float32"

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that get an adapter."""
        return (
            ("attention", "ffn", "audio") if self.peer == "infinitetalk" else ("attention", "ffn")
        )

    def draw_network(self) -> Wan:
        """Draw our network; its audio attention adds nothing where the peer has none."""
        config = {
            "num_attention_heads": 6,
            "attention_head_dim": 128,
            "in_channels": 36,
            "out_channels": 16,
            "ffn_dim": 3072,
            "num_layers": 12,
            "text_dim": self.text_dim,
            "image_dim": 1280,
            "added_kv_proj_dim": 768,
        }
        with torch.device("meta"):
            network = Wan(config, audio=AudioSizes())
        network.to_empty(device="cpu")
        draw_weights(network, 1, self.torch_dtype)
        if self.peer == "diffusers":
            for block in network.transformer.blocks:
                block.audio_cross_attn.proj.requires_grad_(False).weight.zero_()
                block.audio_cross_attn.proj.bias.zero_()
        return network.requires_grad_(False).eval()

    def draw_batches(self, count: int) -> list[Batch]:
        """Draw a sample, and make batches that differ in noise and its level."""
        video = (1, 16, FRAMES, SIDE, SIDE)
        conditions = Conditions(
            text=draw_normal((1, TEXT_TOKENS, self.text_dim), "text"),
            image=draw_normal((1, 257, 1280), "image"),
            reference=draw_normal(video, "reference"),
            reference_mask=first_frame_mask(1, FRAMES),
            audio=draw_normal((1, 1, 4 * FRAMES - 3, 5, 12, 768), "audio"),
            num_speakers=torch.tensor([1]),
            speaker_masks=torch.ones(1, 1, SIDE, SIDE),
        )
        return [
            Batch(
                keys=("drawn",),
                draws=torch.tensor([[0, number]]),
                latents=draw_normal(video, "latents"),
                conditions=conditions,
                null_text=draw_normal((1, NEGATIVE_TOKENS, self.text_dim), "null_text"),
                num_context=torch.tensor([0]),
            )
            for number in range(count)
        ]


@torch.no_grad()
def start_factors(network: nn.Module, layers: list[str]) -> None:
    """Give the factors of layers the same beginning under whatever names."""
    for number, name in enumerate(layers):
        factor = network.get_submodule(name).lora_A[ADAPTER_NAME].weight
        factor.copy_(draw_normal(tuple(factor.shape), number) * factor.shape[1] ** -0.5)
