"""Names to code: a table entry is a string `module:Name`, imported when a recipe names it.

An entry is a class or function. Its keyword-only parameters are the keys of a recipe section;
its positional parameters are handed in by the code that composes a run.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

Factory = Callable[..., Any]


def load(reference: str) -> Any:
    """Import what `module:Name` names."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def options(factory: Factory) -> dict[str, inspect.Parameter]:
    """List the parameters that a recipe may set, with their annotations evaluated."""
    parameters = inspect.signature(factory, eval_str=True).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def build(factory: Factory, values: Mapping[str, Any], *composed: object) -> Any:
    """Call a factory with a section's checked values and what the composing code hands in."""
    return factory(*composed, **values)
