"""The data of a run, as far as it can be told before the run."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kit.batch import Sample
from kit.data.buckets import parse_buckets
from kit.data.census import CENSUS_NAME, load_census
from kit.data.clips import EncodedClips, Selection
from kit.data.module import ShardData
from kit.data.shards import Shards
from kit.data.windows import plan_windows
from kit.errors import InputError
from kit.models.base import Base, Geometry
from kit.planning.batches import Window, typical_sample
from kit.recipe import Recipe
from kit.run.parts import build_data
from kit.run.plan_parts import Outline


@dataclass(frozen=True)
class Bucket:
    """Clips of one shape.

    Attributes:
        window: what a batch shows of them.
        num_clips: how many there are; 0 where the data is not here.
        num_windows: of all of them.
        num_tokens: video tokens of a window.
    """

    window: Window
    num_clips: int
    num_windows: int
    num_tokens: int


@dataclass(frozen=True)
class Data:
    """The shards of a run, as far as they are here.

    Attributes:
        kind: `raw`, `encoded`, or None without shards.
        buckets: the one with most tokens first.
        num_bytes: that the shards take.
        census: what became of the source files.
        largest: a sample of the first bucket.
    """

    kind: str | None
    buckets: tuple[Bucket, ...]
    num_bytes: int
    census: tuple[str, ...]
    largest: Sample

    def lines(self) -> Iterator[str]:
        """Tell what there is."""
        yield from self.census
        for bucket in self.buckets:
            window = bucket.window
            there = f"{bucket.num_clips} clips, {bucket.num_windows} windows"
            yield (
                f"{window.height}x{window.width}, {window.num_frames} frames: "
                f"{bucket.num_tokens:,} tokens" + (f", {there}" if self.kind else "")
            )


def read_data(recipe: Recipe, base: Base, base_outline: Outline) -> Data:
    """Read what the shards' index tells; without shards, the recipe's buckets stand for them."""
    sizes = base.geometry
    data = build_data(recipe, sizes)
    try:
        folder = data.folder
        shards = Shards(folder)
        windows = [_window(shards, number, data) for number in range(len(shards))]
        counts = [
            len(plan_windows(shards.key(i), shards.meta(i)["num_frames"], data.plan))
            for i in range(len(shards))
        ]
    except InputError:
        windows, counts = [], []
    if not windows:
        pictures = parse_buckets(recipe["buckets"]).values()
        windows = [Window(data.plan.window_frames, *size) for size in pictures]
    buckets = _buckets(windows, counts, sizes)
    sample = typical_sample(buckets[0].window, base_outline.widths, sizes)
    if not counts:
        return Data(None, buckets, 0, (), sample)
    files = folder.glob("*.tar") if isinstance(folder, Path) else ()
    num_bytes = sum(file.stat().st_size for file in files)
    if shards.kind == "encoded" and num_bytes:
        sample = _read_sample(shards, data, windows.index(buckets[0].window))
    return Data(shards.kind, buckets, num_bytes, tuple(_census(data.path)), sample)


def _window(shards: Shards, number: int, data: ShardData) -> Window:
    meta = shards.meta(number)
    num_frames = 1 if meta["kind"] == "image" else data.plan.window_frames
    return Window(num_frames, meta["height"], meta["width"], max(meta["num_speakers"], 1))


def _buckets(windows: list[Window], counts: list[int], sizes: Geometry) -> tuple[Bucket, ...]:
    clips, of_clips = Counter(windows if counts else []), Counter[Window]()
    for window, number in zip(windows, counts, strict=False):
        of_clips[window] += number
    found = [
        Bucket(window, clips[window], of_clips[window], window.num_tokens(sizes))
        for window in dict.fromkeys(windows)
    ]
    return tuple(sorted(found, key=lambda b: (-b.num_tokens, -b.window.num_speakers)))


def _read_sample(shards: Shards, data: ShardData, number: int) -> Sample:
    options = (data.plan, data.first_chunk, data.context_frames)
    selection = Selection(*options, 0, data.frame_stride, data.pixel_stride)
    return EncodedClips(shards, selection)[0, number]


def _census(folder: Path) -> Iterator[str]:
    """Say what `kit prepare` made of the source files."""
    if (folder / CENSUS_NAME).is_file():
        yield from load_census(folder).lines()
