"""The plan of a fine-tuning run: its parameters, data, memory, time and disk."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kit.batch import collate
from kit.devices import choose_device
from kit.errors import InputError
from kit.models.base import Base
from kit.planning.encoders import encoder_bytes, encoding_bytes
from kit.planning.training import (
    Counts,
    Pass,
    Setup,
    StepMemory,
    Update,
    count,
    measure_pass,
    measure_update,
    step_memory,
)
from kit.recipe import Recipe, change
from kit.run.fit import RUNS
from kit.run.parts import build_fit, quantisation_problems
from kit.run.plan_data import Data, read_data
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
from kit.training.curves import read_curves
from kit.training.trainer import Training

WARM_UP = 2
"""Steps of an earlier run that do not count: the first ones load and compile."""


@dataclass(frozen=True)
class Rate:
    """How fast the machine is, and how that is known.

    Attributes:
        seconds: of a step, where an earlier run of this name tells it.
        flops: operations a second otherwise; None if nobody can tell.
    """

    seconds: float | None
    flops: float | None
    source: str


@dataclass(frozen=True)
class FitPlan:
    """What a run of `kit fit` will need; bytes, seconds and counts."""

    name: str
    counts: Counts
    data: Data
    memory: StepMemory
    encoders: Mapping[str, int]
    limit: float | None
    flops_per_step: float
    seconds_per_step: float | None
    rate: str
    max_steps: int
    disk: Mapping[str, int]
    remedies: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Bytes of one process on its device."""
        return self.memory.total + sum(self.encoders.values())

    def facts(self) -> dict[str, Any]:
        """Give everything as plain values."""
        facts = asdict(self) | {"peak": self.peak}
        del facts["data"]["largest"]
        return facts

    def lines(self) -> Iterator[str]:
        """Tell everything as a table."""
        yield f"{self.name}: {self.counts.parameters:,} parameters, {self.counts.trained:,} train"
        yield f"data: {self.data.kind or 'no'} shards"
        yield from (f"  {line}" for line in self.data.lines())
        yield f"memory of each process, most in: {self.memory.moment}"
        room = "" if self.limit is None else f" of {gigabytes(self.limit)}"
        device = dict(self.memory.device) | {f"{n} (raw data)": b for n, b in self.encoders.items()}
        sizes = {name: gigabytes(size) for name, size in device.items()}
        yield from rows(sizes | {"total": gigabytes(self.peak) + room})
        if self.memory.host:
            yield "memory of each process outside of its GPU"
            yield from rows({name: gigabytes(size) for name, size in self.memory.host.items()})
        yield "time"
        yield from rows(self._times())
        yield "disk"
        yield from rows({name: gigabytes(size) for name, size in self.disk.items()})
        if self.limit is not None and self.peak > self.limit:
            yield f"it does not fit into {gigabytes(self.limit)}; with these changes it takes"
            yield from rows({w: self._judged(size) for w, size in self.remedies.items()})
        yield from self.notes

    def _times(self) -> dict[str, str]:
        work = {"work of a step": f"{self.flops_per_step / 1e12:,.3g} TFLOP in each process"}
        if self.seconds_per_step is None:
            return work | {"rate": self.rate}
        total = self.seconds_per_step * self.max_steps
        return work | {
            "rate": self.rate,
            "step": duration(self.seconds_per_step),
            f"{self.max_steps} steps": duration(total),
        }

    def _judged(self, size: int) -> str:
        assert self.limit is not None
        return gigabytes(size) + (", fits" if size <= self.limit else "")


