"""Clips and stills: each is a function of the world's seed, the split, its index and the corpus."""

import json
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kit.data.fields import Meta
from kit.data.media import encode_clip, encode_wav, normalize_loudness
from kit.draws import seed_of
from kit.studio.captions import Speaking, name_framing, write_caption
from kit.studio.characters import (
    CLOTHES,
    EYES,
    GUESTS,
    HAIR,
    INK,
    MOUTH,
    SKINS,
    WALLS,
    Character,
    Split,
    character_seed,
    draw_character,
    draw_wall,
)
from kit.studio.drawing import HEAD_UNITS, Part, Scene, frame_truth, paint_frames
from kit.studio.motion import draw_camera, draw_motion
from kit.studio.mouth import FPS, NEUTRAL_WIDTH, SAMPLES_PER_FRAME, Mouth, follow_speech
from kit.studio.voices import Corpus, draw_noise, draw_speech

NUM_CHARACTERS = 100_000
"""Character seeds in a split that scenes choose from."""

_SILENT_SHARE = 0.15
_NOISY_SHARE = 0.3
_HAIR_TOP = 1.3


@dataclass(frozen=True)
class World:
    """What all scenes of a run share.

    Attributes:
        split: whose characters and voices.
        seed: another one is another world with the same people in it.
        height: of pictures, in pixels; those with two characters are half as wide again.
        two_speakers: share of scenes with two characters, 0 to 1.
        guest: the one character of all scenes; None draws characters.
    """

    split: Split
    seed: int = 0
    height: int = 64
    two_speakers: float = 0.25
    guest: str | None = None


@dataclass(frozen=True)
class Take:
    """A scene with its sound and its words.

    Attributes:
        tracks: speech of each character from left to right; none for a still. [S, samples]
        loudness: of each track before it was brought to -23 LUFS; None where silent.
        voices: names of the voices, None where silent.
    """

    key: str
    scene: Scene
    caption: str
    speaking: Speaking
    tracks: Tensor
    loudness: tuple[float | None, ...]
    voices: tuple[str | None, ...]


@dataclass(frozen=True)
class _Sound:
    tracks: Tensor
    loudness: tuple[float | None, ...]
    voices: tuple[str | None, ...]


def draw_clip(world: World, index: int, num_frames: int, corpus: Corpus) -> Take:
    """Make the index-th clip; num_frames is 4n + 1."""
    random = np.random.default_rng(seed_of("clip", world.seed, world.split, index))
    is_pair = _is_pair(world, random)
    characters = _cast(world, 2 if is_pair else 1, random)
    speaking = _who_speaks(is_pair, random)
    sound = _draw_sound(corpus, speaking, num_frames * SAMPLES_PER_FRAME, random)
    mouths = [
        _closed_mouth(num_frames) if voice is None else follow_speech(track, num_frames)
        for track, voice in zip(sound.tracks, sound.voices, strict=True)
    ]
    scene = stage(world.height, characters, mouths, random)
    caption = _caption(scene, speaking, random)
    key = f"{world.guest or world.split}-{world.seed}-{index:06d}"
    return Take(key, scene, caption, speaking, sound.tracks, sound.loudness, sound.voices)


def draw_still(world: World, index: int) -> Take:
    """Make the index-th still: a closed mouth and no sound."""
    random = np.random.default_rng(seed_of("still", world.seed, world.split, index))
    characters = _cast(world, 2 if _is_pair(world, random) else 1, random)
    scene = stage(world.height, characters, [_closed_mouth(1)] * len(characters), random)
    caption = _caption(scene, "still", random)
    key = f"{world.guest or world.split}-{world.seed}-still-{index:06d}"
    return Take(key, scene, caption, "still", torch.zeros(0, 0), (), ())


def stage(
    height: int,
    characters: list[Character],
    mouths: list[Mouth],
    random: np.random.Generator,
) -> Scene:
    """Place characters before a wall and let everything but the mouths move by chance.

    Args:
        height: of the picture; its width is equal, or half as large again for two characters.
        characters: one or two, from left to right.
        mouths: of each character.
        random: decides framing, places, wall, motion and camera.
    """
    num_frames, count = len(mouths[0].opening), len(characters)
    width = height if count == 1 else height * 3 // 2
    head_height = float(random.uniform(0.56, 0.9) if count == 1 else random.uniform(0.56, 0.64))
    unit = head_height / HEAD_UNITS
    top = random.uniform(0.3, 0.6) * (1 - head_height) + _HAIR_TOP * unit
    parts = tuple(
        Part(
            character,
            x=width / height * (number + 0.5) / count + random.uniform(-0.03, 0.03),
            y=float(top + random.uniform(-0.02, 0.02)),
            head_height=head_height,
            motion=draw_motion(int(random.integers(2**62)), num_frames),
            mouth=mouth,
        )
        for number, (character, mouth) in enumerate(zip(characters, mouths, strict=True))
    )
    wall = draw_wall(int(random.integers(2**62)))
    camera = draw_camera(int(random.integers(2**62)), num_frames)
    return Scene(height, width, wall, parts, camera)


def speaker_mask(scene: Scene, number: int) -> NDArray[np.uint8]:
    """Mark a character's share of the picture's width with 255. [height, width]"""
    mask = np.zeros((scene.height, scene.width), np.uint8)
    share = scene.width // len(scene.parts)
    mask[:, number * share : (number + 1) * share] = 255
    return mask


