"""What the recipes of `kit fit` and `kit sample` hold."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from kit.adapters import ADAPTERS
from kit.models import BASES
from kit.objectives import OBJECTIVES
from kit.pretraining import TASKS
from kit.recipe import ExistingFile, Schema, Section
from kit.sampling import SAMPLERS
from kit.training import DROPOUTS, OPTIMIZERS, PREVIEWS, TRAINERS

Seed = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]

_COMMON = {
    "name": (Name, ...),
    "seed": (Seed, 42),
    "buckets": (int | str | Sequence[str], "480"),
}

FIT = Schema(
    title="fit",
    fields=_COMMON,
    sections={
        "base": Section(BASES),
        "adapter": Section(ADAPTERS),
        "objective": Section(OBJECTIVES, default="flow_matching"),
        "dropout": Section(DROPOUTS, default="conditions"),
        "data": Section({"shards": "kit.data.module:ShardData"}, default="shards"),
        "optimizer": Section(OPTIMIZERS, default="adamw"),
        "trainer": Section(TRAINERS, default="lightning"),
        "sampling": Section(SAMPLERS, default="talk"),
        "preview": Section(PREVIEWS, required=False, default="talk"),
    },
)

SAMPLE = Schema(
    title="sample",
    fields={
        **_COMMON,
        "text": (str, ...),
        "audio": (ExistingFile, ...),
        "image": (ExistingFile | None, None),
        "video": (ExistingFile | None, None),
        "adapter": (ExistingFile | None, None),
        "out": (str, "talk.mp4"),
    },
    sections={
        "base": Section(BASES),
        "sampling": Section(SAMPLERS, default="talk"),
    },
)

PRETRAIN = Schema(
    title="pretrain",
    fields={"name": (Name, ...), "seed": (Seed, 42), "into": (str, ...)},
    sections={
        "task": Section(TASKS),
        "data": Section({"shards": "kit.data.module:ShardData"}, default="shards"),
        "optimizer": Section(OPTIMIZERS, default="adamw"),
        "trainer": Section(TRAINERS, default="lightning"),
    },
)

SCHEMAS = {schema.title: schema for schema in (FIT, SAMPLE, PRETRAIN)}
