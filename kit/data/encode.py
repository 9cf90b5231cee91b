"""From pixels, sound and words to what the frozen encoders make of them."""

import json
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from socket import gethostname
from typing import Protocol

import numpy as np
import torch
from filelock import Timeout
from safetensors.torch import save
from torch import Tensor

from kit.atomic import write_text
from kit.batch import Sample
from kit.data.claims import claim
from kit.data.clips import (
    RawSample,
    num_context,
    read_caption,
    read_pictures,
    read_tracks,
)
from kit.data.fields import INDEX_NAME, Settings
from kit.data.remote import RemoteFolder
from kit.data.shards import Shards
from kit.data.windows import WindowPlan, plan_windows
from kit.data.writer import index_tar, shard_name, write_index, write_shard
from kit.errors import InputError
from kit.reference import between_grey, followed_by_grey
from kit.speech import speech_windows

CLIPS_PER_SHARD = 8
"""Few, because a run that is stopped goes on behind the last whole shard."""

BEGUN_NAME = "begun.json"
"""What an encoding was begun with, so that only the same one goes on."""

COPIED = ("json", "txt", "truth.json")
"""Members that an encoded sample takes over from the raw one, beside the masks."""

SILENCE_SAMPLES = 3200
"""Length of the silence that shows how wide speech features are: 0.2 s at 16 kHz."""


class ClipEncoders(Protocol):
    """The frozen networks that clips need; `kit.models.base.Encoders` is one."""

    def encode_video(self, pixels: Tensor) -> Tensor:
        """Turn pixels, -1 to 1, [B, 3, T, height, width], into latents [B, C, F, H, W]."""

    def encode_text(self, texts: list[str]) -> list[Tensor]:
        """Turn each text into its states. [L, D] each."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Turn pictures, -1 to 1, [B, 3, height, width], into tokens [B, K, D]."""

    def encode_speech(self, waveform: Tensor) -> Tensor:
        """Turn tracks at 16 kHz, [S, samples], into features [S, T, M, D]."""


class ClipEncoder:
    """Encodes parts of clips, each rounded to the dtype that encoded shards store.

    Raw and encoded shards both pass through here, so they give the same batches bit for bit.

    Args:
        encoders: the frozen networks.
        dtype: what features are rounded to.
        negative_text: caption of samples whose text is dropped.
    """

    def __init__(self, encoders: ClipEncoders, dtype: torch.dtype, negative_text: str) -> None:
        self.encoders = encoders
        self.dtype = dtype
        self.negative_text = negative_text
        self._texts: dict[str, Tensor] = {}

    def latents(self, pixels: np.ndarray) -> Tensor:
        """Encode a window. uint8 [T, height, width, 3] -> [C, F, H, W]."""
        return self._kept(self.encoders.encode_video(to_video(pixels)[None])[0])

    def reference(
        self, picture: np.ndarray, num_frames: int, last: np.ndarray | None = None
    ) -> Tensor:
        """Encode a frame with grey behind it, up to a last one if there is one.

        Args:
            picture: uint8. [height, width, 3]
            num_frames: of the window.
            last: uint8. [height, width, 3]

        Returns:
            [C, F, H, W]
        """
        first = to_video(picture[None])[:, 0]
        frames = followed_by_grey(first, num_frames)
        if last is not None:
            frames = between_grey(first, to_video(last[None])[:, 0], num_frames)
        return self._kept(self.encoders.encode_video(frames[None])[0])

    def image(self, picture: np.ndarray) -> Tensor:
        """Encode a reference frame as an image. uint8 [height, width, 3] -> [K, D]."""
        return self._kept(self.encoders.encode_image(to_video(picture[None])[:, 0][None])[0])

    def speech(self, tracks: Tensor) -> Tensor:
        """Encode a clip's speech; an image, without tracks, gets zeros. [S, T, M, D]."""
        if len(tracks):
            return self._kept(self.encoders.encode_speech(tracks))
        silence = self.encoders.encode_speech(torch.zeros(1, SILENCE_SAMPLES))
        return self._kept(torch.zeros_like(silence[:, :1]))

    def text(self, caption: str) -> Tensor:
        """Encode a caption, remembering the result. [L, D]."""
        if caption not in self._texts:
            self._texts[caption] = self._kept(self.encoders.encode_text([caption])[0])
        return self._texts[caption]

    def sample(self, raw: RawSample, frame_stride: int) -> Sample:
        """Encode one draw from raw shards."""
        num_frames, last = len(raw.pixels), raw.pixels[-1] if raw.shows_last else None
        return Sample(
            key=raw.key,
            epoch=raw.epoch,
            index=raw.index,
            latents=self.latents(raw.pixels).float(),
            reference=self.reference(raw.reference, num_frames, last).float(),
            image=self.image(raw.reference).float(),
            text=self.text(raw.caption).float(),
            null_text=self.text(self.negative_text).float(),
            audio=speech_windows(self.speech(raw.tracks).float(), raw.start, num_frames),
            speaker_masks=raw.speaker_masks,
            num_context=num_context(raw.num_context_frames, frame_stride),
            shows_last=raw.shows_last,
        )

    def _kept(self, features: Tensor) -> Tensor:
        return features.to("cpu", self.dtype).contiguous()


def to_video(pictures: np.ndarray) -> Tensor:
    """Turn 0 to 255, uint8 [T, height, width, 3], into -1 to 1, float32 [3, T, height, width]."""
    return torch.tensor(pictures).permute(3, 0, 1, 2).float() / 127.5 - 1


