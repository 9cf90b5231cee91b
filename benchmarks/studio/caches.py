"""What caches save on the studio base, and what they cost.

Run: python benchmarks/studio/caches.py
It prints the table and writes `benchmarks/studio/caches.json`. TeaCache's polynomial and MagCache's
ratios belong to a network and a number of steps, so they are found here, on scenes that are not
measured. Each scene is filmed without a cache and with each in turn. Seconds are the processor's,
spent in the denoiser; the error is that of the pixels against the film without a cache.
"""

import argparse
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from evaluate import film_opening
from filming import Studio, film, open_studio, with_plugins
from scenes import SPEECH, known, takes, to_scene
from torch import Tensor

from kit import plugins
from kit.metrics.sync import lip_sync, speech_envelope
from kit.models.base import Denoiser
from kit.models.inside import Entry, Update
from kit.sampling.caching import magnitude_ratio, relative_change, run_or_reuse
from kit.sampling.plugin import At, Plugin
from kit.studio.mouth import FPS
from kit.studio.scenes import Take
from kit.studio.voices import build_corpus

log = logging.getLogger("caches")

OUT = Path(__file__).with_suffix(".json")
STEPS, NUM_FRAMES = 24, 33 + 24
NUM_FITTED = 2
DEGREE = 4
COLUMNS = ("skipped", "speed-up", "PSNR", "of 255", "sync r", "r lost")

Numbers = dict[str, float]


class Change(NamedTuple):
    """What one step changed.

    Attributes:
        step: number of the step, from 1.
        modulation: relative change of the noise level's modulation.
        residual: relative change of what all blocks add.
        magnitude: of what they add, over that of the step before.
    """

    step: int
    modulation: float
    residual: float
    magnitude: float


class Measuring(Plugin):
    """Skips nothing, and notes what changes from step to step."""

    def __init__(self) -> None:
        self.changes: list[Change] = []

    def blocks(self, blocks: Sequence[Update], x: Tensor, entry: Entry, at: At) -> Tensor:
        """Run the blocks."""
        before = dict(at.memory)
        result = run_or_reuse(blocks, x, at, reuse=False)
        at.memory["modulation"] = entry.modulation
        if before:
            now = at.memory["residual"]
            self.changes.append(
                Change(
                    at.step,
                    relative_change(entry.modulation, before["modulation"]),
                    relative_change(now, before["residual"]),
                    magnitude_ratio(now, before["residual"]),
                )
            )
        return result


class Timed:
    """A denoiser that notes how long it takes, and in which passes its last block ran."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser: Any = denoiser
        self.seconds, self.passes, self.computed = 0.0, 0, 0
        self._hook = denoiser.blocks()[-1].register_forward_hook(self._count)

    def remembering(self) -> Callable[..., Tensor]:
        """Give it with a new memory, as the sampler wants it."""
        return partial(self._ask, self._denoiser.remembering())

    def close(self) -> None:
        """Stop counting."""
        self._hook.remove()

    def _ask(self, predict: Callable[..., Tensor], *given: Any, **inside: Any) -> Tensor:
        started = time.process_time()
        velocity = predict(*given, **inside)
        self.seconds += time.process_time() - started
        self.passes += 1
        return velocity

    def _count(self, *given: Any) -> None:
        self.computed += 1


def main() -> None:
    """Fit, film, measure, print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=6)
    count: int = parser.parse_args().scenes
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("kit").setLevel(logging.WARNING)
    if not (SPEECH / "test").exists():
        build_corpus(SPEECH, "test", 1200.0)
    studio = open_studio((f"sampling.steps={STEPS}",))
    drawn = list(takes(("one",), NUM_FITTED + count, NUM_FRAMES))
    cases = dict(make_cases(measure_changes(studio, drawn[:NUM_FITTED])))
    rows: dict[str, list[Numbers]] = {case: [] for case in ("none", *cases)}
    for number, take in enumerate(drawn[NUM_FITTED:]):
        for case, numbers in measure_take(studio, take, number, cases):
            rows[case].append(numbers)
        log.info("%d of %d scenes", number + 1, count)
    report = {case: summary(found, rows["none"]) for case, found in rows.items()}
    OUT.write_text(json.dumps(report, indent=2) + "\n")
    log.info("%-24s" + "%10s" * len(COLUMNS), "", *COLUMNS)
    for case, numbers in report.items():
        log.info("%-24s" + "%10.3f" * len(COLUMNS), case, *(numbers[name] for name in COLUMNS))


