"""Table entries: loading them, and reading their options from their signatures."""

import inspect
from dataclasses import KW_ONLY, dataclass

import pytest

from kit import registry


@dataclass(frozen=True)
class Brush:
    """An entry whose second annotation is text, as with postponed evaluation."""

    paint: object
    _: KW_ONLY
    width: int
    round: "bool" = True


def stroke(paint: object, times: int, *, length: float = 2.0) -> tuple[object, int, float]:
    return paint, times, length


def test_load_imports_the_name() -> None:
    assert registry.load("json.decoder:JSONDecoder").__name__ == "JSONDecoder"


@pytest.mark.parametrize("reference", ["json:missing", "no_such_module:Name"])
def test_load_fails_for_a_broken_table(reference: str) -> None:
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        registry.load(reference)


def test_options_are_the_keyword_only_parameters() -> None:
    assert list(registry.options(stroke)) == ["length"]
    found = registry.options(Brush)
    assert list(found) == ["width", "round"]
    assert found["width"].default is inspect.Parameter.empty
    assert found["round"].annotation is bool


def test_build_hands_in_composed_objects_first() -> None:
    assert registry.build(stroke, {"length": 3.0}, "red", 2) == ("red", 2, 3.0)
    assert registry.build(Brush, {"width": 4}, "red") == Brush("red", width=4)
