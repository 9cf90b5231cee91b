"""A video that is being made: its finished chunks lie on disk, so that a stop loses at most one."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kit.atomic import atomic_write
from kit.data.media import VideoWriter, iter_frames, join_videos
from kit.recipe import Recipe
from kit.sampling.chunks import Progress

_STATE = "progress.safetensors"


class UnfinishedVideo:
    """The finished chunks of a video, in the folder `<out without .mp4>.partial`.

    Args:
        out: the video to be, mp4.
        identity: what it is made from; chunks of another video are thrown away.
        fps: frames per second.
        size: height and width in pixels.
        writes: False for processes that only follow the one that writes.
    """

    def __init__(
        self, out: Path, identity: str, fps: int, size: tuple[int, int], *, writes: bool = True
    ) -> None:
        self.folder = out.with_suffix(".partial")
        self._out = out
        self._identity = identity
        self._fps = fps
        self._size = size
        self._writes = writes
        self.progress = self._load_progress()
        if self.progress is None and writes:
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, pictures: np.ndarray, progress: Progress) -> None:
        """Keep a chunk's frames, uint8 [T, height, width, 3], and what the next one needs."""
        if not self._writes:
            self.progress = progress
            return
        height, width = self._size
        path = self._part(progress.next_chunk - 1)
        with VideoWriter(path, fps=self._fps, height=height, width=width) as writer:
            writer.write(pictures)
        tensors = {"tail": progress.tail.cpu(), "waiting": progress.waiting.cpu()}
        facts = {"identity": self._identity, "next_chunk": str(progress.next_chunk)}
        with atomic_write(self.folder / _STATE) as partial:
            save_file({n: t.contiguous() for n, t in tensors.items()}, partial, metadata=facts)
        self.progress = progress

    def frames(self) -> np.ndarray:
        """Read the finished frames back, as their coding left them. uint8 [T, height, width, 3]"""
        pictures = [frame for part in self._parts() for frame in iter_frames(part, self._fps)]
        return np.stack(pictures) if pictures else np.zeros((0, *self._size, 3), np.uint8)

    def join(self, speech: Tensor, path: Path | None = None) -> None:
        """Put the finished chunks together with their sound, in `out` or in another file."""
        if self._writes:
            join_videos(self._parts(), path or self._out, fps=self._fps, speech=speech)

    def remove(self) -> None:
        """Take the chunks away."""
        if self._writes:
            # First what says that the chunks are there.
            (self.folder / _STATE).unlink()
            shutil.rmtree(self.folder)

    def _parts(self) -> list[Path]:
        count = self.progress.next_chunk if self.progress else 0
        return [self._part(number) for number in range(count)]

    def _part(self, number: int) -> Path:
        return self.folder / f"chunk-{number:05d}.mp4"

    def _load_progress(self) -> Progress | None:
        state = self.folder / _STATE
        try:
            with safe_open(state, "pt") as reader:
                facts = reader.metadata()
            tensors = load_file(state)
        except (OSError, SafetensorError):
            return None
        if facts["identity"] != self._identity:
            return None
        return Progress(int(facts["next_chunk"]), tensors["tail"], tensors["waiting"])


def identify(recipe: Recipe, inputs: Sequence[Path]) -> str:
    """Hash what decides a video's frames: the recipe, and its inputs' bytes."""
    digest = hashlib.sha256(recipe.sha256.encode())
    for path in inputs:
        digest.update(digest_of(path).encode())
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """Hash a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
