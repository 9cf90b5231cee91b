"""`kit fit`: train an adapter as a recipe says, or go on with the run of that name."""

import json
import math
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from lightning import Callback
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from kit.adapters.files import AdapterInfo, load_info, write_adapter
from kit.adapters.lora import adapter_tensors
from kit.atomic import write_text
from kit.errors import InputError
from kit.models.base import Denoiser, Encoders
from kit.models.checkpoints import parameter_shapes
from kit.models.hollow import whole
from kit.recipe import Recipe
from kit.run.bases import adapter_files
from kit.run.fallbacks import Fallbacks
from kit.run.parts import FitParts, build_fit
from kit.run.processes import distribute_base, share_frames
from kit.run.recipes import FIT, read_as
from kit.run.rounding import first_inputs, report_rounding
from kit.run.scenes import build_measure, load_portrait, load_track, one_speaker
from kit.run.unfinished import digest_of
from kit.sampling.scene import Scene
from kit.training.checkpoints import (
    BATCHES_PER_STEP,
    newest_checkpoint,
    require_same_recipe,
    step_of,
)
from kit.training.curves import draw_curves, read_curves
from kit.training.ema import AdapterEMA
from kit.training.module import Fitting, LossNotFinite
from kit.training.previews import Previews
from kit.training.result import Result
from kit.training.task import DenoiserTask

RUNS = Path("runs")
ADAPTER_NAME = "adapter.safetensors"


def fit(recipe: str, overrides: Sequence[str], report: Callable[[str], None]) -> Path:
    """Train as a recipe says; a run of this name goes on at its newest checkpoint.

    Args:
        recipe: path of a fit recipe.
        overrides: `section.key=value` words.
        report: told what happens, in words.

    Returns:
        The run's folder: adapter, checkpoints, curves, previews, the resolved recipe.

    Raises:
        InputError: something in the recipe or its files is wrong, or the loss became NaN.
        KeyboardInterrupt: the run was asked to stop; everything is saved.
    """
    checked = read_as(recipe, overrides, FIT)
    parts = build_fit(checked)
    folder = RUNS / str(checked["name"])
    fallbacks = Fallbacks(checked, folder / "out_of_memory.txt", parts.training.world, report)

    def train(lowered: Recipe) -> None:
        _train(checked, parts if lowered is checked else build_fit(lowered), folder, report)

    fallbacks.run(train)
    return folder


def _train(checked: Recipe, parts: FitParts, folder: Path, report: Callable[[str], None]) -> None:
    """Train as far as the recipe says, from the newest checkpoint if there is one."""
    # What shards and adapters hold counts, not where they lie.
    files = {str(path): digest_of(path) for path in adapter_files(checked)}
    values = {**checked.values, "shards": parts.data.digest(), "files": files}
    values[BATCHES_PER_STEP] = parts.training.batches_per_step
    resume = newest_checkpoint(folder / "checkpoints", report)
    if resume is not None:
        require_same_recipe(resume, values)
        if is_finished(resume, parts.training.max_steps, folder / ADAPTER_NAME):
            report(f"{folder} is at step {step_of(resume)} already; there is nothing to do")
            return
        report(f"going on from {resume}")
    for note in (*parts.base.notes(), *parts.data.notes()):
        report(note)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(checked.text)
    _Run(checked, values, parts, folder, report).train(resume)


def is_finished(checkpoint: Path, max_steps: int, adapter: Path) -> bool:
    """Tell whether a run has done all its steps and left the adapter of the last one."""
    done = step_of(checkpoint)
    return done >= max_steps and adapter.exists() and load_info(adapter).steps == done


