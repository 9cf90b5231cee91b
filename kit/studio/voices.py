"""Speech to speak with: a corpus made by espeak-ng, and tracks cut from one.

A voice is a language and a variant of espeak-ng. Splits share no variant, and no sentence either.
A corpus is a folder for each split, with `corpus.json` and FLAC files of 16 kHz, trimmed, all at
-23 LUFS; whoever has one needs no espeak-ng.
"""

import json
import logging
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from kit.batch import SAMPLE_RATE
from kit.data.media import load_speech, normalize_loudness
from kit.draws import seed_of
from kit.errors import InputError
from kit.studio.characters import Split
from kit.studio.sentences import SENTENCES, draw_syllables

log = logging.getLogger(__name__)

# fmt: off
VARIANTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "f1", "f2", "f4", "m1", "m2", "m4", "m5", "m7", "Andy", "Alicia", "Annie", "Denis",
        "Diogo", "Gene", "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Michael", "Mike", "anika",
        "belinda", "linda", "steph", "sandro", "travis", "victor", "adam", "antonio", "grandma",
        "klatt2",
    ),
    "val": ("f3", "m3", "Andrea", "benjamin", "john", "Michel"),
    "test": ("f5", "m6", "aunty", "david", "steph2", "pablo"),
}
# fmt: on
_INDEX = "corpus.json"
_HELD_OUT: dict[int, Split] = {3: "val", 4: "test"}
_SYLLABLES_SHARE = 0.25
_QUIET = 0.004


@dataclass(frozen=True)
class Utterance:
    """A recorded sentence.

    Attributes:
        file: name in the corpus.
        voice: language and variant, such as `de+f2`.
        text: what is said.
        seconds: how long it lasts.
    """

    file: str
    voice: str
    text: str
    seconds: float


class Corpus:
    """The speech of one split.

    Args:
        folder: holds a folder for each split.
        split: which of them.

    Raises:
        InputError: there is no corpus.
    """

    def __init__(self, folder: Path, split: Split) -> None:
        self._folder = folder / split
        index = self._folder / _INDEX
        if not index.is_file():
            raise InputError(f"{index} is missing; build the speech of the split '{split}' first")
        self.utterances = [Utterance(**facts) for facts in json.loads(index.read_bytes())]
        self._loaded: dict[str, Tensor] = {}

    @cached_property
    def voices(self) -> dict[str, list[Utterance]]:
        """What each voice says."""
        found: dict[str, list[Utterance]] = {}
        for utterance in self.utterances:
            found.setdefault(utterance.voice, []).append(utterance)
        return found

    def load(self, utterance: Utterance) -> Tensor:
        """Load an utterance; it stays in memory. [samples]"""
        if utterance.file not in self._loaded:
            self._loaded[utterance.file] = load_speech(self._folder / utterance.file)
        return self._loaded[utterance.file]


def build_corpus(folder: Path, split: Split, seconds: float) -> Corpus:
    """Record a split's speech, or open it where it is recorded; a longer one begins as a shorter.

    Args:
        folder: gets a folder for the split.
        split: whose voices speak.
        seconds: of speech at least.

    Raises:
        InputError: espeak-ng is needed and not installed.
    """
    place = folder / split
    if (place / _INDEX).is_file():
        corpus = Corpus(folder, split)
        if sum(utterance.seconds for utterance in corpus.utterances) >= seconds:
            return corpus
    if shutil.which("espeak-ng") is None:
        raise InputError(
            "espeak-ng is not installed; 'apt-get install espeak-ng' or 'brew install espeak-ng', "
            "or give the folder of a corpus that is recorded, such as data/sample/voices"
        )
    place.mkdir(parents=True, exist_ok=True)
    utterances: list[Utterance] = []
    total = 0.0
    while total < seconds:
        utterances.append(_record(place, split, len(utterances)))
        total += utterances[-1].seconds
    facts = [vars(utterance) for utterance in utterances]
    (place / _INDEX).write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n", "utf-8")
    log.info("%s: %d utterances, %.0f s", place, len(utterances), total)
    return Corpus(folder, split)


