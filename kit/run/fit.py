"""`kit fit`: train an adapter as a recipe says, or go on with the run of that name."""

import json
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from lightning import Callback, Trainer

from kit.adapters.files import AdapterInfo, write_adapter
from kit.errors import InputError
from kit.models.base import Encoders
from kit.recipe import Recipe, read
from kit.run.devices import choose_device
from kit.run.parts import FitParts, build_fit
from kit.run.recipes import FIT
from kit.run.scenes import load_portrait, load_track, one_speaker
from kit.sampling.pipeline import Scene
from kit.training.checkpoints import newest_checkpoint, require_same_recipe
from kit.training.curves import read_curves
from kit.training.ema import AdapterEMA
from kit.training.module import Fitting, LossNotFinite
from kit.training.previews import Previews
from kit.training.task import DenoiserTask

RUNS = Path("runs")


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
    checked = read(recipe, overrides, FIT)
    parts = build_fit(checked)
    folder = RUNS / str(checked["name"])
    resume = newest_checkpoint(folder / "checkpoints")
    if resume is not None:
        require_same_recipe(resume, checked.values)
        report(f"going on from {resume}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(checked.text)
    for note in (*parts.base.notes(), *parts.data.notes()):
        report(note)
    _train(checked, parts, folder, resume, report)
    return folder


def _train(
    recipe: Recipe,
    parts: FitParts,
    folder: Path,
    resume: Path | None,
    report: Callable[[str], None],
) -> None:
    seed, started = recipe["seed"], time.perf_counter()
    device = choose_device(parts.training.device)
    denoiser = parts.base.load_denoiser(device)
    parts.adapter.inject(denoiser, seed)
    denoiser.checkpoint_activations(parts.training.checkpoint_blocks)
    task = DenoiserTask(denoiser, parts.objective, parts.dropout, seed)
    module = Fitting(task, parts.optimizer, seed, dict(recipe.values))
    trained = sum(parameter.numel() for parameter in module.trained().values())
    module.train()
    report(f"{trained:,} of {sum(p.numel() for p in denoiser.parameters()):,} parameters train")

    encoders = _Once(lambda: parts.base.load_encoders(device))
    parts.data.prepare_run(encoders, seed, parts.training.num_batches, place=(0, 1))
    ema = AdapterEMA(parts.training.ema_decay)
    more = _previews(recipe, parts, folder, encoders, ema)
    trainer = parts.training.trainer(folder, ema, more)
    try:
        trainer.fit(module, parts.data, ckpt_path=resume, weights_only=True)
    except LossNotFinite as error:
        _save(folder / "nan_report.json", error.report)
        raise InputError(
            f"{error}\nthe adapter and checkpoints of the steps before are in {folder}; "
            f"{folder / 'nan_report.json'} names the samples"
        ) from error
    _finish(recipe, parts, folder, module, trainer, ema, time.perf_counter() - started)
    if trainer.global_step < trainer.max_steps:
        raise KeyboardInterrupt(
            f"stopped at step {trainer.global_step}; the same command goes on from there"
        )
    report(f"{folder / 'adapter.safetensors'}: step {trainer.global_step}")


def _finish(
    recipe: Recipe,
    parts: FitParts,
    folder: Path,
    module: Fitting,
    trainer: Trainer,
    ema: AdapterEMA,
    seconds: float,
) -> None:
    info = AdapterInfo(
        name=recipe["name"],
        base=recipe.values["base"]["type"],
        rank=parts.adapter.rank,
        alpha=parts.adapter.alpha,
        parts=parts.adapter.parts,
        train_fully=parts.adapter.train_fully,
        steps=trainer.global_step,
        recipe=recipe.text,
    )
    with ema.applied(module):
        write_adapter(folder / "adapter.safetensors", module.trained(), info)
    losses = read_curves(folder / "metrics.csv")
    _save(
        folder / "fit.json",
        {
            "steps": trainer.global_step,
            "seconds": round(seconds, 1),
            "seconds_per_step": _median([float(row["seconds"]) for row in losses]),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "first_losses": _average_losses(losses[:10]),
            "last_losses": _average_losses(losses[-10:]),
            "recipe_sha256": recipe.sha256,
            "versions": {name: version(name) for name in ("torch", "lightning", "peft")},
            "python": platform.python_version(),
        },
    )


def _previews(
    recipe: Recipe,
    parts: FitParts,
    folder: Path,
    encoders: Callable[[], Encoders],
    ema: AdapterEMA,
) -> list[Callback]:
    settings, sizes = parts.preview, parts.base.geometry
    if settings is None:
        return []
    source, size = load_portrait(Path(settings.image), recipe["buckets"])
    track = load_track(Path(settings.audio), sizes.fps, settings.seconds)

    def scene() -> Scene:
        return one_speaker(settings.text, track, source, size, sizes)

    place = folder / "previews"
    return [Previews(settings, place, parts.sampler, encoders, scene, ema, sizes.fps)]


class _Once:
    """Calls a function the first time and remembers what it gave."""

    def __init__(self, load: Callable[[], Encoders]) -> None:
        self._load = load
        self._loaded: Encoders | None = None

    def __call__(self) -> Encoders:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _average_losses(rows: list[dict[str, str]]) -> dict[str, float]:
    names = [name for name in (rows[0] if rows else {}) if name.startswith("loss/")]
    return {name: sum(float(row[name]) for row in rows) / len(rows) for name in names}


def _save(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
