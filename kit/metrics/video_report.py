"""Measure a finished video with all that is known of it, and write the numbers down."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from kit.atomic import write_text
from kit.errors import InputError
from kit.metrics.identity import Features, color_identity, load_features
from kit.metrics.report import Known, Report, talking_report
from kit.metrics.settings import MeasureSettings


@dataclass(frozen=True)
class VideoReport:
    """The numbers of a video and what they rest on.

    Attributes:
        num_frames: frames of the video.
        fps: frames per second.
        chunk_starts: first frame of each chunk, the first 0.
        known: the `measure` section as plain values.
        tracks: the numbers of each speaker by name; None for what cannot be told.
    """

    num_frames: int
    fps: float
    chunk_starts: Sequence[int]
    known: Mapping[str, object]
    tracks: Sequence[Report]

    def write(self, path: Path) -> None:
        """Write all of it as JSON."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    def lines(self) -> list[str]:
        """Lay the numbers out as a table, with `-` for what cannot be told."""
        rows = [row for numbers in self.tracks for row in numbers.items()]
        width = max(len(name) for name, _ in rows)
        cells = [(name, "-" if value is None else f"{value:.3f}") for name, value in rows]
        return [f"  {name:<{width}} {cell:>8}" for name, cell in cells]


@dataclass(frozen=True)
class Measure:
    """Measures videos of one scene; `open_measure` makes one.

    Attributes:
        settings: what the recipe says.
        known: the same in pixels.
        features: makes features of pictures, if the recipe names a network.
    """

    settings: MeasureSettings
    known: Known
    features: Features | None

    def report(
        self, frames: Tensor, tracks: Tensor, fps: float, chunk_starts: Sequence[int]
    ) -> VideoReport:
        """Measure a video.

        Args:
            frames: pixels, of the size that this was opened for. [T, height, width, 3]
            tracks: speech of each speaker at 16 kHz and -23 LUFS. [S, samples]
            fps: frames per second.
            chunk_starts: first frame of each chunk, the first 0.

        Raises:
            InputError: the mouth's region holds nothing but colours near the mouth's.
        """
        numbers = [
            talking_report(frames, track, fps, chunk_starts, self.known, self.features)
            for track in tracks
        ]
        return VideoReport(len(frames), fps, list(chunk_starts), vars(self.settings), numbers)


def open_measure(
    settings: MeasureSettings, size: tuple[int, int], reference: Tensor | None
) -> Measure:
    """Load what a `measure` section names, and check it against the scene.

    Args:
        settings: the section.
        size: height and width of the videos.
        reference: pixels of the character as it should be. [height, width, 3]

    Raises:
        InputError: lists all that is wrong, with its place in the recipe.
    """
    problems = [f"measure.{problem}" for problem in settings.problems()]
    problems += _reference_problems(settings, reference)
    region = features = None
    try:
        region = settings.load_region(*size)
    except InputError as error:
        problems.append(f"measure.region: {error}")
    try:
        features = load_features(Path(settings.features)) if settings.features else None
    except InputError as error:
        problems.append(f"measure.features: {error}")
    if problems:
        raise InputError("\n".join(problems))
    known = Known(
        region=region,
        mouth_color=settings.mouth_color,
        full_opening=settings.full_opening,
        closed_opening=settings.closed_opening,
        reference=reference,
        colors=settings.colors,
    )
    return Measure(settings, known, features)


def _reference_problems(settings: MeasureSettings, reference: Tensor | None) -> list[str]:
    if reference is None:
        needed = {"colors": settings.colors, "features": settings.features}
        return [
            f"measure.{name}: there is no portrait or source video to compare with; leave it out"
            for name, value in needed.items()
            if value
        ]
    problems = []
    for name, color in settings.colors.items():
        try:
            color_identity(reference[None], reference, {name: color})
        except InputError as error:
            problems.append(f"measure.{error}")
    return problems
