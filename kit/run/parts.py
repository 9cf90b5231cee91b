"""The parts of a fine-tuning run, built from its recipe but not loaded yet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kit.adapters.full import Full
from kit.adapters.lora import Lora
from kit.data.buckets import parse_buckets
from kit.data.module import ShardData
from kit.errors import InputError
from kit.models.base import Base, Geometry
from kit.models.low_bits import FORMS
from kit.objectives.base import Objective
from kit.recipe import Recipe
from kit.run.fallbacks import require_fallbacks
from kit.run.plugins import build_sampler, require_plugins
from kit.run.scenes import build_measure, load_portrait
from kit.sampling.pipeline import TalkSampler
from kit.sampling.plugin import INSIDE
from kit.training.dropout import ConditionDropout
from kit.training.optim import OptimizerSettings
from kit.training.previews import PreviewSettings
from kit.training.trainer import Training


@dataclass(frozen=True)
class FitParts:
    """What a fit recipe names, section by section."""

    base: Base
    adapter: Lora | Full
    objective: Objective
    dropout: ConditionDropout
    data: ShardData
    optimizer: OptimizerSettings
    training: Training
    sampler: TalkSampler
    preview: PreviewSettings | None


def build_fit(recipe: Recipe) -> FitParts:
    """Build every section of a fit recipe; nothing is read yet but the base's sizes.

    Raises:
        InputError: lists all that is missing or does not go together.
    """
    base: Base = recipe.build("base")
    problems = base.problems()
    data = build_data(recipe, base.geometry, None if problems else base.fingerprint())
    problems += data.problems()
    parts = FitParts(
        base=base,
        adapter=recipe.build("adapter"),
        objective=recipe.build("objective"),
        dropout=recipe.build("dropout"),
        data=data,
        optimizer=recipe.build("optimizer"),
        training=recipe.build("trainer"),
        sampler=build_sampler(recipe),
        preview=recipe.build("preview") if "preview" in recipe else None,
    )
    problems += parts.sampler.problems(base.geometry.frame_stride)
    if parts.sampler.offload != "none":
        problems.append(
            "sampling.offload: a network in training stays where it is; take none, and "
            "trainer.offload for training and previews"
        )
    problems += _picture_problems(recipe, parts.preview)
    form = recipe.values["base"].get("quantise")
    trains_whole_parts = bool(parts.adapter.train_fully)
    problems += quantisation_problems(form, parts.adapter.kind, parts.adapter.train_fully)
    if recipe.values["objective"].get("keep_base") and trains_whole_parts:
        problems.append(
            "objective.keep_base: parts that train fully have no base left to be compared with"
        )
    is_half = recipe.values["base"].get("dtype") == "bfloat16"
    if trains_whole_parts and is_half and parts.training.precision == "32-true":
        problems.append(
            "trainer.precision: 32-true cannot train whole parts, which are float32, in a base of "
            "bfloat16; take bf16-mixed, or float32 for base.dtype"
        )
    if parts.training.device == "cuda" and not torch.cuda.is_available():
        problems.append("trainer.device: there is no CUDA device here; take auto or cpu")
    if parts.training.split_frames > 1 and not parts.training.is_sharded:
        problems.append("trainer.split_frames: there is one process; give trainer.devices")
    if parts.training.is_sharded:
        problems += _sharding_problems(parts, form)
    if parts.sampler.hooks.plugins and parts.preview is None:
        problems.append("plugins: only previews use them, and there is no section `preview`")
    _refuse(problems)
    if parts.preview is not None:
        _, size = load_portrait(Path(parts.preview.image), recipe["buckets"])
        require_plugins(recipe, base, parts.sampler, size, has_reference=True)
    _refuse(parts.adapter.problems(base.empty_denoiser()))
    require_fallbacks(recipe, build_fit)
    return parts


def build_data(
    recipe: Recipe, sizes: Geometry | None = None, fingerprint: str | None = None
) -> ShardData:
    """Build the data section for the sizes of a base, by default those of Wan."""
    sizes = sizes or Geometry()
    data: ShardData = recipe.build(
        "data", sizes.frame_stride, sizes.pixel_stride, sizes.fps, fingerprint
    )
    return data


def quantisation_problems(form: str | None, kind: str, train_fully: Sequence[str]) -> list[str]:
    """Say what of an adapter a base whose weights are held in this form cannot bear.

    Args:
        form: of the base's weights; None if they are in full.
        kind: of the adapter's factors.
        train_fully: parts that it holds whole.
    """
    if form is None:
        return []
    found = [
        f"base.quantise: {form} cannot take whole weights, and the adapter has those of '{part}'"
        for part in train_fully
        if part != "audio"
    ]
    kinds = FORMS[form].adapters
    if kind not in kinds:
        found.append(f"adapter: a {kind} does not go with {form}; valid: {', '.join(kinds)}")
    return found


def _sharding_problems(parts: FitParts, form: str | None) -> list[str]:
    """Say what cannot be distributed over several processes, or offloaded.

    Args:
        parts: of the run.
        form: of the base's weights; None if they are in full.
    """
    adapter, found = parts.adapter, list[str]()
    if parts.training.is_offloaded and form is not None and FORMS[form].is_packed:
        found.append(
            f"trainer.offload: weights in {form} cannot leave block by block; take none, or fp8 "
            "for base.quantise"
        )
    if adapter.kind == "dora" and form is None:
        found.append(
            "adapter.kind: the magnitudes of dora need whole weights, which no process of a "
            "sharded run has; take lora, loha or lokr"
        )
    if isinstance(adapter, Full) and adapter.start != 1:
        found.append(
            f"adapter.start: {adapter.start} changes whole weights, which no process of a sharded "
            "run has; take 1"
        )
    if not parts.optimizer.is_elementwise:
        found.append(
            "optimizer: this one needs whole matrices or blocks of them, which no process of a "
            "sharded run has; take adamw with state_bits: 32"
        )
    training, share = parts.training, parts.training.split_frames
    if training.world % share:
        found.append(f"trainer.split_frames: {share} does not divide {training.world} processes")
    inner = [name for hook in INSIDE for name in parts.sampler.hooks.having(hook)]
    if share > 1 and inner:
        found.append(
            f"plugins.{inner[0]}: looks into the denoiser, where each process has only some of the "
            "frames; take trainer.split_frames: 1"
        )
    available = torch.cuda.device_count()
    if training.uses_gpu and training.devices > available:
        found.append(f"trainer.devices: {training.devices} of {available} GPUs")
    return found


def _picture_problems(recipe: Recipe, preview: PreviewSettings | None) -> list[str]:
    try:
        parse_buckets(recipe["buckets"])
    except InputError as error:
        return [str(error)]
    if preview is None or "measure" not in recipe:
        return []
    try:
        source, size = load_portrait(Path(preview.image), recipe["buckets"])
    except InputError as error:
        return [f"preview.image: {error}"]
    try:
        build_measure(recipe, size, source)
    except InputError as error:
        return str(error).splitlines()
    return []


def _refuse(problems: list[str]) -> None:
    if problems:
        raise InputError("\n".join(problems))
