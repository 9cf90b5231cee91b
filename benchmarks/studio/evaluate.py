"""Measure the studio base on characters and voices that it never saw.

Run: python benchmarks/studio/evaluate.py
It writes `benchmarks/studio/report.json`; with `--films FOLDER` also the videos.
"""

import argparse
import json
import logging
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from adapter import compare_adapter
from filming import FROM_PORTRAIT, FROM_WORDS, Film, Studio, film, open_studio, save
from scenes import SPEECH, known, takes, to_scene
from words import draw_order, obeyed

from kit.metrics.drift import color_drift, motion_energy, seam_ratio
from kit.metrics.mouth import opening_by_color
from kit.metrics.report import Known
from kit.metrics.sync import lip_sync, silence_opening, speech_envelope
from kit.sampling.scene import Scene
from kit.studio.captions import Speaking
from kit.studio.mouth import FPS
from kit.studio.scenes import Take
from kit.studio.voices import build_corpus

log = logging.getLogger("evaluate")

HERE = Path(__file__).parent
LONG_CHUNKS, SHORT_CHUNKS, PAIR_CHUNKS = 10, 3, 5

Numbers = dict[str, float]


@dataclass(frozen=True)
class Job:
    """One video to make and measure.

    Attributes:
        kind: key of `MEASURES`.
        index: which of its kind, also the seed of the noise.
        overrides: of the sample recipes.
        films: folder for the video, if it is to be kept.
    """

    kind: str
    index: int
    overrides: tuple[str, ...]
    films: Path | None


def measure_talk(job: Job, studio: Studio) -> Numbers:
    """One speaker over ten chunks; the lips are judged on the first three."""
    take = _take(("one",), job.index, _length(studio, LONG_CHUNKS))
    made = _film(job, studio, to_scene(take, studio.base.geometry), take)
    facts = known(take, 0)
    numbers = _speech(made.beginning(SHORT_CHUNKS), take, 0, facts)
    whole = _speech(made, take, 0, facts)
    drift = color_drift(made.frames, made.chunk_starts)
    return numbers | {
        "silence_opening": whole.get("silence_opening", float("nan")),
        "long_sync_r": whole["sync_r"],
        "last_chunks_sync_r": _speech_from(made, take, facts, made.chunk_starts[-SHORT_CHUNKS]),
        "seam_ratio": seam_ratio(made.frames, made.chunk_starts[1:]) or float("nan"),
        "crossfade_ratio": seam_ratio(made.frames, _faded(made, studio)) or float("nan"),
        "color_drift": drift[-1].item(),
        "largest_color_drift": drift.max().item(),
        "motion_energy": motion_energy(made.frames),
    }


def measure_silence(job: Job, studio: Studio) -> Numbers:
    """One character who says nothing."""
    take = _take(("nobody",), job.index, _length(studio, SHORT_CHUNKS))
    made = _film(job, studio, to_scene(take, studio.base.geometry), take)
    return {"silence_opening": _mean_opening(made, known(take, 0))}


def measure_pair(job: Job, studio: Studio) -> Numbers:
    """Two characters of whom one speaks and the other listens."""
    take = _take(("left", "right"), job.index, _length(studio, PAIR_CHUNKS))
    speaker = 0 if take.speaking == "left" else 1
    made = _film(job, studio, to_scene(take, studio.base.geometry), take)
    spoken = _speech(made, take, speaker, known(take, speaker))
    listener = known(take, 1 - speaker)
    envelope = speech_envelope(take.tracks[speaker], FPS, len(made.frames))
    talk = lip_sync(film_opening(made, listener), envelope)
    return {
        "speaker_r": spoken["sync_r"],
        "cross_talk_r": talk.r,
        "listener_opening": _mean_opening(made, listener),
    }


def measure_words(job: Job, studio: Studio) -> Numbers:
    """A video from words and speech alone."""
    order = draw_order(job.index)
    take = _take(("one",), job.index, studio.sampler.num_frames)
    given = to_scene(take, studio.base.geometry)
    scene = Scene(order.caption, given.tracks, given.source, given.speaker_masks, False)
    made = _film(job, studio, scene, take)
    answers = obeyed(made.frames, order)
    return {
        "text_obeyed": statistics.mean(answers.values()),
        **{f"text_obeyed_{part}": float(answer) for part, answer in answers.items()},
    }


MEASURES: dict[str, Callable[[Job, Studio], Numbers]] = {
    "talk": measure_talk,
    "silence": measure_silence,
    "pair": measure_pair,
    "words": measure_words,
}


