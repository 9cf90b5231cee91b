"""Draw the sample clips: a cartoon character who speaks an invented language.

Everything is computed, so there is nothing to license or download, and the same seed gives the
same clips. The mouth opens by a causal rule: it follows the loudness of the last few frames.

Run: python data/draw_sample.py data/sample
"""

import argparse
import math
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import from_numpy

from kit.data.media import VideoWriter

FPS = 25
SAMPLE_RATE = 16_000
SUPERSAMPLING = 4

Color = tuple[int, int, int]
Floats = NDArray[np.float64]

LOUD = 0.25
"""Mean level of speech that opens the mouth fully."""

INK: Color = (58, 42, 62)
WHITE: Color = (255, 255, 255)
FORMANTS: dict[str, tuple[float, float, float]] = {
    "a": (800, 1300, 2600), "e": (500, 1900, 2600), "i": (320, 2300, 3000),
    "o": (500, 900, 2500), "u": (340, 800, 2400),
}  # fmt: skip
"""Resonances of five vowels in Hz: textbook averages of adult speakers, rounded."""


@dataclass(frozen=True)
class Look:
    """One character's colours and voice.

    Attributes:
        pitch: mean of the voice, in Hz.
        has_bun: hair gathered on top instead of two tails.
    """

    name: str
    hair: Color
    eyes: Color
    clothes: Color
    wall: Color
    pitch: float
    has_bun: bool

    @property
    def shade(self) -> Color:
        """The hair where no light falls."""
        return (self.hair[0] * 3 // 4, self.hair[1] * 3 // 4, self.hair[2] * 3 // 4)


@dataclass(frozen=True)
class Pose:
    """What moves: mouth and eyes from 0 closed to 1 open, the head in units of its size."""

    mouth: float
    round_lips: float
    eyes: float
    bob: float
    tilt: float


# fmt: off
LOOKS = (
    Look("a girl with violet hair in two tails", pitch=225, has_bun=False,
         hair=(137, 104, 205), eyes=(72, 126, 196), clothes=(238, 240, 250), wall=(250, 214, 196)),
    Look("a woman with red hair in a bun", pitch=200, has_bun=True,
         hair=(214, 92, 84), eyes=(84, 150, 104), clothes=(82, 110, 150), wall=(198, 226, 226)),
    Look("a girl with teal hair in two tails", pitch=240, has_bun=False,
         hair=(70, 170, 170), eyes=(196, 104, 84), clothes=(250, 226, 140), wall=(222, 208, 240)),
    Look("a woman with golden hair in a bun", pitch=190, has_bun=True,
         hair=(242, 196, 92), eyes=(112, 88, 168), clothes=(186, 92, 120), wall=(196, 220, 246)),
)
# fmt: on


def draw_voice(seconds: float, pitch: float, random: np.random.Generator) -> tuple[Floats, Floats]:
    """Synthesise babble: pulses of a voice through the resonances of vowels, in syllables.

    Returns:
        Waveform, -1 to 1, and how far the lips are rounded, 0 to 1. [samples] each
    """
    num_samples = round(seconds * SAMPLE_RATE)
    loudness, formants, rounding = _draw_syllables(num_samples, random)
    time = np.arange(num_samples) / SAMPLE_RATE
    melody = pitch * (1 + 0.08 * np.sin(2 * math.pi * 0.45 * time + random.uniform(0, 6)))
    melody *= 1 + 0.012 * np.sin(2 * math.pi * 5.2 * time)
    phase = 2 * math.pi * np.cumsum(melody) / SAMPLE_RATE
    voice = np.zeros(num_samples)
    for harmonic in range(1, int(4000 / pitch)):
        level = _resonance(harmonic * melody, formants) / harmonic**0.8
        voice += level * np.sin(harmonic * phase)
    breath = 0.01 * random.standard_normal(num_samples)
    sound = loudness * (voice / np.abs(voice).max() + breath)
    return 0.7 * sound / np.abs(sound).max(), rounding


def mouth_openings(speech: Floats, num_frames: int) -> Floats:
    """Open the mouth by the loudness so far: quickly open, slowly closed, nothing in advance.

    Returns:
        0 to 1. [num_frames]
    """
    step = SAMPLE_RATE // FPS
    energy = [np.sqrt(np.mean(speech[i * step : (i + 1) * step] ** 2)) for i in range(num_frames)]
    target = np.clip(np.array(energy) / LOUD, 0, 1)
    opening, openings = 0.0, []
    for level in target:
        opening += (0.75 if level > opening else 0.45) * (level - opening)
        openings.append(opening)
    return np.array(openings)


def draw_frames(
    look: Look, speech: Floats, rounding: Floats, size: int, random: np.random.Generator
) -> Iterator[NDArray[np.uint8]]:
    """Draw the character speaking. RGB, [size, size, 3] each"""
    num_frames = len(speech) * FPS // SAMPLE_RATE
    openings = mouth_openings(speech, num_frames)
    blinks = _draw_blinks(num_frames, random)
    start = random.uniform(0, 6)
    for number in range(num_frames):
        second = number / FPS
        pose = Pose(
            mouth=float(openings[number]),
            round_lips=float(rounding[number * SAMPLE_RATE // FPS]),
            eyes=float(blinks[number]),
            bob=0.012 * math.sin(2.1 * second + start) - 0.012 * float(openings[number]),
            tilt=0.02 * math.sin(0.9 * second + start),
        )
        yield draw_character(look, pose, size)


def draw_character(look: Look, pose: Pose, size: int) -> NDArray[np.uint8]:
    """Draw one frame. RGB, [size, size, 3]"""
    canvas = _Canvas(size, look.wall)
    head = _Head(canvas, pose)
    canvas.shape(_oval(0.5, 0.42, 0.42, 0.42), _lighter(look.wall, 0.45), line=0)
    _draw_back_hair(head, look)
    _draw_body(canvas, look, pose)
    _draw_face(head)
    _draw_mouth(head, pose)
    for side in (-1, 1):
        _draw_eye(head, side, look, pose.eyes)
    _draw_fringe(head, look)
    return canvas.picture()


class _Canvas:
    """A drawing in units of its width, painted larger and shrunk to smooth its lines."""

    def __init__(self, size: int, color: Color) -> None:
        self._size = size
        self._scale = size * SUPERSAMPLING
        self._image = Image.new("RGB", (self._scale, self._scale), color)
        self._draw = ImageDraw.Draw(self._image)

    def shape(self, points: Floats, color: Color, line: float = 0.008) -> None:
        scaled = [(x * self._scale, y * self._scale) for x, y in points]
        self._draw.polygon(scaled, fill=color)
        if line:
            self.line(np.vstack([points, points[:1]]), INK, line)

    def line(self, points: Floats, color: Color, width: float) -> None:
        scaled = [(x * self._scale, y * self._scale) for x, y in points]
        thickness = max(1, round(width * self._scale))
        self._draw.line(scaled, fill=color, width=thickness, joint="curve")
        reach = thickness / 2
        for x, y in (scaled[0], scaled[-1]):
            self._draw.ellipse([x - reach, y - reach, x + reach, y + reach], fill=color)

    def picture(self) -> NDArray[np.uint8]:
        small = self._image.resize((self._size, self._size), Image.Resampling.LANCZOS)
        return np.asarray(small)


class _Head:
    """Draws in coordinates that move with the head: x -1 to 1 across the face, y downwards."""

    def __init__(self, canvas: _Canvas, pose: Pose) -> None:
        self._canvas = canvas
        self._middle: Floats = np.array([0.5 + 0.5 * pose.tilt, 0.45 + pose.bob])
        cosine, sine = math.cos(1.5 * pose.tilt), math.sin(1.5 * pose.tilt)
        self._turn: Floats = np.array([[cosine, sine], [-sine, cosine]])

    def place(self, points: Floats) -> Floats:
        return points @ self._turn * 0.24 + self._middle

    def shape(self, points: Floats, color: Color, line: float = 0.008) -> None:
        self._canvas.shape(self.place(points), color, line)

    def line(self, points: Floats, color: Color = INK, width: float = 0.008) -> None:
        self._canvas.line(self.place(points), color, width)


def _oval(x: float, y: float, width: float, height: float) -> Floats:
    angle = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    return np.stack([x + width * np.cos(angle), y + height * np.sin(angle)], axis=1)


def _curve(*knots: tuple[float, float], closed: bool = False) -> Floats:
    """Lay a smooth line through points (Catmull-Rom)."""
    points = np.array(knots)
    ends = (points[-1:], points[:2]) if closed else (points[:1], points[-1:])
    padded = np.vstack([ends[0], points, ends[1]])
    t = np.linspace(0, 1, 12, endpoint=False)[:, None]
    pieces = []
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        cubic = (d - a + 3 * (b - c)) * t**3 + (2 * a - 5 * b + 4 * c - d) * t**2 + (c - a) * t
        pieces.append(b + 0.5 * cubic)
    last = [] if closed else [points[-1:]]
    return np.vstack([*pieces, *last])


def _lighter(color: Color, amount: float) -> Color:
    red, green, blue = (round(c + (255 - c) * amount) for c in color)
    return red, green, blue


def _draw_back_hair(head: _Head, look: Look) -> None:
    if look.has_bun:
        head.shape(_oval(0, -1.32, 0.42, 0.36), look.hair)
        head.line(_curve((-0.2, -1.42), (0.05, -1.5), (0.24, -1.38)), look.shade)
    else:
        tail = _curve(
            (1.0, -0.75), (1.5, -0.6), (1.72, 0.2), (1.5, 1.1), (1.3, 0.5), (1.0, 0.0), closed=True
        )
        strand = _curve((1.2, -0.5), (1.42, 0.0), (1.46, 0.6))
        for side in (-1, 1):
            head.shape(tail * [side, 1], look.hair)
            head.line(strand * [side, 1], look.shade)
    head.shape(_oval(0, -0.12, 1.14, 1.12), look.shade)


def _draw_body(canvas: _Canvas, look: Look, pose: Pose) -> None:
    sway = 0.15 * pose.tilt
    neck = _curve((0.44, 0.6), (0.44, 0.78), (0.56, 0.78), (0.56, 0.6), closed=True)
    shoulders = _curve(
        (0.5 + sway, 0.75), (0.68, 0.79), (0.8, 0.92), (0.82, 1.1), (0.18, 1.1), (0.2, 0.92),
        (0.32, 0.79), closed=True,
    )  # fmt: skip
    canvas.shape(shoulders, look.clothes)
    canvas.shape(neck, (244, 208, 188))
    half_collar = np.array([(0.08, 0.755), (0, 0.86), (0, 0.94), (0.12, 0.8)])
    for side in (-1, 1):
        canvas.shape(half_collar * [side, 1] + [0.5 + sway, 0], _lighter(look.hair, 0.25))


def _draw_face(head: _Head) -> None:
    skin, blush = (255, 226, 208), (250, 186, 176)
    face = _curve(
        (-0.92, -0.3), (-0.88, 0.3), (-0.55, 0.78), (0, 1.0), (0.55, 0.78), (0.88, 0.3),
        (0.92, -0.3), (0.5, -0.9), (-0.5, -0.9), closed=True,
    )  # fmt: skip
    head.shape(face, skin)
    for x in (-0.58, 0.58):
        head.shape(_oval(x, 0.46, 0.16, 0.08), blush, line=0)
    head.line(_curve((-0.02, 0.34), (0.03, 0.4), (-0.01, 0.42)), (214, 150, 140), 0.006)


def _draw_mouth(head: _Head, pose: Pose) -> None:
    width = 0.3 - 0.13 * pose.round_lips - 0.04 * pose.mouth
    height = 0.02 + 0.2 * pose.mouth
    if pose.mouth < 0.12:
        head.line(_curve((-width, 0.62), (0, 0.69), (width, 0.62)), (150, 70, 80), 0.01)
        return
    lips = _curve(
        (-width, 0.63), (0, 0.63 - 0.25 * height), (width, 0.63), (0.6 * width, 0.63 + height),
        (-0.6 * width, 0.63 + height), closed=True,
    )  # fmt: skip
    head.shape(lips, (150, 52, 66))
    head.shape(_oval(0, 0.63 + 0.8 * height, 0.5 * width, 0.3 * height), (236, 128, 128), line=0)


def _draw_eye(head: _Head, side: int, look: Look, openness: float) -> None:
    x, y, tall = 0.42 * side, 0.08, 0.3 * openness
    arch = ((-0.27, 0.3), (-0.17, 0.82), (0, 1.05), (0.17, 0.82), (0.27, 0.3))
    lid = _curve(*((x + across, y - up * tall) for across, up in arch))
    if openness > 0.3:
        head.shape(_oval(x, y, 0.22, tall), WHITE, line=0)
        head.shape(_oval(x, y, 0.165, 0.95 * tall), look.eyes, line=0.005)
        head.shape(_oval(x, y + 0.35 * tall, 0.11, 0.45 * tall), _lighter(look.eyes, 0.4), line=0)
        head.shape(_oval(x, y - 0.1 * tall, 0.075, 0.5 * tall), INK, line=0)
        head.shape(_oval(x - 0.06, y - 0.42 * tall, 0.055, 0.22 * tall), WHITE, line=0)
    head.line(lid, INK, 0.014)
    outer = np.array([(x + 0.27 * side, y - 0.3 * tall), (x + 0.34 * side, y - 0.5 * tall - 0.03)])
    head.line(outer, INK, 0.01)
    head.line(_curve((x - 0.18, -0.38), (x, -0.44), (x + 0.18, -0.38)), look.shade, 0.01)


def _draw_fringe(head: _Head, look: Look) -> None:
    fringe = _curve(
        (-1.06, 0.1), (-1.18, -0.5), (-0.8, -1.12), (0, -1.28), (0.8, -1.12), (1.18, -0.5),
        (1.06, 0.1), (0.86, -0.42), (0.62, -0.22), (0.48, -0.62), (0.2, -0.3), (-0.02, -0.66),
        (-0.34, -0.24), (-0.5, -0.62), (-0.7, -0.2), (-0.86, -0.42), closed=True,
    )  # fmt: skip
    head.shape(fringe, look.hair)
    shine = _curve((-0.62, -0.86), (-0.3, -0.98), (0.1, -1.0), (0.4, -0.94))
    head.line(shine, _lighter(look.hair, 0.5), 0.018)
    lock = _curve((1.0, -0.3), (1.14, 0.2), (1.06, 0.72), (0.95, 0.3), closed=True)
    for side in (-1, 1):
        head.shape(lock * [side, 1], look.hair)


def _draw_syllables(num_samples: int, random: np.random.Generator) -> tuple[Floats, Floats, Floats]:
    """Lay out syllables and pauses; loudness [N], formants [N, 3], rounding of the lips [N]."""
    loudness, rounding = np.zeros(num_samples), np.zeros(num_samples)
    formants = np.tile(np.array(FORMANTS["e"], float), (num_samples, 1))
    place = round(0.15 * SAMPLE_RATE)
    while place < num_samples:
        for _ in range(random.integers(3, 8)):
            length = round(random.uniform(0.13, 0.26) * SAMPLE_RATE)
            span = slice(place, min(place + length, num_samples))
            vowel = str(random.choice(list(FORMANTS)))
            rise = np.sin(np.linspace(0, math.pi, length)) ** 0.7
            loudness[span] = (random.uniform(0.6, 1) * rise)[: span.stop - span.start]
            formants[span] = FORMANTS[vowel]
            rounding[span] = vowel in "ou"
            place = span.stop
        place += round(random.uniform(0.25, 0.6) * SAMPLE_RATE)
    smooth = np.hanning(round(0.05 * SAMPLE_RATE))
    formants = np.stack([_smoothed(column, smooth) for column in formants.T], axis=1)
    return loudness, formants, _smoothed(rounding, smooth)


def _smoothed(values: Floats, window: Floats) -> Floats:
    padded = np.pad(values, (len(window) // 2, len(window) - len(window) // 2 - 1), mode="edge")
    return np.convolve(padded, window / window.sum(), mode="valid")


def _resonance(frequency: Floats, formants: Floats) -> Floats:
    widths, levels = (90, 110, 170), (1.0, 0.6, 0.25)
    total = np.zeros(len(frequency))
    for column, width, level in zip(formants.T, widths, levels, strict=True):
        total += level / (1 + ((frequency - column) / width) ** 2)
    return total


def _draw_blinks(num_frames: int, random: np.random.Generator) -> Floats:
    openness = np.ones(num_frames + 8)
    place = int(random.integers(20, 60))
    while place < num_frames:
        openness[place : place + 6] = (0.6, 0.15, 0.1, 0.15, 0.5, 0.8)
        place += int(random.integers(50, 110))
    return openness[:num_frames]


def write_clip(folder: Path, number: int, seconds: float, size: int) -> None:
    """Write one clip with its sound and its caption."""
    look = LOOKS[number % len(LOOKS)]
    random = np.random.default_rng(number)
    speech, rounding = draw_voice(seconds, look.pitch, random)
    path = folder / f"clip{number + 1}.mp4"
    sound = from_numpy(speech.astype(np.float32))
    with VideoWriter(path, fps=FPS, height=size, width=size, speech=sound) as video:
        for frame in draw_frames(look, speech, rounding, size, random):
            video.write(frame[None])
    caption = f"A flat cartoon drawing of {look.name}, talking to the viewer, plain background."
    path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


def write_portrait(folder: Path, size: int) -> None:
    """Write a still of the first character, and a speech in the same voice that is in no clip."""
    folder.mkdir(parents=True, exist_ok=True)
    pose = Pose(mouth=0.0, round_lips=0.0, eyes=1.0, bob=0.0, tilt=0.0)
    Image.fromarray(draw_character(LOOKS[0], pose, size)).save(folder / "portrait.png")
    samples, _ = draw_voice(8.0, LOOKS[0].pitch, np.random.default_rng(1000))
    with wave.open(str(folder / "speech.wav"), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def main() -> None:
    """Write portrait.png, speech.wav and clips/ into a folder."""
    parser = argparse.ArgumentParser(description="Draw the sample clips.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--size", type=int, default=160)
    options = parser.parse_args()
    write_portrait(options.out, 2 * options.size)
    for number in range(options.clips):
        write_clip(options.out / "clips", number, options.seconds, options.size)


if __name__ == "__main__":
    main()
