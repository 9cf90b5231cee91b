"""The plan of a sampling run: its parameters, memory by stage and setting, and time of a chunk."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kit.adapters.files import load_adapter
from kit.batch import collate
from kit.data.buckets import parse_buckets
from kit.devices import choose_device
from kit.errors import InputError
from kit.models.base import Base
from kit.planning.batches import Window, typical_sample
from kit.planning.encoders import decoding_bytes, encoder_bytes
from kit.planning.sampling import Evaluation, Weights, measure_evaluation, stages, weigh
from kit.recipe import Recipe, change
from kit.run.fallbacks import LEAST
from kit.run.plan_parts import (
    Outline,
    duration,
    gigabytes,
    holding_of,
    matrix_rate,
    memory_here,
    outline,
    rows,
)
from kit.run.plugins import build_sampler
from kit.run.sample import build_sample

AS_WRITTEN = "as in the recipe"
TURNS = "sampling.offload=turns"


@dataclass(frozen=True)
class SamplePlan:
    """What a run of `kit sample` will need; bytes, seconds and counts.

    Attributes:
        settings: bytes of each stage, by what is changed in the recipe.
    """

    name: str
    window: Window
    num_parameters: int
    settings: Mapping[str, Mapping[str, int]]
    limit: float | None
    steps: int
    flops_per_step: float
    rate: float | None
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Give everything as plain values."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """Tell everything as a table."""
        window = self.window
        yield (
            f"{self.name}: {self.num_parameters:,} parameters, chunks of {window.num_frames} "
            f"frames, {window.height}x{window.width}"
        )
        room = "" if self.limit is None else f" of {gigabytes(self.limit)}"
        yield f"memory, the largest stage{room}"
        yield from rows({word: _largest(found) for word, found in self.settings.items()})
        yield "time of a chunk"
        work = f"{self.steps} steps of {self.flops_per_step / 1e12:,.3g} TFLOP"
        seconds = self.rate and duration(self.steps * self.flops_per_step / self.rate)
        yield from rows({"denoising": f"{work}, {seconds or 'rate unknown: state --rate'}"})
        yield from self.notes


def plan_sample(recipe: Recipe, rate: float | None, memory: float | None) -> SamplePlan:
    """Plan a run, whatever of it is not here.

    Args:
        recipe: of the run.
        rate: operations a second, if they are known.
        memory: bytes of the device, if it is another one.

    Raises:
        InputError: the base's sizes are unknown.
    """
    base: Base = recipe.build("base")
    base_outline, device = outline(recipe, base), choose_device(recipe["device"])
    window, sampler = _window(recipe), build_sampler(recipe)
    batch = collate([typical_sample(window, base_outline.widths, base.geometry)])
    latents = (base_outline.widths.channels, *window.grid(base.geometry))
    holding = holding_of(recipe)

    @cache
    def evaluated(together: bool, remember: bool) -> Evaluation:
        options = [f"sampling.together={together}".lower(), f"sampling.remember={remember}".lower()]
        changed = build_sampler(change(recipe, options))
        return measure_evaluation(base_outline.network, holding, changed, batch)

    @cache
    def decoded(tile: int | None) -> int:
        networks = base_outline.encoders()
        return decoding_bytes(networks["vae"], latents, tile) if networks else 0

    weights = _weights(recipe, base_outline)

    def staged(changed: Recipe) -> dict[str, int]:
        own, tile = build_sampler(changed), changed.values["base"]["decode_tile"]
        return stages(own, weights, evaluated(own.together, own.remember), decoded(tile))

    if rate is None and (device.type == "cpu" or torch.cuda.is_available()):
        rate = matrix_rate(device, holding.dtype)
    others = {word: staged(change(recipe, [word])) for word in _words(recipe)}
    return SamplePlan(
        name=str(recipe["name"]),
        window=window,
        num_parameters=sum(p.numel() for p in base_outline.network().parameters()),
        settings={AS_WRITTEN: staged(recipe), **others},
        limit=memory or memory_here(device, 1),
        steps=len(sampler.sigmas) - 1,
        flops_per_step=evaluated(sampler.together, sampler.remember).flops,
        rate=rate,
        notes=(*base_outline.notes, *_problems(recipe)),
    )


def _words(recipe: Recipe) -> Iterator[str]:
    """Name settings that need less memory and are not in use."""
    known = [f"{option}={value}" for option, value in LEAST["sample"].items()]
    for word in (*known, TURNS):
        if change(recipe, [word]).values != recipe.values:
            yield word


def _weights(recipe: Recipe, base_outline: Outline) -> Weights:
    denoiser, adapter = base_outline.network(), recipe["adapter"]
    holding_of(recipe).apply(denoiser)
    weights = weigh(denoiser, encoder_bytes(base_outline.encoders()))
    if adapter is None or not Path(adapter).is_file():
        return weights
    tensors, _ = load_adapter(Path(adapter))
    factors = sum(t.numel() * t.element_size() for t in tensors.values())
    return replace(weights, denoiser=weights.denoiser + factors)


def _window(recipe: Recipe) -> Window:
    """Tell the frames of a chunk; where no size is given, of the largest bucket."""
    if recipe["size"] is not None:
        sizes = parse_buckets([recipe["size"]])
    else:
        sizes = parse_buckets(recipe["buckets"])
    height, width = max(sizes.values(), key=lambda size: size[0] * size[1])
    speakers = len(recipe["speakers"] or ()) or 1
    return Window(recipe.values["sampling"]["num_frames"], height, width, speakers)


def _problems(recipe: Recipe) -> list[str]:
    """Say what stands against the run itself."""
    try:
        build_sample(recipe)
    except InputError as error:
        return [f"missing: {line}" for line in str(error).splitlines()]
    return []


def _largest(found: Mapping[str, int]) -> str:
    stage = max(found, key=lambda name: found[name])
    return f"{gigabytes(found[stage])}, {stage}"