def main(words: Sequence[str]) -> None:
    """Read the command line, film, measure and write the report."""
    options = _read(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not (SPEECH / "test").exists():
        build_corpus(SPEECH, "test", 1200.0)
    kinds = options.only or [*MEASURES, "adapter"]
    started = time.perf_counter()
    jobs = [
        Job(kind, index, tuple(options.overrides), options.films)
        for kind in MEASURES
        if kind in kinds
        for index in range(options.clips)
    ]
    found: dict[str, list[float]] = {}
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for count, numbers in enumerate(pool.imap_unordered(run, jobs), start=1):
            for name, value in numbers.items():
                found.setdefault(name, []).append(value)
            if count % 8 == 0 or count == len(jobs):
                log.info("%d of %d videos, %.0f s", count, len(jobs), time.perf_counter() - started)
    report = summary(found) | {"n_clips": options.clips}
    if "adapter" in kinds:
        report |= compare_adapter(options.clips // 4, tuple(options.overrides), options.films)
    report["seconds"] = round(time.perf_counter() - started)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    log.info("%s", json.dumps(report, indent=2))


def run(job: Job) -> Numbers:
    """Make and measure one video."""
    recipe = FROM_WORDS if job.kind == "words" else FROM_PORTRAIT
    return MEASURES[job.kind](job, open_studio(job.overrides, recipe))


def summary(found: dict[str, list[float]]) -> dict[str, float | int]:
    """Give mean and spread of each number over the clips that have it."""
    report: dict[str, float | int] = {}
    for name, values in found.items():
        given = [value for value in values if value == value]
        report[name] = round(statistics.mean(given), 4)
        report[f"{name}_std"] = round(statistics.pstdev(given), 4)
    return report


def _faded(made: Film, studio: Studio) -> list[int]:
    """List the frames in which one chunk's decoding turns into the next one's, seams included."""
    fades = studio.sampler.crossfade_frames
    return [frame for seam in made.chunk_starts[1:] for frame in range(seam - fades, seam + 1)]


def _take(speaking: Sequence[Speaking], index: int, num_frames: int) -> Take:
    return list(takes(speaking, index + 1, num_frames))[-1]


def _length(studio: Studio, num_chunks: int) -> int:
    sampler = studio.sampler
    return sampler.num_frames + (num_chunks - 1) * (sampler.num_frames - sampler.context_frames)


def _film(job: Job, studio: Studio, scene: Scene, take: Take) -> Film:
    made = film(studio, scene, job.index)
    if job.films is not None:
        save(job.films / f"{job.kind}-{job.index:02d}.mp4", made, take.tracks.sum(0))
    return made


def film_opening(made: Film, facts: Known) -> torch.Tensor:
    """Measure how far a mouth is open, 0 to 1 and a little beyond. [T]"""
    assert facts.mouth_color is not None and facts.full_opening is not None
    area = opening_by_color(made.frames, facts.region, facts.mouth_color)
    return (area - facts.closed_opening) / (facts.full_opening - facts.closed_opening)


def _mean_opening(made: Film, facts: Known) -> float:
    return film_opening(made, facts).clamp(0, 1).mean().item()


def _speech(made: Film, take: Take, speaker: int, facts: Known) -> Numbers:
    opening = film_opening(made, facts)
    envelope = speech_envelope(take.tracks[speaker], FPS, len(opening))
    sync = lip_sync(opening, envelope)
    silence = silence_opening(opening, envelope, full_opening=1.0)
    numbers: Numbers = {"sync_r": sync.r, "lag_frames": float(sync.lag_frames)}
    return numbers if silence is None else numbers | {"silence_opening": silence}


def _speech_from(made: Film, take: Take, facts: Known, start: int) -> float:
    envelope = speech_envelope(take.tracks[0], FPS, len(made.frames))
    return lip_sync(film_opening(made, facts)[start:], envelope[start:]).r


def _read(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the studio base.")
    parser.add_argument("--clips", type=int, default=32, help="of each kind")
    parser.add_argument("--only", nargs="+", choices=[*MEASURES, "adapter"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--films", type=Path, help="keep the videos in this folder")
    parser.add_argument("--out", type=Path, default=HERE / "report.json")
    parser.add_argument("overrides", nargs="*", help="of the sample recipes")
    return parser.parse_args(words)


if __name__ == "__main__":
    main(sys.argv[1:])
