"""The data of a run: shards, raw or encoded, to batches on the training device."""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from lightning import LightningDataModule
from pydantic import Field

from kit.batch import Batch, collate
from kit.data.clips import EncodedClips, RawClips, Selection
from kit.data.connection import is_address
from kit.data.encode import ClipEncoder, ClipEncoders
from kit.data.fields import ENCODED_FOLDER, INDEX_NAME, Meta, Settings
from kit.data.loader import ResumableLoader
from kit.data.order import Mixing, Order
from kit.data.prefetch import Prefetching
from kit.data.remote import Cache, RemoteFolder, default_cache, find_shards
from kit.data.shards import Shards
from kit.data.windows import ReferenceStrategy, WindowPlan, plan_windows
from kit.errors import InputError

FeatureDtype = Literal["float32", "float16", "bfloat16"]


class RunData(LightningDataModule, ABC):
    """What a run needs of its data."""

    @abstractmethod
    def problems(self) -> list[str]:
        """List what is wrong with the options or the files, in words."""

    @abstractmethod
    def digest(self) -> str:
        """Identify the samples, wherever they lie."""

    @abstractmethod
    def prepare_run(
        self,
        load_encoders: Callable[[], ClipEncoders] | None,
        seed: int,
        num_batches: int,
        place: tuple[int, int],
    ) -> None:
        """Open the data for a run.

        Args:
            load_encoders: called once if the samples are not encoded; without it they are handed
                out as they are.
            seed: of the run.
            num_batches: batches that one process will use.
            place: (rank, world) of this process.
        """

    @abstractmethod
    def train_dataloader(self) -> ResumableLoader:
        """Give Lightning the run's one loader."""