def plan_fit(recipe: Recipe, rate: float | None, memory: float | None) -> FitPlan:
    """Plan a run, whatever of it is not here.

    Args:
        recipe: of the run.
        rate: operations a second of each process, if they are known.
        memory: bytes of each process's device, if it is another one.

    Raises:
        InputError: the base's sizes are unknown, or the adapter does not go with them.
    """
    base: Base = recipe.build("base")
    base_outline, notes = outline(recipe, base), _problems(recipe)
    data = read_data(recipe, base, base_outline)
    need = _need(recipe, base_outline, data)
    training, device = need.setup.training, choose_device(need.setup.training.device)
    limit = memory or memory_here(device, training.devices)
    encoders = _encoders(data, base_outline, need.memory)
    beside = sum(encoders.values())
    is_short = limit is not None and need.memory.total + beside > limit
    work = _work(data, need) * training.accumulate
    known = _rate(recipe, training, rate, device)
    return FitPlan(
        name=str(recipe["name"]),
        counts=need.counts,
        data=data,
        memory=need.memory,
        encoders=encoders,
        limit=limit,
        flops_per_step=work,
        seconds_per_step=known.seconds if known.flops is None else work / known.flops,
        rate=known.source,
        max_steps=training.max_steps,
        disk=_disk(data, need),
        remedies=_remedies(recipe, base_outline, data, need, limit, beside) if is_short else {},
        notes=(*base_outline.notes, *_assumptions(recipe), *notes),
    )


@dataclass(frozen=True)
class _Need:
    """What was found about a recipe's step."""

    setup: Setup
    counts: Counts
    passed: Pass
    update: Update

    @property
    def memory(self) -> StepMemory:
        return step_memory(self.setup, self.counts, self.passed, self.update)


def _need(recipe: Recipe, base_outline: Outline, data: Data) -> _Need:
    setup = build_setup(recipe, base_outline)
    batch = collate([data.largest] * recipe.values["data"]["batch_size"])
    return _Need(setup, count(setup), measure_pass(setup, batch), measure_update(setup))


def build_setup(recipe: Recipe, base_outline: Outline) -> Setup:
    """Build what of a recipe decides about memory.

    Raises:
        InputError: the adapter does not go with the base.
    """
    adapter, holding = recipe.build("adapter"), holding_of(recipe)
    setup = Setup(
        network=base_outline.network,
        holding=replace(holding, quantise=None) if adapter.kind == "dora" else holding,
        adapter=adapter,
        objective=recipe.build("objective"),
        optimizer=recipe.build("optimizer"),
        training=recipe.build("trainer"),
    )
    problems = setup.adapter.problems(setup.network())
    if problems:
        raise InputError("\n".join(problems))
    return setup


def _assumptions(recipe: Recipe) -> Iterator[str]:
    """Say where the plan is not exact."""
    if not recipe.build("trainer").uses_gpu:
        yield (
            "on a CPU glibc keeps much of what is freed, up to as much again as planned; with "
            "MALLOC_MMAP_THRESHOLD_=1048576 in the environment it does not, which takes time"
        )
    # PEFT looks for the norms of packed weights, which imagined ones have not.
    if recipe.values["adapter"].get("kind") == "dora" and recipe.values["base"]["quantise"]:
        yield "dora on few bits is planned on the base in full: it will take less"
    if "preview" in recipe:
        yield "previews are not counted: plan a recipe of `kit sample` for what one takes"


def _problems(recipe: Recipe) -> list[str]:
    """Say what stands against the run itself."""
    try:
        build_fit(recipe)
    except InputError as error:
        return [f"missing: {line}" for line in str(error).splitlines()]
    return []


def _encoders(data: Data, base_outline: Outline, memory: StepMemory) -> dict[str, int]:
    """Count the encoders that stay beside the network while they encode raw shards.

    Encoding itself counts as far as it needs more than the step's activations, which are gone then.
    """
    networks = base_outline.encoders() if data.kind == "raw" else {}
    if not networks:
        return {}
    found, window = encoder_bytes(networks), data.buckets[0].window
    working = encoding_bytes(networks["vae"], window.num_frames, window.height, window.width)
    return found | {"encoding": max(working - memory.device["activations"], 0)}


def _work(data: Data, need: _Need) -> float:
    """Average the operations of a batch over the clips, as many for each token in all buckets."""
    weights = [bucket.num_clips or 1 for bucket in data.buckets]
    tokens = sum(n * b.num_tokens for n, b in zip(weights, data.buckets, strict=True))
    share = tokens / sum(weights) / data.buckets[0].num_tokens
    return need.passed.flops * share / need.setup.training.split_frames


