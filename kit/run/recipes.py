"""What the recipes of `kit fit` and `kit sample` hold."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from kit import plugins
from kit.adapters import ADAPTERS
from kit.errors import InputError
from kit.metrics import MEASURES
from kit.models import BASES
from kit.objectives import OBJECTIVES
from kit.pretraining import TASKS
from kit.recipe import ExistingFile, Recipe, Schema, Section, Stack, find_recipe, look_up, read
from kit.run.request import SpeakerEntry, Turns
from kit.sampling import SAMPLERS
from kit.training import DROPOUTS, OPTIMIZERS, PREVIEWS, TRAINERS

Seed = Annotated[int, Field(ge=0)]
Device = Literal["auto", "cpu", "cuda"]
Name = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]

DATA = {"shards": "kit.data.module:ShardData"}
PLUGINS = {"plugins": Stack(plugins.available, plugins.load)}

_COMMON = {
    "name": (Name, ...),
    "seed": (Seed, 42),
    "buckets": (int | str | Sequence[str], "480"),
    "when_out_of_memory": (Sequence[str], ()),
}

FIT = Schema(
    title="fit",
    fields=_COMMON,
    sections={
        "base": Section(BASES),
        "adapter": Section(ADAPTERS),
        "objective": Section(OBJECTIVES, default="flow_matching"),
        "dropout": Section(DROPOUTS, default="conditions"),
        "data": Section(DATA, default="shards"),
        "optimizer": Section(OPTIMIZERS, default="adamw"),
        "trainer": Section(TRAINERS, default="lightning"),
        "sampling": Section(SAMPLERS, default="talk"),
        "preview": Section(PREVIEWS, required=False, default="talk"),
        "measure": Section(MEASURES, required=False, default="talk"),
    },
    stacks=PLUGINS,
)

SAMPLE = Schema(
    title="sample",
    fields={
        **_COMMON,
        "text": (str | None, None),
        "audio": (ExistingFile | None, None),
        "speakers": (Annotated[Sequence[SpeakerEntry], Field(min_length=1)] | None, None),
        "turns": (Turns, "together"),
        "job": (ExistingFile | None, None),
        "image": (ExistingFile | None, None),
        "video": (ExistingFile | None, None),
        "size": (str | None, None),
        "adapter": (ExistingFile | None, None),
        "out": (str, "talk.mp4"),
        "device": (Device, "auto"),
    },
    sections={
        "base": Section(BASES),
        "sampling": Section(SAMPLERS, default="talk"),
        "measure": Section(MEASURES, required=False, default="talk"),
    },
    stacks=PLUGINS,
)

PRETRAIN = Schema(
    title="pretrain",
    fields={"name": (Name, ...), "seed": (Seed, 42), "into": (str, ...)},
    sections={
        "task": Section(lambda: {**TASKS, **plugins.trainings("task")}),
        "data": Section(lambda: {**DATA, **plugins.trainings("data")}, default="shards"),
        "optimizer": Section(OPTIMIZERS, default="adamw"),
        "trainer": Section(TRAINERS, default="lightning"),
    },
)

SCHEMAS = {schema.title: schema for schema in (FIT, SAMPLE, PRETRAIN)}


def read_as(path: str, overrides: Sequence[str], schema: Schema) -> Recipe:
    """Read a recipe of one command; that of another is refused in one line.

    Raises:
        InputError: lists all that is wrong.
    """
    kind = schema_of(path)
    if kind is not schema:
        raise InputError(f"{path} is a recipe for `kit {kind.title}`, not for `kit {schema.title}`")
    return read(path, overrides, schema)


def schema_of(path: str) -> Schema:
    """Tell whose recipe it is: a task is pretrained, data are for `kit fit`, the rest samples."""
    keys = _keys(find_recipe(path))
    return PRETRAIN if "task" in keys else FIT if "data" in keys else SAMPLE


def _keys(path: Path) -> set[str]:
    """Name the sections of a recipe and of the one it extends; `read` says what is wrong."""
    values = _top(path)
    parent = look_up(str(values.get("extends", "")), path.parent)
    return set(values) | set(_top(parent) if parent else {})


def _top(path: Path) -> dict[str, object]:
    try:
        values = YAML(typ="safe", pure=True).load(path)
    except (YAMLError, UnicodeDecodeError):
        return {}
    return values if isinstance(values, dict) else {}
