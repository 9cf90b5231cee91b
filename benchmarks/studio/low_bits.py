"""What the studio base loses in four and eight bits, and what an adapter trained on it is worth.

Run: python benchmarks/studio/low_bits.py
It writes `benchmarks/studio/low_bits.json`. Adapters that are in `runs/` already are not trained
again.
"""

import json
import logging
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from adapter import GUEST, NUM_FRAMES, RECIPE, SHARDS
from filming import FROM_WORDS, film, open_studio
from scenes import SPEECH, known, takes, to_scene

from kit.metrics.identity import color_identity
from kit.models.base import Base, Denoiser
from kit.models.low_bits import FORMS
from kit.run.fit import ADAPTER_NAME, fit
from kit.run.parts import FitParts, build_fit
from kit.run.prepare import prepare
from kit.run.recipes import FIT, read_as
from kit.run.rounding import Rounding, first_inputs, measure_rounding, stream_blocks
from kit.studio.voices import build_corpus

log = logging.getLogger("low_bits")

OUT = Path(__file__).with_suffix(".json")
CPU = torch.device("cpu")
NUM_SAMPLES, NUM_SCENES = 8, 8

CASES = {
    "full base": (None, None),
    "nf4 base": ("nf4", "nf4"),
    "trained on nf4, used on the full base": ("nf4", None),
}
"""What the adapter was trained on and what it is used on."""

Numbers = dict[str, float]


def main() -> None:
    """Measure, print two tables and write them."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not (SHARDS / "encoded").exists():
        prepare(
            Path("shipped:data/sample/shards"), SHARDS, recipe=RECIPE, encode=True, window=None,
            buckets=None, clip_seconds=20, sequence_fps=25, overwrite=True, report=log.info,
        )  # fmt: skip
    if not (SPEECH / "test").exists():
        build_corpus(SPEECH, "test", 1200.0)
    forms = {form or "none": measure_form(form) for form in (None, *FORMS)}
    for form, numbers in forms.items():
        log.info("%-12s %s", form, numbers)
    adapters = {case: measure_adapter(*pair) for case, pair in CASES.items()}
    full = adapters["full base"]["identity"]
    for case, numbers in adapters.items():
        numbers["ratio"] = round(numbers["identity"] / full, 4)
        log.info("%-38s %s", case, numbers)
    OUT.write_text(json.dumps({"forms": forms, "adapters": adapters}, indent=2) + "\n")


def measure_form(form: str | None) -> Numbers:
    """Errors in float32 as `kit fit` measures them, over some noise levels; and the memory."""
    recipe = read_as(RECIPE, fit_words(form), FIT)
    half: Base = read_as(RECIPE, [*fit_words(form), "base.dtype=bfloat16"], FIT).build("base")
    parts = build_fit(recipe)
    denoiser = parts.base.load_denoiser(CPU)
    numbers: Numbers = {
        "megabytes": megabytes(denoiser),
        "megabytes_bfloat16": megabytes(half.load_denoiser(CPU)),
    }
    if form is None:
        return numbers
    parts.data.prepare_run(None, 0, 1, place=(0, 1))
    found = [measure(parts, denoiser, seed) for seed in range(NUM_SAMPLES)]
    alone = [[f.blocks[n].alone for f in found] for n in range(len(denoiser.blocks()))]
    errors = [statistics.mean(errors) for errors in alone]
    return numbers | {
        "worst_block": errors.index(max(errors)),
        "worst_block_error": round(max(errors), 5),
        "velocity_error": round(statistics.mean(f.velocity for f in found), 5),
        "velocity_error_std": round(statistics.pstdev(f.velocity for f in found), 5),
    }


def measure(parts: FitParts, denoiser: Denoiser, seed: int) -> Rounding:
    """Measure on one sample; the seed decides its noise level."""
    inputs = first_inputs(parts.data, parts.objective, seed, CPU)
    return measure_rounding(denoiser, stream_blocks(parts.base, CPU), inputs)


def megabytes(denoiser: Denoiser) -> float:
    """Add up all that a denoiser holds, factors of quantised weights included."""
    return round(sum(tensor.nbytes for tensor in denoiser.state_dict().values()) / 1e6, 2)


def measure_adapter(trained_on: str | None, used_on: str | None) -> Numbers:
    """Train the quickstart's adapter and measure the guest's colours in videos from her name.

    Returns:
        RGB distance to the guest, mean and spread over scenes; 120 without any adapter.
    """
    adapter = fit(RECIPE, fit_words(trained_on), log.info) / ADAPTER_NAME
    words = [f"adapter={adapter}", *quantise_words(used_on)]
    studio = open_studio(tuple(words), FROM_WORDS)
    distances = []
    for index, take in enumerate(takes(("one",), NUM_SCENES, NUM_FRAMES, guest=GUEST)):
        facts = known(take, 0, colors=("hair", "eyes", "clothes"))
        assert facts.reference is not None
        scene = replace(to_scene(take, studio.base.geometry), has_reference=False)
        made = film(studio, scene, index)
        identity = color_identity(made.frames, facts.reference, facts.colors)
        distances.append(identity.distance.mean().item())
    return {
        "identity": round(statistics.mean(distances), 3),
        "identity_std": round(statistics.pstdev(distances), 3),
    }


def fit_words(form: str | None) -> list[str]:
    """Override the quickstart's recipe."""
    return [f"data.path={SHARDS}", f"name=low_bits_{form or 'none'}", *quantise_words(form)]


def quantise_words(form: str | None) -> list[str]:
    """Override the base of any recipe."""
    return [] if form is None else [f"base.quantise={form}"]


if __name__ == "__main__":
    main()
