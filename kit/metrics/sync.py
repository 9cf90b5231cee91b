"""Whether a mouth moves with the sound: agreement, delay, rest in silence."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.batch import SAMPLE_RATE

FLOOR_DB, CEILING_DB = -45.0, -10.0
"""Level of a frame, in dB of full scale, that counts as silence and as loudest: 22 below and 13
above the -23 LUFS to which speech is brought."""

GUARD_FRAMES = 4
"""Frames after speech in which a mouth may still be closing."""

# A spread below this part of the largest value is rounding, not movement.
_LEAST_SPREAD = 1e-6


@dataclass(frozen=True)
class LipSync:
    """Agreement of a mouth and a sound.

    Attributes:
        r: Pearson correlation at the best delay; 0 where either does not change.
        lag_frames: the best delay; positive where the picture is later than the sound.
    """

    r: float
    lag_frames: int


def speech_envelope(waveform: Tensor, fps: float, num_frames: int) -> Tensor:
    """Measure how loud it is around each frame, on a scale of dB.

    The level is that of two frames' time, half a frame more on each side: lips and jaw move at
    2 to 7 Hz and pass over what changes faster (Chandrasekaran et al. 2009).

    Args:
        waveform: at 16 kHz and -23 LUFS; silence follows where it is too short. [samples]
        fps: frames per second of the video.
        num_frames: frames of the video.

    Returns:
        0 is silence, 1 the loudest speech. [T]
    """
    edges = ((torch.arange(num_frames + 2) - 0.5) * SAMPLE_RATE / fps).round().long().clamp(min=0)
    power = F.pad(waveform.double().square().cumsum(0), (1, 0))
    heard = power[edges.clamp(max=len(waveform))]
    energy: Tensor = (heard[2:] - heard[:-2]) / (edges[2:] - edges[:-2])
    level = 10 * energy.clamp(min=1e-12).log10()
    return ((level - FLOOR_DB) / (CEILING_DB - FLOOR_DB)).clamp(0, 1).float()


def lip_sync(opening: Tensor, envelope: Tensor, max_lag: int = 8) -> LipSync:
    """Correlate a mouth with a sound at each delay and keep the highest.

    The highest of many is above 0 by chance: about 0.2 for white noise of 100 frames.

    Args:
        opening: how far the mouth is open, in any unit. [T]
        envelope: how loud the sound is. [T]
        max_lag: longest delay tried, in frames; at most half of the clip is shifted out.
    """
    reach = min(max_lag, len(opening) // 2)
    # The shortest delay comes first and wins a tie.
    lags = sorted(range(-reach, reach + 1), key=abs)
    scores = [_correlation(*_shifted(opening, envelope, lag)) for lag in lags]
    r, lag = max(zip(scores, lags, strict=True), key=lambda pair: pair[0])
    return LipSync(r, lag) if any(scores) else LipSync(0.0, 0)


def silence_opening(
    opening: Tensor,
    envelope: Tensor,
    full_opening: float,
    closed_opening: float = 0.0,
    guard_frames: int = GUARD_FRAMES,
) -> float | None:
    """Measure how far a mouth stands open while its sound is silent.

    Args:
        opening: how far the mouth is open. [T]
        envelope: how loud its sound is, 0 in silence. [T]
        full_opening: opening of a mouth wide open, in the unit of `opening`.
        closed_opening: opening that a closed mouth shows, below full_opening.
        guard_frames: frames left out after speech.

    Returns:
        Mean over silent frames, 0 closed to 1 wide open; None where no frame is silent.
    """
    speaks = F.pad((envelope > 0).float()[None], (guard_frames, 0))
    silent = F.max_pool1d(speaks, guard_frames + 1, stride=1)[0] == 0
    if not silent.any():
        return None
    share = (opening[silent] - closed_opening) / (full_opening - closed_opening)
    return share.clamp(0, 1).mean().item()


def cross_talk(listener_opening: Tensor, speaker_envelope: Tensor) -> float:
    """Correlate a listener's mouth with the speech of another, at the best delay.

    It does not tell how far the mouth moves; `silence_opening` of the listener does.

    Args:
        listener_opening: mouth of one who is silent all the time. [T]
        speaker_envelope: loudness of the other's speech. [T]
    """
    return lip_sync(listener_opening, speaker_envelope).r


def _shifted(opening: Tensor, envelope: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    count = len(opening) - abs(lag)
    return opening[max(lag, 0) :][:count], envelope[max(-lag, 0) :][:count]


def _correlation(one: Tensor, other: Tensor) -> float:
    if not (_changes(one) and _changes(other)):
        return 0.0
    return torch.corrcoef(torch.stack([one, other]).double())[0, 1].item()


def _changes(values: Tensor) -> bool:
    spread = values.max() - values.min()
    return spread.item() > _LEAST_SPREAD * values.abs().max().item()