def _rate(recipe: Recipe, training: Training, stated: float | None, device: torch.device) -> Rate:
    if stated is not None:
        return Rate(None, stated, f"{stated / 1e12:.3g} TFLOP/s, as stated")
    path = RUNS / str(recipe["name"]) / "metrics.csv"
    seconds = sorted(float(row["seconds"]) for row in read_curves(path)[WARM_UP:])
    if seconds:
        return Rate(seconds[len(seconds) // 2], None, f"median step of {path}")
    if device.type == "cuda" and not torch.cuda.is_available():
        return Rate(None, None, "unknown: there is no such device here; state --rate")
    dtype = torch.bfloat16 if training.precision == "bf16-mixed" else torch.float32
    flops = matrix_rate(device, dtype)
    source = f"{flops / 1e12:.3g} TFLOP/s, of matrix products here, which a step does not reach"
    return Rate(None, flops, source)


def _disk(data: Data, need: _Need) -> dict[str, int]:
    trained, keep = need.counts.trained_bytes, need.setup.training.keep_checkpoints
    # What trains, its average and what the optimiser holds.
    checkpoint = 2 * trained + need.update.state
    found = {"shards": data.num_bytes} if data.kind else {}
    checkpoints = f"{keep} checkpoints, and one being written"
    return found | {checkpoints: checkpoint * (keep + 1), "adapter": trained}


MOVED = ("trainer.activations", "trainer.offload", "trainer.devices")
"""Options that change where things are, and not what a pass takes."""


def _remedies(
    recipe: Recipe,
    base_outline: Outline,
    data: Data,
    need: _Need,
    limit: float | None,
    beside: int,
) -> dict[str, int]:
    """Find what each change alone would need; then the first ones that are enough together.

    Args:
        recipe: that does not fit.
        base_outline: of its base.
        data: of the run.
        need: what was found about it.
        limit: bytes of the device.
        beside: bytes that the encoders take.
    """

    def size_with(*words: str) -> float:
        return _changed(recipe, words, base_outline, data, need) + beside

    before, enough = need.memory.total + beside, limit or math.inf
    tried = {word: size_with(word) for word in _words(recipe)}
    helping = {word: int(size) for word, size in tried.items() if size < before}
    if beside:
        helping["kit prepare --encode"] = need.memory.total
    together: dict[str, str] = {}
    for word in helping if min(helping.values(), default=0) > enough else ():
        if "=" in word and together.setdefault(word.partition("=")[0], word) == word:
            size = size_with(*together.values())
            if size <= enough:
                return helping | {" ".join(together.values()): int(size)}
    return helping


def _words(recipe: Recipe) -> Iterator[str]:
    """Name changes of a recipe that may need less memory, those first that cost least."""
    values, training = recipe.values, recipe.build("trainer")
    yield "trainer.checkpoint_blocks=1"
    yield "data.batch_size=1"
    yield "base.quantise=fp8"
    yield "base.quantise=nf4"
    if "state_bits" in values["optimizer"]:
        yield "optimizer.state_bits=8"
    # A processor's memory holds all of this anyway.
    if training.uses_gpu:
        yield "trainer.activations=host"
        yield "trainer.offload=weights"
        yield from (f"trainer.devices={number}" for number in (2, 4, 8))


def _changed(
    recipe: Recipe, words: Sequence[str], base_outline: Outline, data: Data, need: _Need
) -> float:
    """Find the memory of a changed recipe; infinite if the changes do not go with it."""
    try:
        changed = change(recipe, words)
        setup = build_setup(changed, base_outline)
    except InputError:
        return math.inf
    adapter, holding = setup.adapter, setup.holding
    is_cut = setup.training.is_offloaded and holding.is_packed
    if is_cut or quantisation_problems(holding.quantise, adapter.kind, adapter.train_fully):
        return math.inf
    if all(word.startswith(MOVED) for word in words):
        return replace(need, setup=setup).memory.total
    return _need(changed, base_outline, data).memory.total
