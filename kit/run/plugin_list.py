"""`kit plugins`: the plugins and their options, read from source files without running any."""

import ast
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from kit import plugins

CLASS = "plugin"
"""What a plugin's module calls its class."""

BOUNDS = {
    "ge": "at least",
    "gt": "above",
    "le": "at most",
    "lt": "below",
    "multiple_of": "a multiple of",
    "min_length": "of a length of at least",
}
MAX_HOPS = 8
WIDTH, INDENT = 100, 21


@dataclass(frozen=True)
class Option:
    """One option of a plugin.

    Attributes:
        name: what recipes call it.
        kind: its type and range, in words.
        default: as its source says it; None if it must be given.
        meaning: what the class's docstring says of it.
    """

    name: str
    kind: str
    default: str | None
    meaning: str


def list_plugins(report: Callable[[str], None]) -> None:
    """List all plugins, each with what it does, where it lies, and its options.

    Raises:
        InputError: two plugins have one name, or a folder or module does not exist.
    """
    found = plugins.available()
    for plugin in found.values():
        report(f"{plugin.name:<{INDENT - 1}} {plugin.summary}\n{'':<{INDENT}}{plugin.origin}")
        for line in _lines(plugin.origin):
            report(line)
    if not found:
        report("There are no plugins yet. They go in one of these folders:")
        for folder in plugins.folders():
            report(f"  {folder}")
        report(f"More folders can be named in {plugins.PATH_VARIABLE}.")


def read_options(origin: Path) -> list[Option] | None:
    """Read a plugin's options; None if its class is not found in its source files.

    Raises:
        SyntaxError, ValueError: a file is no Python.
    """
    found = _find_class(origin)
    if found is None:
        return None
    kind, module = found
    meanings = explained(ast.get_docstring(kind) or "")
    words = _Words(module)
    return [
        Option(
            name=parameter.arg,
            kind=words.of(parameter.annotation),
            default=None if default is None else ast.unparse(default),
            meaning=meanings.get(parameter.arg, ""),
        )
        for parameter, default in _keyword_only(kind)
    ]


def explained(docstring: str) -> dict[str, str]:
    """Read what the section `Args` of a docstring says of each parameter."""
    _, _, section = inspect.cleandoc(docstring).partition("\nArgs:\n")
    meanings: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        if entry := re.match(r" {4}(\w+)(?: \([^)]*\))?:\s*(.*)", line):
            name, meanings[entry[1]] = entry[1], entry[2]
        elif name:
            meanings[name] = f"{meanings[name]} {line.strip()}".strip()
    return meanings


def _lines(origin: Path) -> Iterator[str]:
    try:
        options = read_options(origin)
    except (SyntaxError, ValueError):
        return  # its summary tells
    if options is None:
        yield f"{'':<{INDENT}}defines no class `{CLASS}` that can be seen without running it"
    for option in options or ():
        given = "must be given" if option.default is None else f"= {option.default}"
        meaning = f"{option.meaning.rstrip('.')} ({option.kind})"
        head = f"    {option.name} {given}"
        yield fill(f"{head:<{INDENT + 12}} {meaning}", WIDTH, subsequent_indent=" " * (INDENT + 13))


def _find_class(file: Path) -> tuple[ast.ClassDef, ast.Module] | None:
    """Follow `plugin` through aliases and imports to the class that it names."""
    name = CLASS
    for _ in range(MAX_HOPS):
        module = ast.parse(file.read_bytes())
        bound = _bound(module, name)
        if isinstance(bound, ast.ClassDef):
            return bound, module
        if isinstance(bound, ast.Name):
            name = bound.id
        elif isinstance(bound, ast.ImportFrom) and (source := _source(file, bound)):
            names = {alias.asname or alias.name: alias.name for alias in bound.names}
            file, name = source, names[name]
        else:
            return None
    return None


def _bound(module: ast.Module, name: str) -> ast.AST | None:
    """Give what a module binds a name to at last."""
    found: ast.AST | None = None
    for node in module.body:
        match node:
            case ast.ClassDef() if node.name == name:
                found = node
            case ast.ImportFrom() if name in {each.asname or each.name for each in node.names}:
                found = node
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                found = value
            case ast.AnnAssign(target=ast.Name(id=target), value=value) if target == name:
                found = value
    return found


def _source(file: Path, imported: ast.ImportFrom) -> Path | None:
    if imported.level == 0:
        return plugins.find_source(imported.module or "")
    folder = file.parents[imported.level - 1].joinpath(*(imported.module or "").split("."))
    candidates = (folder.with_suffix(".py"), folder / "__init__.py")
    return next((each for each in candidates if each.is_file()), None)


def _keyword_only(kind: ast.ClassDef) -> Iterator[tuple[ast.arg, ast.expr | None]]:
    for node in kind.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            yield from zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)


class _Words(ast.NodeTransformer):
    """Turns annotations into words: ranges apart, choices side by side, a module's names resolved.

    Args:
        module: where the annotations stand.
    """

    def __init__(self, module: ast.Module) -> None:
        self._names: Mapping[str, ast.expr] = {
            node.targets[0].id: node.value
            for node in module.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        self._bounds: list[str] = []

    def of(self, annotation: ast.expr | None) -> str:
        """Say what an annotation allows; nothing if there is none."""
        if annotation is None:
            return ""
        self._bounds = []
        kind = ast.unparse(self.visit(annotation))
        return ", ".join([kind, *self._bounds])

    def visit_Name(self, node: ast.Name) -> ast.expr:  # noqa: N802
        """Put in what an alias stands for, if it is a range or a choice."""
        value = self._names.get(node.id)
        return self.visit_Subscript(value) if isinstance(value, ast.Subscript) else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:  # noqa: N802
        """Take ranges out of `Annotated`, and write choices as `a | b`."""
        name, inner = ast.unparse(node.value), node.slice
        if name == "Literal":
            choices = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return ast.Name(" | ".join(ast.unparse(choice) for choice in choices))
        if name != "Annotated" or not isinstance(inner, ast.Tuple):
            return ast.Subscript(node.value, self.visit(inner))
        for extra in inner.elts[1:]:
            keywords = extra.keywords if isinstance(extra, ast.Call) else []
            self._bounds += [
                f"{BOUNDS.get(each.arg or '', each.arg)} {ast.unparse(each.value)}"
                for each in keywords
            ]
        kind: ast.expr = self.visit(inner.elts[0])
        return kind