def encode_take(take: Take) -> dict[str, bytes]:
    """Turn a take into the members of a raw sample, with `truth.json` beside them."""
    scene, is_still = take.scene, take.speaking == "still"
    num_masks = len(scene.parts) if len(scene.parts) > 1 and not is_still else 0
    meta = Meta(
        kind="image" if is_still else "video",
        num_frames=scene.num_frames,
        height=scene.height,
        width=scene.width,
        fps=FPS,
        num_speakers=len(take.tracks),
        num_masks=num_masks,
        has_caption=True,
        source=take.key,
        start_seconds=0.0,
        loudness=list(take.loudness),
    )
    members = {
        "json": json.dumps(meta).encode(),
        "txt": take.caption.encode(),
        "truth.json": json.dumps(truth(take), separators=(",", ":")).encode(),
    }
    if is_still:
        return members | {"png": _png(next(paint_frames(scene)))}
    for number in range(num_masks):
        members[f"speaker{number}.png"] = _png(speaker_mask(scene, number))
    video = encode_clip(paint_frames(scene), FPS)
    return members | {"mp4": video, "wav": encode_wav(take.tracks)}


def truth(take: Take) -> dict[str, Any]:
    """State everything that is known of a take, ready for JSON."""
    scene = take.scene
    voices = take.voices or (None,) * len(scene.parts)
    people = zip(scene.parts, voices, strict=True)
    return {
        "speaking": take.speaking,
        "mouth_color": MOUTH,
        "ink_color": INK,
        "wall": {**vars(scene.wall), "rgb": WALLS[scene.wall.color]},
        "characters": [_part_facts(part, voice) for part, voice in people],
        "frames": [frame_truth(scene, frame) for frame in range(scene.num_frames)],
    }


def _part_facts(part: Part, voice: str | None) -> dict[str, Any]:
    character = part.character
    colors = {
        "skin": SKINS[character.skin],
        "hair": HAIR[character.hair],
        "eyes": EYES[character.eyes],
        "clothes": CLOTHES[character.clothes],
    }
    return {
        **vars(character),
        "rgb": colors,
        "voice": voice,
        "head_height": part.head_height,
        "framing": name_framing(part.head_height),
    }


def _is_pair(world: World, random: np.random.Generator) -> bool:
    return bool(random.random() < world.two_speakers) and world.guest is None


def _cast(world: World, count: int, random: np.random.Generator) -> list[Character]:
    numbers = random.integers(NUM_CHARACTERS, size=count)
    if world.guest is not None:
        return [GUESTS[world.guest]]
    return [draw_character(character_seed(world.split, int(number))) for number in numbers]


def _who_speaks(is_pair: bool, random: np.random.Generator) -> Speaking:
    chance = random.random()
    if not is_pair:
        return "nobody" if chance < _SILENT_SHARE else "one"
    pairs: tuple[tuple[float, Speaking], ...] = (
        (0.25, "left"), (0.5, "right"), (0.8, "turns"), (1.0, "both")
    )  # fmt: skip
    return next(speaking for limit, speaking in pairs if chance < limit)


def _draw_sound(
    corpus: Corpus, speaking: Speaking, num_samples: int, random: np.random.Generator
) -> _Sound:
    if speaking == "nobody":
        volume = float(10 ** (random.uniform(-70, -50) / 20))
        return _Sound(volume * draw_noise(num_samples, random)[None], (None,), (None,))
    names = list(corpus.voices)
    order = random.permutation(len(names))
    tracks, loudness, voices = [], [], []
    for number, (start, stop) in enumerate(_spans(speaking, num_samples, random)):
        track = torch.zeros(num_samples)
        voice, level = None, None
        if stop > start:
            voice = names[order[number % len(names)]]
            track[start:stop] = draw_speech(corpus, voice, stop - start, random)
            track, level = normalize_loudness(_with_noise(track, random))
        tracks.append(track)
        loudness.append(level)
        voices.append(voice)
    return _Sound(torch.stack(tracks), tuple(loudness), tuple(voices))


def _spans(
    speaking: Speaking, num_samples: int, random: np.random.Generator
) -> list[tuple[int, int]]:
    """Tell from where to where each character speaks, in samples."""
    whole, none = (0, num_samples), (0, 0)
    if speaking == "turns":
        turn = int(num_samples * random.uniform(0.4, 0.6))
        return [(0, turn), (turn, num_samples)]
    return {"one": [whole], "left": [whole, none], "right": [none, whole]}.get(
        speaking, [whole, whole]
    )


def _with_noise(track: Tensor, random: np.random.Generator) -> Tensor:
    if random.random() >= _NOISY_SHARE:
        return track
    level = track.square().mean().sqrt() * 10 ** (random.uniform(-45, -32) / 20)
    return track + level * draw_noise(len(track), random)


def _closed_mouth(num_frames: int) -> Mouth:
    return Mouth(np.zeros(num_frames), np.full(num_frames, NEUTRAL_WIDTH))


def _caption(scene: Scene, speaking: Speaking, random: np.random.Generator) -> str:
    characters = [part.character for part in scene.parts]
    framing = name_framing(scene.parts[0].head_height)
    return write_caption(characters, scene.wall, framing, speaking, random)


def _png(picture: NDArray[np.uint8]) -> bytes:
    file = BytesIO()
    Image.fromarray(picture).save(file, format="png")
    return file.getvalue()
