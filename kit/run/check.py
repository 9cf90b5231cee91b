"""`kit check`: everything that can be known before a run is said before a run."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from kit.adapters.lora import trained_parameters
from kit.data.shards import Shards
from kit.errors import InputError
from kit.models.inspection import Survey, holds_weights, survey_file, survey_folder
from kit.models.tensor_files import SUFFIXES
from kit.recipe import Recipe, json_schema, read
from kit.run.parts import build_fit
from kit.run.pretrain import build_pretraining
from kit.run.recipes import SCHEMAS, schema_of
from kit.run.sample import build_sample


def check(paths: Sequence[str], overrides: Sequence[str], report: Callable[[str], None]) -> None:
    """Check recipes, folders of shards and weights; all of them, even if an early one is wrong.

    Args:
        paths: recipes, folders that `kit prepare` wrote, files of weights or folders of them.
        overrides: `section.key=value` words, for every recipe.
        report: told what is right.

    Raises:
        InputError: lists everything that is wrong.
    """
    problems = []
    for path in paths:
        try:
            survey = _survey(path, overrides)
        except InputError as error:
            problems.append(str(error))
        else:
            report(f"{path}: {survey.heading}")
            for line in survey.lines:
                report(f"  {line}")
            problems += [f"{path}: {problem}" for problem in survey.problems]
    if problems:
        raise InputError("\n".join(problems))


def describe(command: str, out: Path | None, report: Callable[[str], None]) -> None:
    """Write or print the JSON schema of a command's recipes, for editors."""
    text = json.dumps(json_schema(SCHEMAS[command]), indent=2) + "\n"
    if out is None:
        report(text.rstrip())
    else:
        out.write_text(text)
        report(f"{out}: written")


def _survey(name: str, overrides: Sequence[str]) -> Survey:
    path = Path(name)
    if path.is_dir():
        return survey_folder(path) if holds_weights(path) else _shards(path)
    if path.suffix in SUFFIXES:
        return survey_file(path)
    schema = schema_of(name)
    return Survey("ok", tuple(_NOTES[schema.title](read(name, overrides, schema))))


def _fit_notes(recipe: Recipe) -> list[str]:
    parts = build_fit(recipe)
    denoiser = parts.base.empty_denoiser()
    total = sum(parameter.numel() for parameter in denoiser.parameters())
    layers = [layer for part in parts.adapter.parts for layer in denoiser.parts()[part]]
    parts.adapter.inject(denoiser, seed=0)
    trained = sum(parameter.numel() for parameter in trained_parameters(denoiser).values())
    return [
        *parts.base.notes(),
        *parts.data.notes(),
        f"{total:,} parameters frozen, {trained:,} train (factors on {len(layers)} layers)",
        f"{parts.training.max_steps} steps of "
        f"{parts.data.batch_size * parts.training.accumulate} windows",
    ]


def _sample_notes(recipe: Recipe) -> list[str]:
    base, sampler = build_sample(recipe)
    return [
        *base.notes(),
        f"{len(sampler.sigmas) - 1} steps a chunk of {sampler.num_frames} frames",
    ]


def _pretrain_notes(recipe: Recipe) -> list[str]:
    problems = build_pretraining(recipe).data.problems()
    if problems:
        raise InputError("\n".join(problems))
    return []


_NOTES = {"fit": _fit_notes, "sample": _sample_notes, "pretrain": _pretrain_notes}


def _shards(folder: Path) -> Survey:
    shards = Shards(folder)
    return Survey("ok", (f"{len(shards)} clips ({shards.kind})",))