class ShardData(RunData):
    """Windows of character clips from a folder of shards.

    Args:
        frame_stride: video frames in a latent frame of the base.
        pixel_stride: pixels in a latent position of the base.
        fps: frames per second of the base.
        fingerprint: of the base's encoders; None if the base cannot tell.
        path: folder that `kit prepare` wrote, or its address, such as `s3://bucket/shards`; encoded
            shards inside it win over the raw ones.
        batch_size: windows in a batch.
        window_frames: video frames in a window, 4n + 1; Wan was trained on 81.
        windows_per_clip: windows of a clip at most, spread evenly.
        references: where reference frames come from; `m3`, near but outside, is InfiniteTalk's.
        references_per_window: reference frames to choose from, beside the window's first.
        first_chunk: share of samples that train the first chunk of a video, 0 to 1.
        context_frames: clean frames of all other samples, 4n + 1.
        feature_dtype: what features are rounded to, and stored as when encoded.
        negative_text: what takes the place of a dropped caption.
        num_workers: loader processes.
        mixed_shards: shuffle the shards, and samples only among so many of them at a time, so that
            a cache need not hold all; without it all samples are shuffled together.
        cache: folder for shards of an address; in the user's own folder for caches if absent.
        cache_gb: what it may hold, in 10^9 bytes; without it nothing is dropped.
    """

    def __init__(
        self,
        frame_stride: int,
        pixel_stride: int,
        fps: int,
        fingerprint: str | None,
        *,
        path: str,
        batch_size: Annotated[int, Field(ge=1)] = 1,
        window_frames: Annotated[int, Field(ge=5)] = 81,
        windows_per_clip: Annotated[int, Field(ge=1)] = 4,
        references: ReferenceStrategy = "m3",
        references_per_window: Annotated[int, Field(ge=1)] = 2,
        first_chunk: Annotated[float, Field(ge=0, le=1)] = 0.2,
        context_frames: Annotated[int, Field(ge=1)] = 9,
        feature_dtype: FeatureDtype = "float32",
        negative_text: str = "",
        num_workers: Annotated[int, Field(ge=0)] = 2,
        mixed_shards: Annotated[int, Field(ge=1)] | None = None,
        cache: str | None = None,
        cache_gb: Annotated[float, Field(gt=0)] | None = None,
    ) -> None:
        super().__init__()
        self.address = path if is_address(path) else None
        self.path = Path(path)
        self.fingerprint = fingerprint
        self.batch_size = batch_size
        self.plan = WindowPlan(
            window_frames, windows_per_clip, references, references_per_window, fps
        )
        self.first_chunk = first_chunk
        self.context_frames = context_frames
        self.feature_dtype = feature_dtype
        self.negative_text = negative_text
        self.num_workers = num_workers
        self.mixed_shards = mixed_shards
        max_bytes = math.inf if cache_gb is None else cache_gb * 1e9
        self.cache = Cache(Path(cache) if cache else default_cache(), max_bytes)
        self.frame_stride = frame_stride
        self.pixel_stride = pixel_stride

    @property
    def folder(self) -> Path | RemoteFolder:
        """Find the shards to use: encoded ones, if there are any.

        Raises:
            InputError: there are none at the address.
        """
        if self.address is not None:
            return self._remote
        encoded = self.path / ENCODED_FOLDER
        return encoded if (encoded / INDEX_NAME).exists() else self.path

    @cached_property
    def _remote(self) -> RemoteFolder:
        assert self.address is not None
        return find_shards(self.address, self.cache)

    @property
    def settings(self) -> Settings:
        """Name everything that encoded features depend on."""
        return {
            "base": self.fingerprint,
            "window_frames": self.plan.window_frames,
            "windows_per_clip": self.plan.windows_per_clip,
            "references": self.plan.references,
            "references_per_window": self.plan.references_per_window,
            "fps": self.plan.fps,
            "feature_dtype": self.feature_dtype,
            "negative_text": self.negative_text,
        }

    def problems(self) -> list[str]:
        """List what is wrong with the options or the shards, in words."""
        return [*self.option_problems(), *self.shard_problems()]

    def option_problems(self) -> list[str]:
        """List options that do not go together, in words."""
        found = [
            f"data.{name}: {value} is not 4n + 1 frames"
            for name, value in (
                ("window_frames", self.plan.window_frames),
                ("context_frames", self.context_frames),
            )
            if value % self.frame_stride != 1
        ]
        if self.context_frames >= self.plan.window_frames:
            found.append(
                f"data.context_frames: {self.context_frames} leave nothing to learn of a window "
                f"of {self.plan.window_frames} frames"
            )
        return found

    def shard_problems(self, folder: Path | RemoteFolder | None = None) -> list[str]:
        """List what about the shards does not fit the options, in words; of another folder too."""
        try:
            folder = folder or self.folder
            shards = Shards(folder)
        except InputError as error:
            return [f"data.path: {error}"]
        if len(shards) == 0:
            return [f"data.path: {folder} holds no samples"]
        if isinstance(folder, RemoteFolder) and not self._fits_cache(folder):
            return [
                f"data.cache_gb: {self.cache.max_bytes / 1e9:g} is less than what is read at a "
                f"time of the {folder.num_bytes / 1e9:.3g} GB at {folder}; give more, or mix fewer "
                "shards at a time by data.mixed_shards"
            ]
        if shards.kind == "encoded" and shards.settings != self.settings:
            return [
                f"data.{name}: the shards were encoded with {shards.settings.get(name)!r}, the "
                f"recipe says {value!r}; encode them again or change the recipe"
                for name, value in self.settings.items()
                if value is not None and shards.settings.get(name) != value
            ]
        metas = [(shards.key(i), shards.meta(i)) for i in range(len(shards))]
        short = [k for k, m in metas if 1 < m["num_frames"] < self.plan.window_frames]
        slow = [k for k, m in metas if m["fps"] != self.plan.fps]
        unplaced = [k for k, m in metas if not _has_places(m)]
        return [
            f"{place}: {len(keys)} clips {what}, such as {keys[0]}; prepare them again"
            for place, keys, what in (
                ("data.window_frames", short, "are shorter than a window"),
                ("data.path", slow, f"are not at {self.plan.fps} frames per second"),
                ("data.path", unplaced, "do not have a mask for each of several speakers"),
            )
            if keys
        ]

    def digest(self) -> str:
        """Identify the samples wherever they lie, the same for raw and encoded shards.

        Where samples are mixed by shards, it counts how they lie in them.
        """
        shards = Shards(self.folder)
        facts = [(shards.key(number), shards.meta(number)) for number in range(len(shards))]
        files = [shards.file(number) for number in range(len(shards))] if self.mixed_shards else []
        return hashlib.sha256(json.dumps([*facts, *files], sort_keys=True).encode()).hexdigest()

    def notes(self) -> list[str]:
        """List what is worth knowing before a run, in words; the shards are known to be fit."""
        shards = Shards(self.folder)
        windows = [
            window
            for number in range(len(shards))
            for window in plan_windows(
                shards.key(number), shards.meta(number)["num_frames"], self.plan
            )
        ]
        missing = sum(not window.has_strategy_frames for window in windows)
        lines = [f"{len(shards)} clips ({shards.kind}), {len(windows)} windows"]
        if missing:
            lines.append(
                f"{missing} windows lie in clips too short for references '{self.plan.references}' "
                "and take their first or last frame"
            )
        return lines

    def prepare_run(
        self,
        load_encoders: Callable[[], ClipEncoders] | None,
        seed: int,
        num_batches: int,
        place: tuple[int, int],
    ) -> None:
        """Open the shards for a run; encoded ones need no encoders."""
        folder = self.folder
        shards = Shards(folder)
        selection = Selection(
            self.plan,
            self.first_chunk,
            self.context_frames,
            seed,
            self.frame_stride,
            self.pixel_stride,
        )
        is_raw = shards.kind == "raw"
        self.encoder = None
        if is_raw and load_encoders is not None:
            self.encoder = self.clip_encoder(load_encoders())
        self.loader = ResumableLoader(
            RawClips(shards, selection) if is_raw else EncodedClips(shards, selection),
            self._order(shards, seed),
            num_batches,
            *place,
            self.num_workers,
            list if is_raw else collate,
            Prefetching(folder, shards) if isinstance(folder, RemoteFolder) else None,
        )

    def clip_encoder(self, encoders: ClipEncoders) -> ClipEncoder:
        """Make the encoder that raw batches and encoded shards share."""
        return ClipEncoder(encoders, getattr(torch, self.feature_dtype), self.negative_text)

    def train_dataloader(self) -> ResumableLoader:
        """Give Lightning the run's one loader."""
        return self.loader

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Encode raw samples where the encoders are, and move the batch."""
        if self.encoder is not None:
            batch = collate([self.encoder.sample(raw, self.frame_stride) for raw in batch])
        return batch.to(device) if isinstance(batch, Batch) else batch

    def _order(self, shards: Shards, seed: int) -> Order:
        buckets = [self._bucket(shards, number) for number in range(len(shards))]
        mixing = Mixing(shards.by_shard(), self.mixed_shards) if self.mixed_shards else None
        return Order(buckets, self.batch_size, seed, mixing)

    def _bucket(self, shards: Shards, number: int) -> tuple[int, int, int]:
        meta = shards.meta(number)
        num_frames = 1 if meta["kind"] == "image" else self.plan.window_frames
        return num_frames, meta["height"], meta["width"]

    def _fits_cache(self, folder: RemoteFolder) -> bool:
        """Whether what is mixed fits into the cache, and as much again that comes next."""
        if self.mixed_shards is None:
            return folder.num_bytes <= self.cache.max_bytes
        at_once = 2 * self.mixed_shards * max(folder.sizes.values())
        return min(at_once, folder.num_bytes) <= self.cache.max_bytes


def _has_places(meta: Meta) -> bool:
    """Tell whether speakers and masks go together: one speaker needs none."""
    return meta["num_masks"] in ({0, 1} if meta["num_speakers"] < 2 else {meta["num_speakers"]})
