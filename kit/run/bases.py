"""A base by its section alone, for commands that need no whole recipe."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ruamel.yaml import YAML

from kit import shipped
from kit.errors import InputError
from kit.models import BASES
from kit.models.base import Base
from kit.models.lora_files import adapter_file
from kit.recipe import Recipe, Schema, Section, read

BASE_ONLY = Schema(title="base", fields={}, sections={"base": Section(BASES)})


def adapter_files(recipe: Recipe) -> list[Path]:
    """List the adapters that a recipe merges into its base, and the one that it goes on from."""
    values = recipe.values
    adapter = values["adapter"] if isinstance(values.get("adapter"), dict) else {}
    named = [change["file"] for change in values.get("base", {}).get("loras", [])] + [
        adapter.get("start")
    ]
    # Of a whole network, `start` is a number.
    return [adapter_file(shipped.resolve(name)) for name in named if isinstance(name, str)]


def build_base(
    values: Mapping[str, object],
    overrides: Sequence[str],
    hint: str = "",
    *,
    needs_weights: bool = True,
) -> Base:
    """Build a base for its denoiser.

    Args:
        values: keys of the section.
        overrides: `base.key=value` words that win over them.
        hint: what else can be done, added to an error.
        needs_weights: refuse a base whose weights are not here, or do not fit.

    Raises:
        InputError: lists all that is wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "base.yaml"
        YAML(typ="safe", pure=True).dump({"base": dict(values)}, recipe)
        base: Base = read(recipe, overrides, BASE_ONLY).build("base")
    problems = base.problems(encoders=False) if needs_weights else []
    if problems:
        raise InputError("\n".join([*problems, *([hint] if hint else [])]))
    return base
