"""Every shipped recipe is right in all that can be known without weights."""

from pathlib import Path

import pytest

from kit.errors import InputError
from kit.recipe import read
from kit.run.check import check
from kit.run.recipes import SAMPLE, schema_of

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SPEECH = str(ROOT / "data" / "sample" / "speech.flac")
PORTRAIT = str(ROOT / "data" / "sample" / "portrait.png")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_is_read_and_says_the_same_again(path: Path, tmp_path: Path) -> None:
    schema = schema_of(str(path))
    files = [f"audio={SPEECH}", f"image={PORTRAIT}", "adapter=null", "base.loras=[]"]
    words = files if schema is SAMPLE else []
    recipe = read(path, words, schema)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.text)
    assert read(again, [], recipe.schema).sha256 == recipe.sha256


def test_a_right_recipe_passes_check(encoded_shards: Path) -> None:
    sizes = ["data.window_frames=9", "data.windows_per_clip=2", "data.context_frames=5"]
    said: list[str] = []
    words = [f"data.path={encoded_shards}", *sizes]
    check([str(ROOT / "tests/recipes/tiny.yaml")], words, said.append)
    assert "ok" in said[0] and "37,760 train" in "".join(said)


def test_check_lists_what_the_large_recipe_lacks() -> None:
    with pytest.raises(InputError) as error:
        check([str(ROOT / "recipes/my_character.yaml")], ["base.path=./models/wan"], print)
    lines = str(error.value).splitlines()
    assert len(lines) >= 3
    assert [line.split(":")[0] for line in lines] == [
        "base.path",
        "base.audio_weights",
        "data.path",
    ]


def test_recipes_of_both_commands_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="audio, speakers: give one of them"):
        check([str(ROOT / "recipes/talk.yaml")], [], print)
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {ROOT / 'recipes/quickstart.yaml'}\nname: child\n")
    with pytest.raises(InputError, match="data.path"):
        check([str(child)], ["data.path=nowhere"], print)