def measure_changes(studio: Studio, fitted: Sequence[Take]) -> list[Change]:
    """Film without a cache, and note what changes from step to step."""
    measuring = Measuring()
    for number, take in enumerate(fitted):
        film(
            with_plugins(studio, {"cache": measuring}), to_scene(take, studio.base.geometry), number
        )
    return measuring.changes


def make_cases(changes: Sequence[Change]) -> Iterator[tuple[str, Plugin]]:
    """Give each cache with some thresholds."""
    coefficients = fit_polynomial(changes)
    ratios = [1.0] + [
        statistics.mean(change.magnitude for change in changes if change.step == step)
        for step in range(1, STEPS)
    ]
    log.info("coefficients %s\nratios %s", coefficients, ratios)
    for threshold in (0.1, 0.2, 0.4):
        yield f"tea_cache {threshold}", load("tea_cache", threshold, coefficients=coefficients)
    for threshold in (0.05, 0.1, 0.2):
        yield f"first_block {threshold}", load("first_block", threshold)
    for threshold in (0.03, 0.06, 0.24):
        yield f"mag_cache {threshold}", load("mag_cache", threshold, ratios=ratios, first_steps=5)


def fit_polynomial(changes: Sequence[Change]) -> list[float]:
    """Fit how the residual changes with the modulation; highest power first."""
    x, y = ([getattr(change, name) for change in changes] for name in ("modulation", "residual"))
    coefficients: list[float] = np.polyfit(x, y, DEGREE).tolist()
    return coefficients


def load(name: str, threshold: float, **options: Any) -> Plugin:
    """Load a cache."""
    return plugins.load(name)(threshold=threshold, **options)


def measure_take(
    studio: Studio, take: Take, seed: int, cases: dict[str, Plugin]
) -> Iterator[tuple[str, Numbers]]:
    """Film a scene without a cache and with each, and measure the films."""
    facts, plain = known(take, 0), None
    for case, plugin in {"none": Plugin(), **cases}.items():
        timed = Timed(studio.denoiser)
        used = replace(with_plugins(studio, {"cache": plugin}), denoiser=timed)
        made = film(used, to_scene(take, studio.base.geometry), seed)
        timed.close()
        plain = plain or made
        opening = film_opening(made, facts)
        sync = lip_sync(opening, speech_envelope(take.tracks[0], FPS, len(opening)))
        difference = made.frames.float() - plain.frames.float()
        yield (
            case,
            {
                "passes": timed.passes,
                "computed": timed.computed,
                "seconds": timed.seconds,
                "squared": difference.square().mean().item(),
                "absolute": difference.abs().mean().item(),
                "sync_r": sync.r,
            },
        )


def summary(rows: Sequence[Numbers], plain: Sequence[Numbers]) -> Numbers:
    """Put the scenes together."""
    total = {name: sum(row[name] for row in rows) for name in rows[0]}
    squared = total["squared"] / len(rows)
    lost = [other["sync_r"] - row["sync_r"] for row, other in zip(rows, plain, strict=True)]
    found = {
        "skipped": 1 - total["computed"] / total["passes"],
        "speed-up": sum(row["seconds"] for row in plain) / total["seconds"],
        "PSNR": 10 * math.log10(255**2 / squared) if squared else math.inf,
        "of 255": total["absolute"] / len(rows),
        "sync r": total["sync_r"] / len(rows),
        "r lost": statistics.mean(lost),
        "r lost, spread": statistics.pstdev(lost),
    }
    return {name: round(value, 4) for name, value in found.items()} | {"n_clips": len(rows)}


if __name__ == "__main__":
    main()