def sentences_of(split: Split, language: str) -> list[str]:
    """List the sentences that a split may say: of each five, one is for `val`, one for `test`."""
    texts = enumerate(SENTENCES[language])
    return [text for number, text in texts if _HELD_OUT.get(number % 5, "train") == split]


def draw_speech(
    corpus: Corpus, voice: str, num_samples: int, random: np.random.Generator
) -> Tensor:
    """Let a voice speak with pauses, at a random loudness and with small effects. [samples]

    It is listened to from anywhere within the first two seconds.
    """
    pieces, length = [torch.zeros(_samples(random.uniform(0, 0.5)))], 0
    start = _samples(random.uniform(0, 2))
    while length < start + num_samples:
        own = corpus.voices[voice]
        speech = corpus.load(own[random.integers(len(own))])
        pieces += [speech, torch.zeros(_samples(random.uniform(0.3, 1.0)))]
        length = sum(map(len, pieces))
    track = torch.cat(pieces)[start : start + num_samples]
    return _colored(track, random) * 10 ** (random.uniform(-12, 6) / 20)


def draw_noise(num_samples: int, random: np.random.Generator) -> Tensor:
    """Make steady noise of root mean square 1: white, brown or a hum. [samples]"""
    kind = random.integers(3)
    white = random.standard_normal(num_samples)
    if kind == 0:
        noise = white
    elif kind == 1:
        noise = np.convolve(white, np.exp(-np.arange(400) / 60), mode="full")[:num_samples]
    else:
        phase = 2 * np.pi * 100 * np.arange(num_samples) / SAMPLE_RATE
        noise = np.sin(phase) + 0.5 * np.sin(2 * phase) + 0.2 * white
    scaled = noise / np.sqrt(np.mean(noise**2))
    return torch.from_numpy(scaled.astype(np.float32))


def write_flac(path: Path, speech: Tensor) -> None:
    """Save speech, -1 to 1, at 16 kHz. [samples]"""
    # Twelve of the sixteen bits: their noise lies at -74 dB, and the files are a third smaller.
    samples = (speech.clamp(-1, 0.999) * 2048).round().mul(16).short()[None].numpy()
    options = {"fflags": "+bitexact"}
    with av.open(str(path), "w", format="flac", options=options) as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _colored(track: Tensor, random: np.random.Generator) -> Tensor:
    """Tilt the spectrum a little, and sometimes add an early echo."""
    tilt = float(random.uniform(-0.3, 0.3))
    colored = track.clone()
    colored[1:] += tilt * track[:-1]
    if random.random() < 0.2:
        delay, level = _samples(random.uniform(0.01, 0.03)), float(random.uniform(0.1, 0.3))
        colored[delay:] += level * track[:-delay]
    return colored


def _record(place: Path, split: Split, number: int) -> Utterance:
    random = np.random.default_rng(seed_of("utterance", split, number))
    variants, languages = VARIANTS[split], list(SENTENCES)
    # Variants in turn, and languages shifted at each round: few utterances have many voices.
    variant = variants[number % len(variants)]
    turns = number // len(variants)
    language = languages[(number + turns % 2) % len(languages)]
    texts = sentences_of(split, language)
    invented = random.random() < _SYLLABLES_SHARE
    text = draw_syllables(random) if invented else texts[random.integers(len(texts))]
    speech = _speak(f"{language}+{variant}", text, random)
    file = f"{number:05d}-{language}-{variant}.flac"
    write_flac(place / file, speech)
    return Utterance(file, f"{language}+{variant}", text, round(len(speech) / SAMPLE_RATE, 3))


def _speak(voice: str, text: str, random: np.random.Generator) -> Tensor:
    speed, pitch = int(random.integers(130, 200)), int(random.integers(30, 75))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(path)]
        subprocess.run([*command, text], check=True, capture_output=True)
        return normalize_loudness(_trimmed(load_speech(path)))[0]


def _trimmed(speech: Tensor) -> Tensor:
    loud = (speech.abs() > _QUIET).nonzero()[:, 0]
    return speech[loud[0] : loud[-1] + 1] if len(loud) else speech[:0]


def _samples(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE)
