"""What a LoRA brings: a character that the base never saw, with the adapter and without."""

import logging
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

from filming import FROM_PORTRAIT, FROM_WORDS, Film, film, open_studio, save
from scenes import known, takes, to_scene

from kit.metrics.identity import color_identity
from kit.metrics.mouth import opening_by_color
from kit.metrics.report import Known
from kit.metrics.sync import lip_sync, speech_envelope
from kit.run.fit import ADAPTER_NAME, fit
from kit.run.prepare import prepare
from kit.studio.mouth import FPS
from kit.studio.scenes import Take

log = logging.getLogger("evaluate")

GUEST = "mika"
RECIPE = "recipes/quickstart.yaml"
FOLDER = Path("runs/studio_adapter")
SHARDS = FOLDER / "shards"
NUM_FRAMES = 81
WAYS = {"portrait": FROM_PORTRAIT, "words": FROM_WORDS}

Numbers = dict[str, float]


def compare_adapter(
    count: int, overrides: tuple[str, ...], films: Path | None
) -> dict[str, float | int]:
    """Train the quickstart's adapter and compare the guest's videos with it and without.

    Args:
        count: scenes of the guest, each from a portrait and from words alone.
        overrides: of the sample recipes; the adapter trains on the shipped base.
        films: folder for the videos, if they are to be kept.

    Returns:
        `adapter_identity_gain`: how many times smaller the identity error is with the adapter, in
        videos from words, which is all the base knows of the guest then; `..._portrait`: the same
        from a portrait. `adapter_sync_loss`: sync r without less sync r with, from a portrait.
    """
    seconds, adapter = _train()
    bases = {"base": overrides, "adapter": (*overrides, f"adapter={adapter}")}
    rows: list[Numbers] = []
    for index, take in enumerate(takes(("one",), count, NUM_FRAMES, guest=GUEST)):
        facts = known(take, 0, colors=("hair", "eyes", "clothes"))
        row: Numbers = {}
        for (way, recipe), (name, words) in product(WAYS.items(), bases.items()):
            studio = open_studio(words, recipe)
            scene = to_scene(take, studio.base.geometry)
            scene = replace(scene, has_reference=way == "portrait")
            made = film(studio, scene, index)
            row |= {f"{what}_{way}_{name}": n for what, n in _measure(made, take, facts).items()}
            if films is not None:
                save(films / f"guest-{way}-{name}-{index:02d}.mp4", made, take.tracks.sum(0))
        rows.append(row)
    return {"adapter_seconds": seconds, **_compare(rows)}


def _train() -> tuple[int, Path]:
    quiet: Callable[[str], None] = log.info
    shutil.rmtree(FOLDER, ignore_errors=True)  # a finished run would only be read
    started = time.perf_counter()
    prepare(
        Path("shipped:data/sample/shards"), SHARDS, recipe=RECIPE, encode=True, window=None,
        buckets=None, clip_seconds=20, sequence_fps=25, overwrite=True, report=quiet,
    )  # fmt: skip
    folder = fit(RECIPE, [f"data.path={SHARDS}", f"name={FOLDER.name}"], quiet)
    return round(time.perf_counter() - started), folder / ADAPTER_NAME


def _measure(made: Film, take: Take, facts: Known) -> Numbers:
    assert facts.mouth_color is not None and facts.reference is not None
    # Without a reference the head may be anywhere.
    opening = opening_by_color(made.frames, facts.region, facts.mouth_color)
    envelope = speech_envelope(take.tracks[0], FPS, len(opening))
    identity = color_identity(made.frames, facts.reference, facts.colors)
    return {
        "identity": identity.distance.mean().item(),
        "sync": lip_sync(opening, envelope).r,
    }


def _compare(rows: list[Numbers]) -> dict[str, float]:
    def column(name: str) -> list[float]:
        return [row[name] for row in rows]

    def both(name: str, values: list[float]) -> Numbers:
        mean, spread = statistics.mean(values), statistics.pstdev(values)
        return {name: round(mean, 4), f"{name}_std": round(spread, 4)}

    report: Numbers = {}
    for name in rows[0]:
        report |= both(f"guest_{name}", column(name))
    for way, suffix in (("words", ""), ("portrait", "_portrait")):
        pairs = zip(column(f"identity_{way}_base"), column(f"identity_{way}_adapter"), strict=True)
        report |= both(f"adapter_identity_gain{suffix}", [base / ours for base, ours in pairs])
    pairs = zip(column("sync_portrait_base"), column("sync_portrait_adapter"), strict=True)
    return report | both("adapter_sync_loss", [base - ours for base, ours in pairs])
