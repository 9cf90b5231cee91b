"""The plan of the house: who may import whom, and how large anything may grow."""

import ast
import graphlib
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RANKS = [
    {"errors", "shipped", "registry", "draws", "devices", "reference", "flow", "atomic"},
    {"batch", "masks"},
    {"solvers", "guidance", "speech", "recipe"},
    {"models", "data"},
    {"adapters", "metrics", "objectives", "sampling", "studio"},
    {"training", "plugins"},
    {"pretraining", "planning"},
    {"run"},
    {"cli"},
    {"__main__"},
]
"""The parts of `kit`, lowest first; a part imports lower ranks and modules of its own folder."""

RANK_OF = {part: rank for rank, parts in enumerate(RANKS) for part in parts}
MATHEMATICS = RANKS[0] | RANKS[1] | RANKS[2]

PLAIN_LIBRARIES = {"torch", "numpy", "pydantic", "pydantic_core", "ruamel"}
"""All that the mathematics, recipes and objectives may need beside the standard library."""

PLUGIN_ROOMS = {"models", "data", "sampling"}
TRAINING_ROOMS = PLUGIN_ROOMS | {"objectives", "training", "pretraining"}
"""What a plugin may import beside the mathematics, and what its `training.py` may."""

ROOMS_OF = {"lightning": {"training", "data", "run"}, "webdataset": {"training", "data", "run"}}
DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_MEDIAN_FUNCTION_LINES = 12

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in files("kit")}


def imports(file: Path) -> Iterator[str]:
    """Name every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not _is_of_own_plugin(node, file):
            assert node.level == 0 and node.module, f"{file}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def _is_of_own_plugin(node: ast.ImportFrom, file: Path) -> bool:
    """Whether a module of a package of plugins imports one beside it."""
    return node.level == 1 and file.parent.parent == ROOT / "plugins"


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def definitions(file: Path) -> Iterator[Definition]:
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, Definition):
            yield node


def public_definitions(body: list[ast.stmt]) -> Iterator[Definition]:
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body)


def num_lines(node: Definition) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_every_part_has_a_rank() -> None:
    found = {part_of(module) for module in MODULES} - {""}
    assert found <= RANK_OF.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_part_imports_lower_ranks_only(module: str) -> None:
    part = part_of(module)
    for imported in imports(MODULES[module]):
        other = part_of(imported)
        if imported.split(".")[0] == "kit" and other != part:
            assert other and RANK_OF[other] < RANK_OF[part], f"{module} imports {imported}"


def test_there_is_no_cycle() -> None:
    graph = {
        module: {imported for imported in imports(file) if imported in MODULES}
        for module, file in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_libraries_stay_in_their_rooms() -> None:
    for module, file in MODULES.items():
        part = part_of(module)
        for imported in imports(file):
            top = imported.split(".")[0]
            assert part in ROOMS_OF.get(top, {part}), f"{module} imports {imported}"
            if part in MATHEMATICS | {"objectives"}:
                known = sys.stdlib_module_names | PLAIN_LIBRARIES | {"kit"}
                assert top in known, f"{module} imports {imported}"


def test_the_library_never_imports_content() -> None:
    for module, file in MODULES.items():
        tops = {imported.split(".")[0] for imported in imports(file)}
        assert not tops & {"plugins", "data", "recipes", "tests", "lightning_app"}, module


def test_content_imports_its_rooms_and_the_mathematics() -> None:
    """So no plugin imports another: they are in none of these rooms, and no names of their own."""
    rooms = {file: {"data", "studio"} for file in files("data")}
    for file in files("plugins"):
        rooms[file] = TRAINING_ROOMS if file.name == "training.py" else PLUGIN_ROOMS
    for file, allowed in rooms.items():
        tops = {name.split(".")[0] for name in imports(file)}
        assert not tops & {"plugins", "recipes", "tests", "lightning_app"}, file
        parts = {part_of(name) for name in imports(file) if name.split(".")[0] == "kit"}
        assert parts <= MATHEMATICS | allowed, file


@pytest.mark.parametrize("folder", ["plugins", "recipes", "data", "tests"])
def test_folders_of_content_are_no_packages(folder: str) -> None:
    """With an `__init__.py` they would hide a user's own modules of these names."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_drawer_for_everything() -> None:
    stems = {part for module in MODULES for part in module.split(".")}
    assert not stems & DRAWERS


def test_sizes() -> None:
    lengths = []
    for file in [*files("kit"), *files("plugins"), *files("data")]:
        assert len(file.read_text().splitlines()) <= MAX_FILE_LINES, file
        for node in definitions(file):
            if not isinstance(node, ast.ClassDef):
                lengths.append(num_lines(node))
                assert lengths[-1] <= MAX_FUNCTION_LINES, f"{file}:{node.lineno} {node.name}"
    assert statistics.median(lengths) <= MAX_MEDIAN_FUNCTION_LINES


@pytest.mark.parametrize("module", sorted(MODULES))
def test_public_names_are_documented(module: str) -> None:
    tree = ast.parse(MODULES[module].read_bytes())
    assert ast.get_docstring(tree), module
    for node in public_definitions(tree.body):
        assert ast.get_docstring(node), f"{module}.{node.name}"
