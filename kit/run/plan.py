"""`kit plan`: what a run will need is said before anything is loaded."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kit.errors import InputError
from kit.recipe import Recipe, read
from kit.run.plan_fit import plan_fit
from kit.run.plan_parts import GB
from kit.run.plan_sample import plan_sample
from kit.run.recipes import schema_of


class Plan(Protocol):
    """What was found."""

    def lines(self) -> Iterator[str]:
        """Tell everything as a table."""

    def facts(self) -> dict[str, Any]:
        """Give everything as plain values."""


PLANS: Mapping[str, Callable[[Recipe, float | None, float | None], Plan]] = {
    "fit": plan_fit,
    "sample": plan_sample,
}
"""Commands whose runs can be planned."""


def plan(
    recipe: str,
    overrides: Sequence[str],
    report: Callable[[str], None],
    *,
    rate: float | None = None,
    memory: float | None = None,
    out: Path | None = None,
) -> None:
    """Tell parameters, memory, time and disk of a run.

    Args:
        recipe: path of a fit or sample recipe.
        overrides: `section.key=value` words.
        report: told the table, line by line.
        rate: 10**12 operations a second of each process, where this machine says nothing about it.
        memory: GB of each process's device, likewise.
        out: JSON file to write the same to.

    Raises:
        InputError: the recipe is wrong, or the sizes of its base are unknown.
    """
    schema = schema_of(recipe)
    if schema.title not in PLANS:
        raise InputError(
            f"{recipe} is a recipe for `kit {schema.title}`; valid: {', '.join(PLANS)}"
        )
    checked = read(recipe, overrides, schema)
    found = PLANS[schema.title](checked, rate and rate * 1e12, memory and memory * GB)
    for line in found.lines():
        report(line)
    if out is not None:
        out.write_text(json.dumps(found.facts(), indent=2) + "\n")
        report(f"{out}: written")
