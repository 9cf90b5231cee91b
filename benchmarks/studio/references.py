"""InfiniteTalk's study of reference frames, in miniature: which way serves dubbing best?

Run: python benchmarks/studio/references.py
Each way trains the studio base from the same start for the same steps, and dubs the same long
videos with other people's speech. It writes `benchmarks/studio/references.json` and `.png`, prints
the table, and keeps the videos where `--films` says, with a strip of pictures of one of them. What
is in `runs/studies` already is not made again.
"""

import argparse
import json
import logging
import multiprocessing
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from evaluate import film_opening
from filming import film, open_studio, save
from PIL import Image
from scenes import Known, known, takes, to_scene
from torch import Tensor

from kit.data.media import iter_frames
from kit.metrics.drift import color_drift, motion_energy, seam_ratio
from kit.metrics.identity import color_identity
from kit.metrics.sync import lip_sync, speech_envelope
from kit.sampling.frames import to_pixels
from kit.sampling.scene import Scene
from kit.shipped import resolve
from kit.studio.drawing import paint_frames
from kit.studio.mouth import FPS

log = logging.getLogger("references")

HERE, RUNS = Path(__file__).parent, Path("runs/studies")
NEAR, MIN_PIXELS = 60.0, 20

NUM_FRAMES = 33 + 9 * 32
"""Ten chunks of the chained ways, 13 of those that share nine frames: the same 12.8 seconds."""

Numbers = dict[str, float]

CHAINED = ("sampling.context_frames=1", "sampling.crossfade_frames=1")
WAYS: dict[str, tuple[str, ...]] = {
    "m0": (),
    "m1": (),
    "m2": (),
    "m3": (),
    "i2v": (*CHAINED, "sampling.continuity=last_frame"),
    "fl2v": (*CHAINED, "sampling.continuity=both_ends"),
}
"""How each way samples; how it trains stands in `recipes/studies/<way>.yaml`."""


@dataclass(frozen=True)
class Job:
    """One video to dub."""

    way: str
    index: int
    films: Path | None


class PaintedSource:
    """The frames of a drawn clip as a source video. uint8 [T, height, width, 3]"""

    def __init__(self, frames: np.ndarray) -> None:
        self.frames = frames

    def frame(self, index: int) -> Tensor:
        """Give a frame, -1 to 1; the last one behind the end. [3, height, width]"""
        return to_pixels(self.frames[min(index, len(self.frames) - 1)])


