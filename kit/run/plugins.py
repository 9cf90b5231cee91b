"""The plugins of a recipe: built, and checked against what they are to work with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kit import shipped
from kit.errors import InputError
from kit.models.base import Base
from kit.recipe import Recipe
from kit.run.scenes import Size
from kit.sampling.hooks import Hooks
from kit.sampling.pipeline import TalkSampler
from kit.sampling.plugin import Setup


def build_sampler(recipe: Recipe) -> TalkSampler:
    """Build the sampler of a recipe with its plugins."""
    sampler: TalkSampler = recipe.build("sampling", Hooks(recipe.build_stack("plugins")))
    return sampler


def require_plugins(
    recipe: Recipe, base: Base, sampler: TalkSampler, size: Size, *, has_reference: bool
) -> None:
    """Check that plugins go together, and with the base and the video.

    Raises:
        InputError: lists all that stands against it.
    """
    hooks = sampler.hooks
    if not hooks.plugins:
        return
    setup = Setup(
        denoiser=base.empty_denoiser(),
        geometry=base.geometry,
        sampling=recipe.values["sampling"],
        size=size,
        has_reference=has_reference,
        plugins=tuple(hooks.plugins),
    )
    problems = hooks.problems(setup)
    if problems:
        raise InputError("\n".join(problems))


def plugin_files(recipe: Recipe) -> list[Path]:
    """List the files that options of plugins name."""
    texts = (shipped.resolve(text) for text in _texts(recipe.values.get("plugins", {})))
    return [Path(text) for text in texts if Path(text).is_file()]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
