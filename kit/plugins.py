"""Find plugins and load the ones that a recipe names; their import names are `kit.plugins.*`.

A plugin is a module or package in one of the plugin folders: the shipped one, then those in the
environment variable `KIT_PLUGIN_PATH`. An installed distribution adds one by an entry point in
the group `kit.plugins` that names its module.
"""

import ast
import difflib
import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from kit.errors import InputError, did_you_mean
from kit.shipped import shipped

if TYPE_CHECKING:
    from kit.sampling.plugin import Plugin

GROUP = "kit.plugins"
PATH_VARIABLE = "KIT_PLUGIN_PATH"
NOT_PLUGINS = ("_", "test_", "conftest")
"""How names of modules begin that lie beside plugins and are none."""


def folders() -> list[Path]:
    """List the plugin folders, the shipped one first."""
    named = os.environ.get(PATH_VARIABLE, "").split(os.pathsep)
    return [shipped("plugins"), *(Path(name).absolute() for name in named if name)]


# A module with a path is a package to the import system, wherever its folders lie.
__path__ = [str(folder) for folder in folders()]


@dataclass(frozen=True)
class Found:
    """A plugin that can be loaded.

    Attributes:
        name: what recipes call it.
        module: where to import it from.
        origin: its file.
        summary: first line of its docstring.
    """

    name: str
    module: str
    origin: Path
    summary: str


def available() -> dict[str, Found]:
    """List all plugins by name, without importing any.

    Raises:
        InputError: two plugins have one name, or a folder or module does not exist.
    """
    plugins: dict[str, Found] = {}
    for found in (*_in_folders(), *_in_distributions()):
        other = plugins.setdefault(found.name, found)
        if other != found:
            raise InputError(
                f"plugin '{found.name}' is there twice: {other.origin}, {found.origin}"
            )
    return dict(sorted(plugins.items()))


def load(name: str) -> "type[Plugin]":
    """Import a plugin and return the class that its module calls `plugin`.

    Raises:
        InputError: there is no such plugin, it cannot be imported, or it has hooks that do not
            exist.
    """
    plugins = available()
    if name not in plugins:
        raise InputError(f"plugin '{name}' is unknown{did_you_mean(name, plugins)}")
    found = plugins[name]
    try:
        module = importlib.import_module(found.module)
    except Exception as error:
        raise InputError(
            f"plugin '{name}' ({found.origin}) cannot be imported: {type(error).__name__}: {error}"
        ) from error
    # Listing plugins needs no torch, and so does not need this.
    from kit.sampling.plugin import mistakes

    if not hasattr(module, "plugin"):
        near = difflib.get_close_matches("plugin", vars(module), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise InputError(f"plugin '{name}' ({found.origin}) defines no `plugin`{hint}")
    wrong = mistakes(module.plugin)
    if wrong:
        raise InputError(f"plugin '{name}' ({found.origin}): " + "\n".join(wrong))
    kind: type[Plugin] = module.plugin
    return kind


def trainings(what: str) -> dict[str, str]:
    """Name what plugins bring to `kit pretrain`, by plugin, without importing any.

    A package with a module `training` has a task and its data: what that module calls `task` and
    `data`.

    Args:
        what: which of the two.

    Returns:
        Plugin to `module:Name`.
    """
    return {
        name: f"{found.module}.training:{what}"
        for name, found in available().items()
        if found.origin.stem == "__init__" and found.origin.with_name("training.py").is_file()
    }


def _in_folders() -> Iterator[Found]:
    for folder in map(Path, __path__):
        if not folder.is_dir():
            raise InputError(f"{PATH_VARIABLE}: '{folder}' is not a folder")
        for module in pkgutil.iter_modules([str(folder)]):
            if not module.name.startswith(NOT_PLUGINS):
                file = folder / module.name / "__init__.py"
                origin = file if module.ispkg else folder / f"{module.name}.py"
                yield Found(module.name, f"{__name__}.{module.name}", origin, _summary(origin))


def _in_distributions() -> Iterator[Found]:
    for entry in entry_points(group=GROUP):
        origin = find_source(entry.module)
        if origin is None:
            raise InputError(f"plugin '{entry.name}' names '{entry.module}', which does not exist")
        yield Found(entry.name, entry.module, origin, _summary(origin))


def find_source(module: str) -> Path | None:
    """Find a module's file without importing the packages around it."""
    top, *inner = module.split(".")
    spec = importlib.util.find_spec(top)
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def _summary(file: Path) -> str:
    try:
        docstring = ast.get_docstring(ast.parse(file.read_bytes()))
    except SyntaxError as error:
        return f"cannot be read: line {error.lineno}: {error.msg}"
    except ValueError as error:
        return f"cannot be read: {error}"
    return docstring.splitlines()[0] if docstring else ""