def main(words: Sequence[str]) -> None:
    """Train what is missing, film, measure, and write table and plot."""
    parser = argparse.ArgumentParser(description="Compare ways of choosing reference frames.")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--films", type=Path, help="keep the videos in this folder")
    options = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for way in options.only:
        train(way)
    jobs = [
        Job(way, index, options.films) for way in options.only for index in range(options.clips)
    ]
    rows: dict[str, list[Numbers]] = {way: [] for way in options.only}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for job, numbers in zip(jobs, pool.imap(dub, jobs), strict=True):
            rows[job.way].append(numbers)
            log.info("%s %d: %s", job.way, job.index, json.dumps(numbers))
    report = {way: summary(found) for way, found in rows.items()}
    (HERE / "references.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, HERE / "references.png")
    if options.films is not None:
        strip(options.films, options.only).save(HERE / "references_strip.png")
    for way, numbers in report.items():
        log.info(
            "%-6s" + "  %s %.3f" * len(SHOWN), way, *(x for n in SHOWN for x in (n, numbers[n]))
        )


def train(way: str) -> None:
    """Draw and encode clips, train, and put a base together."""
    base, recipe = RUNS / way / "base", f"recipes/studies/{way}.yaml"
    if base.exists():
        return
    raw = RUNS / "raw"
    if not (raw / "index.json").exists():
        _run(
            "data/prepare_studio.py",
            str(raw),
            *"--clips 300 --stills 0 --seconds 9 --seed 3".split(),
        )
    kit = ("-m", "kit")
    _run(*kit, "prepare", str(raw), "--out", str(RUNS / way), "--recipe", recipe, "--encode")
    _run(*kit, "fit", recipe)
    made = RUNS / way / "made"
    _run(
        *kit,
        "export",
        f"runs/study_{way}/adapter.safetensors",
        "--to",
        "base",
        "--out",
        str(made),
        "--dtype",
        "float16",
    )
    shutil.copytree(resolve("shipped:data/studio_base"), made / "whole")
    shutil.copytree(made / "base", made / "whole", dirs_exist_ok=True)
    (made / "whole").rename(base)


def dub(job: Job) -> Numbers:
    """Dub one drawn clip with another one's speech, unless that was measured before."""
    row = RUNS / "rows" / f"{job.way}-{job.index:02d}.json"
    if not row.exists():
        row.parent.mkdir(exist_ok=True)
        row.write_text(json.dumps(measure(job)))
    numbers: Numbers = json.loads(row.read_text())
    return numbers


def measure(job: Job) -> Numbers:
    """Dub one drawn clip and measure the video."""
    studio = open_studio((f"base.path={RUNS / job.way / 'base'}", *WAYS[job.way]))
    take, other = list(takes(("one",), job.index + 2, NUM_FRAMES))[-2:]
    source = np.stack(list(paint_frames(take.scene)))
    given = to_scene(take, studio.base.geometry)
    scene = Scene(given.text, other.tracks, PaintedSource(source), given.speaker_masks)
    made = film(studio, scene, job.index)
    if job.films is not None:
        save(job.films / f"{job.way}-{job.index:02d}.mp4", made, other.tracks.sum(0))
    facts = known(take, 0, colors=("hair", "clothes"))
    assert facts.reference is not None
    opening = film_opening(made, facts)
    sync = lip_sync(opening, speech_envelope(other.tracks[0], FPS, len(opening)))
    identity = color_identity(made.frames, facts.reference, seen(facts)).distance
    drift = color_drift(made.frames, made.chunk_starts)
    hair = facts.colors["hair"]
    starts = [*made.chunk_starts, len(made.frames)]
    return {
        "sync_r": sync.r,
        "lag_frames": float(sync.lag_frames),
        "identity": identity.mean().item(),
        "identity_last": identity[-33:].mean().item(),
        "color_drift": drift[-1].item(),
        "seam_ratio": seam_ratio(made.frames, made.chunk_starts[1:]) or float("nan"),
        "motion": motion_energy(made.frames) / motion_energy(torch.from_numpy(source)),
        "copying": copying(made.frames, torch.from_numpy(source), hair),
        **{f"drift_at_{starts[n]}": value.item() for n, value in enumerate(drift)},
    }


def seen(facts: Known) -> dict[str, tuple[int, int, int]]:
    """Give the colours that are in the reference; a face near the camera hides the clothes."""
    assert facts.reference is not None
    pixels = facts.reference.float().flatten(0, 1)  # [N, 3]
    return {
        name: color
        for name, color in facts.colors.items()
        if (pixels - torch.tensor(color)).norm(dim=1).lt(NEAR / 2).sum() > MIN_PIXELS
    }


def copying(made: Tensor, source: Tensor, hair: tuple[int, int, int]) -> float:
    """Measure how much the head goes where the source's head goes.

    Returns:
        Correlation of both paths over the video, rows and columns together: 1 where poses are
        copied, 0 where they have nothing to do with each other.
    """
    one, other = (_places(frames, hair) for frames in (made, source))
    one, other = ((path - path.mean(0)).flatten() for path in (one, other))
    return (one @ other / (one.norm() * other.norm()).clamp_min(1e-6)).item()


def _places(frames: Tensor, color: tuple[int, int, int]) -> Tensor:
    """Find the middle of a colour in each frame, in pixels. [T, 2]"""
    distance = (frames.float() - torch.tensor(color)).norm(dim=-1)
    weight = (-distance.square() / (2 * NEAR**2)).exp()
    weight = weight / weight.sum((1, 2), keepdim=True)
    rows, columns = torch.arange(frames.shape[1]), torch.arange(frames.shape[2])
    return torch.stack([(weight.sum(2) * rows).sum(1), (weight.sum(1) * columns).sum(1)], dim=1)


SHOWN = ("sync_r", "identity", "color_drift", "seam_ratio", "motion", "copying")


def summary(rows: Sequence[Numbers]) -> Numbers:
    """Give mean and spread of each number."""
    report: Numbers = {"n_clips": len(rows)}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] == row[name]]
        report[name] = round(statistics.mean(values), 4)
        report[f"{name}_std"] = round(statistics.pstdev(values), 4)
    return report


def draw(report: dict[str, Numbers], picture: Path) -> None:
    """Plot the colour drift over the chunks, and the other numbers as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for way, numbers in report.items():
        drift = {
            int(name.removeprefix("drift_at_")) / FPS: value
            for name, value in numbers.items()
            if name.startswith("drift_at_") and not name.endswith("_std")
        }
        axes[0].plot([*drift], [*drift.values()], label=way)
    axes[0].set(title="colour drift, of 255", xlabel="chunk's first second")
    axes[0].legend()
    for axis, name in zip(axes[1:], (n for n in SHOWN if n != "color_drift"), strict=True):
        values = [numbers[name] for numbers in report.values()]
        spreads = [numbers[f"{name}_std"] for numbers in report.values()]
        axis.bar([*report], values, yerr=spreads)
        axis.set(title=name)
    figure.savefig(picture, dpi=80)


def strip(films: Path, ways: Sequence[str], index: int = 3, count: int = 10) -> Image.Image:
    """Show one clip as each way dubs it, a way in a row, from the first frame to the last."""
    rows = []
    for way in ways:
        frames = list(iter_frames(films / f"{way}-{index:02d}.mp4", FPS))
        times = np.linspace(0, len(frames) - 1, count).astype(int)
        rows.append(np.concatenate([frames[time] for time in times], axis=1))
    return Image.fromarray(np.concatenate(rows))


def _run(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