@dataclass(frozen=True)
class _Run:
    """One run of `kit fit`, its recipe checked and its parts built."""

    recipe: Recipe
    values: Mapping[str, object]
    parts: FitParts
    folder: Path
    report: Callable[[str], None]

    def train(self, resume: Path | None) -> None:
        """Load the base, train, and write the adapter."""
        parts, seed, started = self.parts, self.recipe["seed"], time.perf_counter()
        ema = AdapterEMA(parts.training.ema_decay)
        result = Result(lambda step: self._write(module, ema, step, started))
        encoders = _Once(lambda: parts.base.load_encoders(trainer.strategy.root_device))
        # Opened before the base is loaded: a wrong portrait should not cost minutes.
        previews = self._previews(encoders, ema)
        trainer = parts.training.trainer(self.folder, ema, [*previews, result])
        device, share = trainer.strategy.root_device, parts.training.split_frames
        place = trainer.global_rank // share, trainer.world_size // share
        parts.data.prepare_run(encoders, seed, parts.training.num_batches, place)
        is_hollow = parts.training.is_sharded and self.recipe.values["base"].get("quantise") is None
        load, is_offloaded = parts.base.load_denoiser, parts.training.is_offloaded
        waits_at = torch.device("cpu") if is_offloaded else device
        denoiser = parts.base.hollow_denoiser() if is_hollow else load(waits_at)
        # A whole denoiser on the host would compute there for hours.
        if resume is None and not is_hollow and not is_offloaded and trainer.is_global_zero:
            self._report_rounding(denoiser, device)
        module = self._module(denoiser, device)
        try:
            trainer.fit(module, parts.data, ckpt_path=resume, weights_only=True)
        except LossNotFinite as error:
            raise not_finite(error, self.folder) from error
        if not result.is_written:
            self._write(module, ema, trainer.global_step, started)
        if trainer.global_step < trainer.max_steps:
            raise KeyboardInterrupt(
                f"stopped at step {trainer.global_step}; the same command goes on from there"
            )
        self.report(f"{self.folder / ADAPTER_NAME}: step {trainer.global_step}")

    def _report_rounding(self, denoiser: Denoiser, device: torch.device) -> None:
        parts, seed = self.parts, self.recipe["seed"]
        inputs = partial(first_inputs, parts.data, parts.objective, seed, device)
        report_rounding(parts.base, denoiser, inputs, self.folder, self.report)

    def _module(self, denoiser: Denoiser, device: torch.device) -> Fitting:
        parts, seed = self.parts, self.recipe["seed"]
        shard = None
        if parts.training.is_sharded:
            shard = partial(self._shard, denoiser, parts.adapter.start_values(denoiser), device)
        parts.adapter.inject(denoiser, seed)
        denoiser.checkpoint_activations(parts.training.checkpoint_blocks)
        task = DenoiserTask(denoiser, parts.objective, parts.dropout, seed)
        module = Fitting(
            task,
            parts.optimizer,
            seed,
            dict(self.values),
            shard,
            has_activations_on_host=parts.training.has_activations_on_host,
        ).train()
        trained = sum(parameter.numel() for parameter in module.trained().values())
        every = sum(math.prod(shape) for shape in parameter_shapes(denoiser).values())
        self.report(f"{trained:,} of {every:,} parameters train")
        return module

    def _shard(
        self,
        denoiser: Denoiser,
        start: Mapping[str, Tensor],
        device: torch.device,
        mesh: DeviceMesh,
    ) -> None:
        training = self.parts.training
        base, is_offloaded = self.parts.base, training.is_offloaded
        distribute_base(base, denoiser, start, mesh, device, is_offloaded=is_offloaded)
        share_frames(denoiser, training.split_frames)

    def _previews(self, encoders: Callable[[], Encoders], ema: AdapterEMA) -> list[Callback]:
        settings, sizes = self.parts.preview, self.parts.base.geometry
        if settings is None:
            return []
        source, size = load_portrait(Path(settings.image), self.recipe["buckets"])
        track = load_track(Path(settings.audio), sizes.fps, settings.seconds)

        def scene() -> Scene:
            return one_speaker(settings.text, track, source, size, sizes)

        place, sampler = self.folder / "previews", self.parts.sampler
        measure = build_measure(self.recipe, size, source)
        return [Previews(settings, place, sampler, encoders, scene, ema, sizes.fps, measure)]

    def _write(self, module: Fitting, ema: AdapterEMA, step: int, started: float) -> None:
        adapter, recipe = self.parts.adapter, self.recipe
        info = AdapterInfo(
            name=recipe["name"],
            base=recipe.values["base"]["type"],
            kind=adapter.kind,
            parts=adapter.parts,
            train_fully=adapter.train_fully,
            steps=step,
            recipe=recipe.text,
        )
        if module.trainer.is_global_zero:
            self._write_course(started)
        with ema.applied(module):
            trained = {name: whole(value) for name, value in module.trained().items()}
            if module.trainer.is_global_zero:
                tensors = adapter_tensors(module.network, trained, info.kind)
                # Last, since it says that the run is finished.
                write_adapter(self.folder / ADAPTER_NAME, tensors, info)

    def _write_course(self, started: float) -> None:
        """Write `loss.png` and `fit.json`."""
        rows, recipe = read_curves(self.folder / "metrics.csv"), self.recipe
        draw_curves(rows, self.folder / "loss.png")
        facts = {
            **_course(rows),
            "seconds": round(time.perf_counter() - started, 1),
            "recipe_sha256": recipe.sha256,
            "versions": {name: version(name) for name in ("torch", "lightning", "peft")},
            "python": platform.python_version(),
        }
        write_text(self.folder / "fit.json", json.dumps(facts, indent=2) + "\n")


def not_finite(error: LossNotFinite, folder: Path) -> InputError:
    """Save the report of a run whose loss became NaN, and say where to go on."""
    path = folder / "nan_report.json"
    path.write_text(json.dumps(error.report, indent=2) + "\n")
    return InputError(
        f"{error}\nstopped before that step; {path} names the samples, "
        f"{folder / 'checkpoints'} holds the steps before"
    )


class _Once:
    """Calls a function the first time and remembers what it gave."""

    def __init__(self, load: Callable[[], Encoders]) -> None:
        self._load = load
        self._loaded: Encoders | None = None

    def __call__(self) -> Encoders:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded


def _course(rows: list[dict[str, str]]) -> dict[str, object]:
    seconds = [float(row["seconds"]) for row in rows]
    memory = {"peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    if torch.cuda.is_available():
        memory["peak_device_memory_mb"] = torch.cuda.max_memory_allocated() // 2**20
    return {
        "steps": len(rows),
        "seconds_in_steps": round(sum(seconds), 1),
        "seconds_per_step": sorted(seconds)[len(seconds) // 2] if seconds else None,
        **memory,
        "first_losses": _average_losses(rows[:10]),
        "last_losses": _average_losses(rows[-10:]),
    }


def _average_losses(rows: list[dict[str, str]]) -> dict[str, float]:
    names = [name for name in (rows[0] if rows else {}) if name.startswith("loss/")]
    return {name: sum(float(row[name]) for row in rows) / len(rows) for name in names}