def encode_shards(
    source: Path | RemoteFolder,
    out: Path,
    encoder: ClipEncoder,
    plan: WindowPlan,
    settings: Settings,
    report: Callable[[str], None],
    *,
    overwrite: bool = False,
    clips_per_shard: int = CLIPS_PER_SHARD,
    place: tuple[int, int] = (0, 1),
) -> None:
    """Encode every window of every clip of raw shards, a few clips at a time.

    A run that was stopped goes on behind the shards that it finished. Any number of processes, on
    any machines that see `out`, may do so together: each claims one shard after another, and takes
    over what others claimed and left. They write the same bytes as one alone.

    Args:
        source: folder of raw shards.
        out: folder for the encoded ones.
        encoder: makes the features.
        plan: which windows and references to encode.
        settings: what the features depend on; kept in the index and compared when resuming.
        report: told after each shard.
        overwrite: begin anew where out was begun with other clips or settings.
        clips_per_shard: what an interruption costs at most.
        place: (rank, world) of this process, which only decides where it begins.

    Raises:
        InputError: source holds no raw shards, or out was begun with other clips or settings.
    """
    shards = Shards(source)
    if shards.kind != "raw":
        raise InputError(f"{source}: these shards are encoded already; give the raw ones")
    out.mkdir(parents=True, exist_ok=True)
    with claim(out / BEGUN_NAME):
        _begin(out, {"source": shards.digest, **settings}, overwrite=overwrite)
    count = math.ceil(len(shards) / clips_per_shard)
    targets = [out / shard_name(number) for number in range(count)]
    with closing(_claimed(targets, place)) as numbers:
        for number in numbers:
            start = number * clips_per_shard
            clips = range(start, min(start + clips_per_shard, len(shards)))
            _write_shard(targets[number], (_encoded(shards, c, encoder, plan) for c in clips))
            done = len(list(out.glob("shard-*.tar"))) * clips_per_shard
            report(f"{min(done, len(shards))} of {len(shards)} clips encoded")
    with claim(out / INDEX_NAME):
        if not (out / INDEX_NAME).exists():
            indexed = [index_tar(target) for target in targets]
            write_index(out, "encoded", settings, indexed, shards.digest)
            # What those left who were killed.
            for left in out.glob("shard-*.tar.*"):
                left.unlink(missing_ok=True)


def _claimed(targets: Sequence[Path], place: tuple[int, int]) -> Generator[int]:
    """Claim files that are not there yet, one by one, until all are there.

    Processes begin at places far from each other. What others have claimed is waited for at the
    end, since they may die.
    """
    rank, world = place
    first = len(targets) * rank // world
    numbers = [*range(first, len(targets)), *range(first)]
    for timeout in (0, -1):
        for number in numbers:
            if targets[number].exists():
                continue
            with suppress(Timeout), claim(targets[number]).acquire(timeout=timeout):
                if not targets[number].exists():
                    yield number


def _write_shard(target: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write a shard under a name of this process before it gets its own."""
    own = target.with_name(f"{target.name}.{gethostname()}-{os.getpid()}")
    write_shard(own, samples)
    own.replace(target)


def _encoded(
    shards: Shards, number: int, encoder: ClipEncoder, plan: WindowPlan
) -> tuple[str, dict[str, bytes]]:
    texts = {
        "text": encoder.text(read_caption(shards, number)),
        # A caption may equal the negative text, and safetensors refuses shared memory.
        "null_text": encoder.text(encoder.negative_text).clone(),
    }
    speech = {"speech": encoder.speech(read_tracks(shards, number))}
    copied = [m for m in shards.members(number) if m in COPIED or m.startswith("speaker")]
    members = {member: shards.read(number, member) for member in copied}
    members["text.safetensors"] = save(texts)
    members["speech.safetensors"] = save(speech)
    for place, features in enumerate(_windows(shards, number, encoder, plan)):
        members[f"window{place}.safetensors"] = save(features)
    return shards.key(number), members


def _windows(
    shards: Shards, number: int, encoder: ClipEncoder, plan: WindowPlan
) -> Iterator[dict[str, Tensor]]:
    key, num_frames = shards.key(number), shards.meta(number)["num_frames"]
    for window in plan_windows(key, num_frames, plan):
        frames = range(window.start, window.start + window.num_frames)
        pictures = read_pictures(shards, number, [*frames, *window.references])
        references = pictures[window.num_frames :]
        features = {"latents": encoder.latents(pictures[: window.num_frames])}
        shows_last = plan.shows_last(window.num_frames)
        last = pictures[window.num_frames - 1] if shows_last else None
        for place, picture in enumerate(references):
            features[f"reference.{place}"] = encoder.reference(picture, window.num_frames, last)
            features[f"image.{place}"] = encoder.image(picture)
        yield features


def _begin(out: Path, begun: Settings, *, overwrite: bool) -> None:
    """Keep the shards of an interrupted run if it encoded the same clips in the same way."""
    path = out / BEGUN_NAME
    has_shards = any(out.glob("shard-*.tar"))
    before = _read_begun(path) if has_shards or path.exists() else begun
    if before != begun and not overwrite:
        differing = next(key for key, value in begun.items() if before.get(key) != value)
        what = "clips" if differing == "source" else f"{differing} {before.get(differing)!r}"
        raise InputError(f"{out}: was encoded from other {what}; overwrite it or give another")
    if before != begun:
        for old in (*out.glob("shard-*.tar"), out / INDEX_NAME):
            old.unlink(missing_ok=True)
    write_text(path, json.dumps(begun, indent=2) + "\n")


def _read_begun(path: Path) -> Settings:
    try:
        begun: Settings = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return begun
