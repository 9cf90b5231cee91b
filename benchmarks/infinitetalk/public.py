"""The public InfiniteTalk code on a CPU, with stand-ins for what runs on a GPU only.

Its networks are imported from a checkout as they are. Attention kernels are replaced by torch's
own, which is what they stand for; nothing else of its arithmetic is touched.
"""

import importlib
import importlib.util
import shutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from case import AUDIO_SCALE, TEXT_SCALE, Case, Inputs, draw_network, one_block
from torch import Tensor

from kit.models.keys import public_name
from kit.models.wan import Wan

NETWORK_FILE = Path("wan/modules/multitalk_model.py")
UNUSED = ("imageio", "soundfile", "skimage")
"""Imported beside the network, for reading and writing files."""


def missing(checkout: Path) -> str | None:
    """Say what the public code needs and is not here."""
    if not (checkout / NETWORK_FILE).is_file():
        return f"{checkout}: no checkout of github.com/MeiGen-AI/InfiniteTalk"
    if importlib.util.find_spec("einops") is None:
        return "the public code needs einops: python -m pip install einops"
    return None


def compiles() -> bool:
    """Tell whether what the public code marks for torch.compile can be compiled here."""
    return shutil.which("g++") is not None


def load(checkout: Path, case: Case) -> Any:
    """Load the public network with our weights under its names."""
    return imitate(checkout, draw_network(case), case.torch_dtype)


def imitate(checkout: Path, ours: Wan, dtype: torch.dtype) -> Any:
    """Build the public network in the sizes of ours, with its weights."""
    network = import_networks(checkout).WanModel
    network.enable_teacache = False
    sizes = ours.transformer.config
    with torch.device("meta"):
        model = network(
            model_type="i2v",
            in_dim=36,
            dim=sizes.num_attention_heads * sizes.attention_head_dim,
            ffn_dim=sizes.ffn_dim,
            text_dim=sizes.text_dim,
            num_heads=sizes.num_attention_heads,
            num_layers=sizes.num_layers,
            intermediate_dim=ours.audio_proj.proj2.in_features,
            weight_init=False,
        )
    model.to_empty(device="cpu").init_freqs()
    weights = ours.state_dict()
    model.load_state_dict({public_name(name): value for name, value in weights.items()})
    model.to(dtype).eval().requires_grad_(False)
    # On a GPU, autocast computes these in float32.
    for part in (model.time_embedding, model.time_projection, model.head):
        part.float()
    return model


class Step:
    """A denoising step as the public sampling loop does it: three calls, then guidance."""

    def __init__(self, model: Any, case: Case, inputs: Inputs) -> None:
        given, dtype = inputs.conditions, case.torch_dtype
        self.model, self.inputs = model, inputs
        speech = given.audio[0].to(dtype)
        silence = torch.zeros_like(speech)[-1:]
        text, null_text = given.text[0].to(dtype), inputs.null_text[0].to(dtype)
        mask = given.reference_mask[..., None, None].expand(-1, -1, -1, *inputs.noisy.shape[3:])
        self.shared = {
            "clip_fea": given.image.to(dtype),
            "seq_len": case.grid[0] * case.grid[1] * case.grid[2],
            "y": torch.cat([mask, given.reference], dim=1).to(dtype),
            "ref_target_masks": regions(given.speaker_masks[0]),
        }
        self.branches = ((text, speech), (null_text, speech), (null_text, silence))
        with one_block(model):
            self._call(text, speech)

    def __call__(self) -> Tensor:
        """Predict the guided velocity. [1, C, F, H, W]"""
        full, no_text, none = (self._call(text, audio) for text, audio in self.branches)
        return (none + TEXT_SCALE * (full - no_text) + AUDIO_SCALE * (no_text - none))[None]

    def _call(self, text: Tensor, audio: Tensor) -> Tensor:
        timestep = 1000 * self.inputs.sigma[None]
        noisy = [self.inputs.noisy[0]]
        velocity: Tensor = self.model(
            noisy, t=timestep, context=[text], audio=audio, **self.shared
        )[0]
        return velocity


def regions(speaker_masks: Tensor) -> Tensor:
    """Give two persons and the background; a single speaker is everywhere. [3, H, W]"""
    if len(speaker_masks) == 1:
        return torch.ones(3, *speaker_masks.shape[1:])
    background = (speaker_masks.sum(dim=0, keepdim=True) == 0).float()
    return torch.cat([speaker_masks, background])


@cache
def import_networks(checkout: Path) -> Any:
    """Import the file with the network, but not the packages around it, which need a GPU."""
    for name in ("wan", "wan.modules", "wan.utils"):
        stand_in(name).__path__ = [str(checkout.joinpath(*name.split(".")))]
    for name in UNUSED:
        if importlib.util.find_spec(name) is None:
            stand_in(name).color = None
    stand_in("xfuser")
    stand_in("xfuser.core")
    parallel = stand_in("xfuser.core.distributed")
    for name in ("rank", "world_size"):
        setattr(parallel, f"get_sequence_parallel_{name}", None)
    parallel.get_sp_group = None
    stand_in("xformers").ops = stand_in("xformers.ops")
    sys.modules["xformers.ops"].memory_efficient_attention = attend
    torch.cuda.empty_cache = torch.cuda.ipc_collect = lambda: None
    with_compiler = torch.compile
    if not compiles():
        torch.compile = lambda function, **options: function
    networks = importlib.import_module("wan.modules.multitalk_model")
    torch.compile = with_compiler
    networks.flash_attention = attend
    return networks


def stand_in(name: str) -> Any:
    """Give an empty module of a name that the public code imports; the same for the same name."""
    return sys.modules.setdefault(name, ModuleType(name))


def attend(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    """Attend to all keys, in the dtype of the values. [B, N, h, d]"""
    query, key, value = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
