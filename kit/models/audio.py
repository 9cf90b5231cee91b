"""The audio parts of the denoiser: projector, cross-attention, and telling speakers apart.

K audio tokens for each latent frame and speaker, n video tokens in a latent frame, N = F * n.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

from kit.batch import AUDIO_WINDOW
from kit.models.attention import KeysValues, attend, rotate, rotation, split_heads
from kit.models.split import Split

BAND_WIDTH = 4
BACKGROUND_POSITION = 12


@dataclass(frozen=True)
class AudioSizes:
    """Sizes of the audio parts; the defaults are those of the public 14B weights.

    Attributes:
        num_layers: layers of the speech encoder whose outputs are stacked.
        audio_dim: width of the speech encoder.
        intermediate_dim: width inside the projector.
        output_dim: width of an audio token.
        context_tokens: audio tokens for each latent frame and speaker.
    """

    num_layers: int = 12
    audio_dim: int = 768
    intermediate_dim: int = 512
    output_dim: int = 768
    context_tokens: int = 32


class Speakers(NamedTuple):
    """What all blocks need to tell speakers apart.

    Attributes:
        regions: a speaker's share of each token of a frame, every row with sum 1; the last row is
            the background. A row of zeros is a region without tokens. [B, S + 1, n]
        active: False for slots that only pad the batch. [B, S]
        band_starts: lowest position of each speaker. [B, S]
        centres: position of each speaker's audio tokens. Those of a sample's video tokens are
            equal to it where the sample has a single speaker, and nothing is rotated. [B, S]
        is_one_of_several: False where a sample has a single speaker. [B, 1]
    """

    regions: Tensor
    active: Tensor
    band_starts: Tensor
    centres: Tensor
    is_one_of_several: Tensor


class AudioProjector(nn.Module):
    """Turn windows of speech features into audio tokens for each latent frame.

    The first latent frame is one video frame and sees its whole window of five. Each later one
    covers four video frames and sees the eight speech frames from two before to two after them.
    """

    def __init__(self, sizes: AudioSizes) -> None:
        super().__init__()
        frame_dim = sizes.num_layers * sizes.audio_dim
        self.context_tokens = sizes.context_tokens
        self.proj1 = nn.Linear(AUDIO_WINDOW * frame_dim, sizes.intermediate_dim)
        self.proj1_vf = nn.Linear(8 * frame_dim, sizes.intermediate_dim)
        self.proj2 = nn.Linear(sizes.intermediate_dim, sizes.intermediate_dim)
        self.proj3 = nn.Linear(sizes.intermediate_dim, sizes.context_tokens * sizes.output_dim)
        self.norm = FP32LayerNorm(sizes.output_dim, eps=1e-5)

    def forward(self, audio: Tensor) -> Tensor:
        """Project features [B, S, T, 5, M, D] to tokens [B, S, F, K, output_dim]."""
        first, later = audio[:, :, :1], audio[:, :, 1:]
        groups = later.reshape(*later.shape[:2], later.shape[2] // 4, 4, *later.shape[3:])
        before, middle, after = groups[:, :, :, 0], groups[:, :, :, 1:3, 2], groups[:, :, :, 3]
        spans = torch.cat([before[:, :, :, :3], middle, after[:, :, :, 2:]], dim=3)
        hidden = torch.cat([self.proj1(first.flatten(3)), self.proj1_vf(spans.flatten(3))], dim=2)
        tokens = self.proj3(F.relu(self.proj2(F.relu(hidden))))
        normed: Tensor = self.norm(tokens.reshape(*tokens.shape[:3], self.context_tokens, -1))
        return normed


class AudioCrossAttention(nn.Module):
    """Let each video token hear the audio tokens of its own latent frame."""

    def __init__(self, dim: int, num_heads: int, audio_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(audio_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        heard: KeysValues,
        positions: Tensor | None,
        attend: Callable[[Tensor, KeysValues], Tensor],
    ) -> Tensor:
        """Attend within each latent frame.

        Args:
            x: video tokens. [B, N, D]
            heard: audio tokens of each frame, from `keys_values`. [B * F, S * K, h, d]
            positions: of the video tokens, continuous; None if all samples have one speaker. [B, N]
            attend: mixes values.
        """
        query = split_heads(self.q_linear(x), self.num_heads)  # [B, N, h, d]
        if positions is not None:
            query = rotate(query, rotation(positions, query.shape[-1]))
        by_frame = query.reshape(len(heard.key), -1, *query.shape[2:])  # [B * F, n, h, d]
        spoken: Tensor = self.proj(attend(by_frame, heard).reshape(x.shape))
        return spoken

    def keys_values(self, audio: Tensor, speakers: Speakers | None) -> KeysValues:
        """Find what can be heard in each latent frame. [B, S, F, K, D'] to [B * F, S * K, h, d]"""
        num_frames, num_tokens = audio.shape[2:4]
        by_frame = audio.transpose(1, 2).flatten(2, 3)  # [B, F, S * K, D']
        key, value = (
            split_heads(half, self.num_heads) for half in self.kv_linear(by_frame).chunk(2, dim=-1)
        )  # [B, F, S * K, h, d]
        bias = None
        if speakers is not None:
            positions = speakers.centres.repeat_interleave(num_tokens, dim=1)
            key = rotate(key, rotation(positions[:, None], key.shape[-1])).to(value.dtype)
            value = value.contiguous()  # a view would keep the keys as they were in memory
            # Alone in a batch, a sample has no empty slots.
            if len(audio) > 1:
                bias = silence(speakers.active, num_frames, num_tokens)
        return KeysValues(key.flatten(0, 1), value.flatten(0, 1), bias)


def silence(active: Tensor, num_frames: int, num_tokens: int) -> Tensor:
    """Hide the audio tokens of empty slots. [B, S] to [B * F, 1, 1, S * K]"""
    bias = torch.zeros(active.shape, device=active.device).masked_fill(~active, -torch.inf)
    each_token = bias.repeat_interleave(num_tokens, dim=1)  # [B, S * K]
    return each_token.repeat_interleave(num_frames, dim=0)[:, None, None]


def describe_speakers(masks: Tensor, num_speakers: Tensor, grid: tuple[int, int]) -> Speakers:
    """Bring speaker masks [B, S, H, W] to the token grid and lay out the speakers' positions."""
    slots = torch.arange(masks.shape[1], device=masks.device)
    active = slots < num_speakers[:, None]
    inside = F.interpolate(masks.float(), size=grid, mode="nearest").flatten(2) > 0  # [B, S, n]
    inside = inside & active[..., None]
    rows = torch.cat([inside, ~inside.any(dim=1, keepdim=True)], dim=1).float()
    regions = rows / rows.sum(dim=-1, keepdim=True).clamp_min(1)
    several, starts = num_speakers[:, None] > 1, band_starts(num_speakers, slots)
    centres = (starts + BAND_WIDTH / 2) * several
    return Speakers(regions, active, starts, centres, several)


def band_starts(num_speakers: Tensor, slots: Tensor) -> Tensor:
    """Say where each speaker's band of positions begins: at 0 and 20 for two speakers. [B, S]

    More than two speakers have bands side by side. Source: InfiniteTalk, for two; its branch for
    ComfyUI, for more.
    """
    return torch.where(num_speakers[:, None] == 2, 20 * slots, BAND_WIDTH * slots)


@torch.no_grad()
def speaker_positions(
    query: Tensor, key: Tensor, speakers: Speakers, split: Split | None = None
) -> Tensor:
    """Place each video token near the speaker to whose region it attends most. [B, N]

    Args:
        query: rotated queries of the block's self-attention. [B, N, h, d]
        key: its rotated keys. [B, N, h, d]
        speakers: regions and bands.
        split: whose tokens the queries are, if other processes have more of them.
    """
    scores = region_scores(query, key, speakers.regions)  # [B, S + 1, N]
    low, high = scores[:, :-1].aminmax(dim=-1, keepdim=True)
    if split is not None:
        low, high = split.extremes(low, high)
    in_band = BAND_WIDTH * (scores[:, :-1] - low) / (high - low + 1e-8)
    candidates = in_band + speakers.band_starts[..., None]
    candidates = F.pad(candidates, (0, 0, 0, 1), value=BACKGROUND_POSITION)
    nearest = candidates.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)
    return nearest * speakers.is_one_of_several


def region_scores(query: Tensor, key: Tensor, regions: Tensor) -> Tensor:
    """Measure in float32 how much each token attends to each region of the first latent frame.

    It is an attention whose values are the regions, so the kernel never holds all probabilities.

    Returns:
        Mean over heads of the probability on a region's tokens. [B, S + 1, N]
    """
    num_regions, num_keys = regions.shape[1:]
    heads, dim = query.shape[2:]
    # Values are as wide as keys because fast kernels ask for it.
    values = F.pad(regions.transpose(1, 2), (0, max(dim - num_regions, 0)))
    values = values[:, :, None].expand(-1, -1, heads, -1)
    with torch.autocast(query.device.type, enabled=False):
        mixed = attend(query.float(), KeysValues(key[:, :num_keys].float(), values.float()))
    return split_heads(mixed, heads).mean(dim=2)[..., :num_regions].transpose(1, 2)
