"""A recipe section of several entries: in order, each with its options, only the named imported."""

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from kit.errors import InputError
from kit.recipe import Schema, Stack, read


class Louder:
    """Makes everything louder.

    Args:
        by: factor.
    """

    def __init__(self, *, by: Annotated[float, Field(gt=0)] = 2.0) -> None:
        self.by = by


class Slower:
    """Makes everything slower; asks for how much."""

    def __init__(self, *, by: int) -> None:
        self.by = by


def load(name: str) -> type:
    return {"louder": Louder, "slower": Slower}[name]  # of the three, only two can be loaded


EFFECTS = Stack(lambda: ("louder", "slower", "gone"), load)
SCHEMA = Schema("play", {"name": (str, ...)}, {}, {"effects": EFFECTS})


def write(folder: Path, text: str) -> Path:
    path = folder / "play.yaml"
    path.write_text(f"name: tune\n{text}")
    return path


def test_entries_are_built_in_the_order_of_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, "effects:\n  slower: {by: 3}\n  louder: {}\n")
    recipe = read(path, [], SCHEMA)
    built = recipe.build_stack("effects")
    assert [*built] == ["slower", "louder"]
    assert (built["slower"].by, built["louder"].by) == (3, 2.0)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.text)
    assert [*read(again, [], SCHEMA).build_stack("effects")] == ["slower", "louder"]
    assert read(again, [], SCHEMA).sha256 == recipe.sha256


def test_overrides_reach_entries(tmp_path: Path) -> None:
    path = write(tmp_path, "effects: {louder: {}}\n")
    recipe = read(path, ["effects.louder.by=5", "effects.slower.by=1"], SCHEMA)
    assert recipe.values["effects"] == {"louder": {"by": 5.0}, "slower": {"by": 1}}
    assert read(path, ["effects.louder=null"], SCHEMA).build_stack("effects") == {}


def test_a_stack_may_be_left_out(tmp_path: Path) -> None:
    recipe = read(write(tmp_path, ""), [], SCHEMA)
    assert "effects" not in recipe
    assert recipe.build_stack("effects") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("effects: {lauder: {}}", "play.yaml:2: effects: unknown 'lauder'; did you mean 'louder'?"),
        ("effects: {louder: {bye: 2}}", "play.yaml:2: effects.louder.bye: unknown 'bye'"),
        ("effects: {louder: {by: 0}}", "effects.louder.by: 0 should be greater than 0"),
        ("effects: {slower: {}}", "play.yaml:2: effects.slower.by: missing"),
        ("effects: [louder]", 'effects: ["louder"]; should be names with options'),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        read(write(tmp_path, text + "\n"), [], SCHEMA)
    assert message in str(error.value)
