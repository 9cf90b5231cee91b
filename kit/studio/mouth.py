"""The rule from sound to mouth.

For frame k of a video at 25 frames per second only sound up to (k + 1) / 25 s counts. Every 10 ms
the level of the last 60 ms is measured in dB of full scale. Opening aims at 0 below -40 dB and at
1 above -17 dB, in proportion between them; it follows its aim upwards with a time constant of
20 ms, downwards with 60 ms, and is exactly 0 below 0.02. Width aims at the spectral centroid of
the same 60 ms on a log scale, 0 at 300 Hz and 1 at 3000 Hz, and at 0.5 in silence; it follows with
50 ms. The levels hold for tracks of -23 LUFS, which is what shards contain: syllables of the
studio's voices then lie between -31 and -16 dB, its background noise below -50 dB.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kit.batch import SAMPLE_RATE

FPS = 25
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS

FLOOR_DB = -40.0
CEILING_DB = -17.0
NEUTRAL_WIDTH = 0.5

_STEP = SAMPLE_RATE // 100
_WINDOW = 6 * _STEP
_STEPS_PER_FRAME = SAMPLES_PER_FRAME // _STEP
_ATTACK, _RELEASE, _WIDTH = (1 - math.exp(-10 / ms) for ms in (20, 60, 50))
_SMALLEST_OPENING = 0.02
_CENTROID_HZ = (300.0, 3000.0)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Mouth:
    """What a mouth does.

    Attributes:
        opening: 0 closed to 1 wide open. [T]
        width: 0 rounded to 1 spread. [T]
    """

    opening: Floats
    width: Floats


def follow_speech(track: Tensor, num_frames: int) -> Mouth:
    """Move a mouth by the sound.

    Args:
        track: at 16 kHz and -23 LUFS; silence follows its end. [samples]
        num_frames: T.
    """
    pieces = _last_pieces(track, num_frames * _STEPS_PER_FRAME)  # [steps, window]
    level = 10 * np.log10(np.mean(pieces**2, axis=1) + 1e-12)
    aim = np.clip((level - FLOOR_DB) / (CEILING_DB - FLOOR_DB), 0, 1)
    opening = _followed(aim, 0.0, _ATTACK, _RELEASE)
    spread = np.where(aim > 0, _spread(pieces), NEUTRAL_WIDTH)
    width = _followed(spread, NEUTRAL_WIDTH, _WIDTH, _WIDTH)
    last = slice(_STEPS_PER_FRAME - 1, None, _STEPS_PER_FRAME)
    opening, width = opening[last], width[last]
    return Mouth(np.where(opening < _SMALLEST_OPENING, 0.0, opening), width)


def _last_pieces(track: Tensor, num_steps: int) -> Floats:
    sound = np.zeros(_WINDOW - _STEP + num_steps * _STEP)
    known = track[: num_steps * _STEP].double().numpy()
    sound[_WINDOW - _STEP : _WINDOW - _STEP + len(known)] = known
    return np.lib.stride_tricks.sliding_window_view(sound, _WINDOW)[::_STEP]


def _spread(pieces: Floats) -> Floats:
    power = np.abs(np.fft.rfft(pieces * np.hanning(_WINDOW), axis=1)) ** 2
    frequencies = np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE)
    centroid = power @ frequencies / (power.sum(axis=1) + 1e-12)
    low, high = np.log(_CENTROID_HZ)
    share = (np.log(np.maximum(centroid, 1.0)) - low) / (high - low)
    return np.asarray(np.clip(share, 0, 1))


def _followed(aim: Floats, start: float, up: float, down: float) -> Floats:
    values, value = np.empty(len(aim)), start
    for step, goal in enumerate(aim.tolist()):
        value += (up if goal > value else down) * (goal - value)
        values[step] = value
    return values
