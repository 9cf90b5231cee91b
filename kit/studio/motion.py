"""How characters and the camera move, as functions of time that follow from a seed."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kit.draws import seed_of
from kit.studio.mouth import FPS

Floats = NDArray[np.float64]

_BLINK = (0.45, 0.0, 0.0, 0.55)
"""How far the eyes are open in the frames of a blink."""

_STATIC_CAMERAS = 0.7
_LARGEST_CAMERA_MOVE = 0.15


@dataclass(frozen=True)
class Motion:
    """What a character does beside speaking; the head's unit is half a face's width.

    Attributes:
        sway: of the head to the right, in head units. [T]
        bob: of the head downwards, in head units. [T]
        tilt: of the head, clockwise, in radians. [T]
        breath: of the body upwards, in head units. [T]
        eyes: 0 closed to 1 open. [T]
        gaze: where the eyes turn, right and down, -1 to 1. [T, 2]
    """

    sway: Floats
    bob: Floats
    tilt: Floats
    breath: Floats
    eyes: Floats
    gaze: Floats


@dataclass(frozen=True)
class Camera:
    """How the picture is cut from the scene.

    Attributes:
        zoom: 1 and more enlarges around the middle. [T]
        pan: what the camera moves right and down, in picture heights. [T, 2]
    """

    zoom: Floats
    pan: Floats


def draw_motion(seed: int, num_frames: int) -> Motion:
    """Make a character's motion; a longer one begins with the shorter one."""
    random = np.random.default_rng(seed_of("motion", seed))
    time = np.arange(num_frames) / FPS
    return Motion(
        sway=_drift(time, 0.14, random),
        bob=_drift(time, 0.06, random),
        tilt=_drift(time, 0.09, random),
        breath=0.03 * np.sin(2 * math.pi * random.uniform(0.22, 0.35) * time),
        eyes=_blinks(num_frames, random.spawn(1)[0]),
        gaze=_glances(num_frames, random.spawn(1)[0]),
    )


def draw_camera(seed: int, num_frames: int) -> Camera:
    """Make a camera that mostly stands still, or else slowly pans or zooms over the whole clip."""
    random = np.random.default_rng(seed_of("camera", seed))
    share = np.linspace(0, 1, num_frames)
    zoom, pan = np.ones(num_frames), np.zeros((num_frames, 2))
    if random.random() < _STATIC_CAMERAS:
        return Camera(zoom, pan)
    amount = random.uniform(0.06, _LARGEST_CAMERA_MOVE)
    if random.random() < 0.5:
        zoom += amount * (share if random.random() < 0.5 else 1 - share)
    else:
        angle = random.choice([0.0, math.pi]) + random.uniform(-0.5, 0.5)
        direction = np.array([math.cos(angle), 0.5 * math.sin(angle)])
        pan += amount * (share[:, None] - 0.5) * direction
    return Camera(zoom, pan)


def _drift(time: Floats, amplitude: float, random: np.random.Generator) -> Floats:
    """Add three slow waves."""
    total = np.zeros(len(time))
    for low, high, part in ((0.1, 0.2, 0.5), (0.25, 0.45, 0.35), (0.6, 0.9, 0.15)):
        frequency, phase = random.uniform(low, high), random.uniform(0, 2 * math.pi)
        total += amplitude * part * np.sin(2 * math.pi * frequency * time + phase)
    return total


def _blinks(num_frames: int, random: np.random.Generator) -> Floats:
    eyes = np.ones(num_frames + len(_BLINK))
    place = int(random.integers(15, 4 * FPS))
    while place < num_frames:
        eyes[place : place + len(_BLINK)] = _BLINK
        place += int(random.integers(2 * FPS, 5 * FPS))
    return eyes[:num_frames]


def _glances(num_frames: int, random: np.random.Generator) -> Floats:
    """Look somewhere else every second or two, most often straight ahead; three frames a turn."""
    gaze, place = np.zeros((num_frames + 3 * FPS, 2)), 0
    while place < num_frames:
        goal = np.zeros(2) if random.random() < 0.5 else random.uniform((-1, -0.5), (1, 0.5))
        gaze[place:] = goal
        place += int(random.integers(FPS, 3 * FPS))
    smooth = gaze.copy()
    smooth[1:] += gaze[:-1]
    smooth[2:] += gaze[:-2]
    smooth[:2] = 3 * gaze[:2]
    return smooth[:num_frames] / 3
