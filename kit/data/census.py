"""The account of a `prepare`: what was kept, cut and dropped, and why."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kit.atomic import write_text

NO_CAPTION = "has no caption"
"""Begins the warning that can concern every file."""

CENSUS_NAME = "census.json"
MAX_LISTED = 20


@dataclass(frozen=True)
class KeptClip:
    """One sample of the shards.

    Attributes:
        source: file that it comes from.
        seconds: length of the video; 0 for a still.
        speech_seconds: length of all tracks together.
    """

    key: str
    source: str
    start_seconds: float
    seconds: float
    speech_seconds: float
    height: int
    width: int


@dataclass(frozen=True)
class Dropped:
    """A file, or a part of one, that is not in the shards, and one sentence that says why."""

    source: str
    reason: str


@dataclass
class Census:
    """Filled while a folder is prepared.

    Attributes:
        source_sizes: how many files have each size of picture, WIDTHxHEIGHT.
        num_bytes: size of everything written.
    """

    kept: list[KeptClip] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    source_sizes: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0

    @property
    def cut(self) -> dict[str, int]:
        """Files that gave several clips, and how many."""
        counts = Counter(clip.source for clip in self.kept)
        return {source: count for source, count in counts.items() if count > 1}

    @property
    def buckets(self) -> dict[str, int]:
        """How many clips have each size, HEIGHTxWIDTH."""
        counts = Counter(f"{clip.height}x{clip.width}" for clip in self.kept)
        return dict(sorted(counts.items()))

    @property
    def seconds(self) -> float:
        """Length of all kept video."""
        return sum(clip.seconds for clip in self.kept)

    @property
    def speech_seconds(self) -> float:
        """Length of all kept tracks."""
        return sum(clip.speech_seconds for clip in self.kept)

    def write(self, folder: Path) -> None:
        """Write `census.json`."""
        text = json.dumps(self._facts(), indent=2, ensure_ascii=False)
        write_text(folder / CENSUS_NAME, text + "\n")

    def lines(self) -> Iterator[str]:
        """Give the account as a short table."""
        stills = sum(clip.seconds == 0 for clip in self.kept)
        files = len({clip.source for clip in self.kept})
        yield f"kept      {len(self.kept) - stills} clips and {stills} stills from {files} files"
        yield f"cut       {len(self.cut)} files into {sum(self.cut.values())} clips"
        yield f"dropped   {len(self.dropped)}"
        yield from _shortened([dropped.reason for dropped in self.dropped])
        yield f"warnings  {len(self.warnings)}"
        bare = [warning for warning in self.warnings if NO_CAPTION in warning]
        grouped = bare if len(bare) <= 3 else [f"{len(bare)} files: {bare[0]}, and so on"]
        yield from _shortened([w for w in self.warnings if w not in bare] + grouped)
        yield f"video     {self.seconds:.1f} s, speech {self.speech_seconds:.1f} s"
        yield f"buckets   {_listed(self.buckets)}"
        yield f"sources   {_listed(self.source_sizes)}"
        yield f"written   {self.num_bytes / 1e6:.1f} MB"

    def _facts(self) -> dict[str, Any]:
        summary = {
            "num_clips": len(self.kept),
            "seconds": round(self.seconds, 3),
            "speech_seconds": round(self.speech_seconds, 3),
            "megabytes": round(self.num_bytes / 1e6, 3),
            "buckets": self.buckets,
            "cut": self.cut,
        }
        return summary | asdict(self)


def load_census(folder: Path) -> Census:
    """Read `census.json` again."""
    facts = json.loads((folder / CENSUS_NAME).read_text(encoding="utf-8"))
    return Census(
        kept=[KeptClip(**clip) for clip in facts["kept"]],
        dropped=[Dropped(**drop) for drop in facts["dropped"]],
        warnings=facts["warnings"],
        source_sizes=Counter(facts["source_sizes"]),
        num_bytes=facts["num_bytes"],
    )


def _shortened(sentences: Sequence[str]) -> Iterator[str]:
    yield from (f"          {sentence}" for sentence in sentences[:MAX_LISTED])
    if len(sentences) > MAX_LISTED:
        yield f"          and {len(sentences) - MAX_LISTED} more, see {CENSUS_NAME}"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items()) or "none"
