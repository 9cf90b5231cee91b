"""`kit pretrain`: train a network around the denoiser, or one that a plugin brings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from kit.data.module import RunData
from kit.errors import InputError
from kit.pretraining.base import PartTask
from kit.recipe import Recipe
from kit.run.fit import RUNS, not_finite
from kit.run.parts import build_data
from kit.run.recipes import PRETRAIN, read_as
from kit.training.checkpoints import newest_checkpoint, require_same_recipe
from kit.training.curves import draw_curves, read_curves
from kit.training.ema import AdapterEMA
from kit.training.module import Fitting, LossNotFinite
from kit.training.optim import OptimizerSettings
from kit.training.trainer import Training

BATCHES_TO_MEASURE = 16


@dataclass(frozen=True)
class PretrainParts:
    """What a pretrain recipe names, section by section."""

    task: PartTask
    data: RunData
    optimizer: OptimizerSettings
    training: Training


def build_pretraining(recipe: Recipe) -> PretrainParts:
    """Build every section of a pretrain recipe; the data are not looked at yet."""
    return PretrainParts(
        task=recipe.build("task", recipe["seed"]),
        data=build_data(recipe),
        optimizer=recipe.build("optimizer"),
        training=recipe.build("trainer"),
    )


def pretrain(recipe: str, overrides: Sequence[str], report: Callable[[str], None]) -> Path:
    """Train as a recipe says and write the network into a base folder.

    A run of this name goes on at its newest checkpoint.

    Args:
        recipe: path of a pretrain recipe.
        overrides: `section.key=value` words.
        report: told what happens, in words.

    Returns:
        The base folder, of which the task's parts are written.

    Raises:
        InputError: something in the recipe or its files is wrong.
        KeyboardInterrupt: the run was asked to stop; its checkpoint is saved.
    """
    checked = read_as(recipe, overrides, PRETRAIN)
    parts = build_pretraining(checked)
    data, training = parts.data, parts.training
    problems = data.problems()
    if training.is_sharded:
        problems.append("trainer: a whole network is trained by one process, which holds all of it")
    if problems:
        raise InputError("\n".join(problems))
    folder, seed = RUNS / str(checked["name"]), checked["seed"]
    resume = newest_checkpoint(folder / "checkpoints", report)
    values = {**checked.values, "shards": data.digest()}
    if resume is not None:
        require_same_recipe(resume, values)
        report(f"going on from {resume}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(checked.text)

    task = parts.task
    on_host = training.has_activations_on_host
    module = Fitting(task, parts.optimizer, seed, values, has_activations_on_host=on_host).train()
    data.prepare_run(None, seed, training.num_batches, place=(0, 1))
    ema = AdapterEMA(training.ema_decay)
    trainer = training.trainer(folder, ema, [])
    try:
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    except LossNotFinite as error:
        raise not_finite(error, folder) from error
    draw_curves(read_curves(folder / "metrics.csv"), folder / "loss.png")
    if trainer.global_step < trainer.max_steps:
        raise KeyboardInterrupt(f"stopped at step {trainer.global_step}; the same command goes on")

    into = Path(checked["into"])
    module.cpu().eval()
    data.prepare_run(None, seed, BATCHES_TO_MEASURE, place=(0, 1))
    with ema.applied(module):
        task.finish(list(islice(data.train_dataloader(), BATCHES_TO_MEASURE)))
        task.save(into)
    report(f"{into}: step {trainer.global_step}")
    return into
