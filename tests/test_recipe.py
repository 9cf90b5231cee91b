"""Recipes: what is read, what is refused, and in which words."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
from pydantic import Field

from kit import shipped
from kit.errors import InputError
from kit.recipe import ExistingFile, ExistingFolder, Recipe, Schema, Section, json_schema, read

ENTRIES = '''
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from kit.recipe import ExistingFile


@dataclass(frozen=True)
class Schedule:
    warmup_steps: int = 0
    kind: Literal["constant", "cosine"] = "constant"


@dataclass(frozen=True)
class Lora:
    """Low rank."""
    model: object
    _: KW_ONLY
    rank: Annotated[int, Field(ge=1)]
    alpha: float = 1e-4
    targets: tuple[str, ...] = ("attention",)
    schedule: Schedule = Schedule()
    dropout: float | None = None
    start: int | Literal["auto"] = "auto"


class Full:
    def __init__(
        self, model: object, *, rank: int = 3, parts: str | list[str] | None = None
    ) -> None:
        self.model, self.rank, self.parts = model, rank, parts


def trainer(*, steps: int = 10, precision: Literal["bf16", "fp32"] = "bf16", save: bool = True):
    return steps, precision, save


def media(*, video: ExistingFile, folder: Path = Path("out")):
    return video, folder
'''

MODULE = "recipe_test_entries"

SCHEMA = Schema(
    title="fit",
    fields={
        "name": (str, ...),
        "seed": (Annotated[int, Field(ge=0)], 0),
        "text": (str, ""),
        "shards": (ExistingFolder | None, None),
        "portrait": (ExistingFile | None, None),
    },
    sections={
        "adapter": Section({"lora": f"{MODULE}:Lora", "full": f"{MODULE}:Full"}),
        "trainer": Section({"trainer": f"{MODULE}:trainer"}, default="trainer"),
        "media": Section({"media": f"{MODULE}:media"}, required=False, default="media"),
    },
)

GOOD = "name: talk\nadapter: {type: lora, rank: 8}\n"


@pytest.fixture(scope="module", autouse=True)
def entries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("entries")
    (folder / f"{MODULE}.py").write_text(ENTRIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(text: str, *overrides: str, name: str = "talk.yaml") -> Recipe:
    Path(name).write_text(text)
    return read(name, overrides, SCHEMA)


def refusal(text: str, *overrides: str, name: str = "talk.yaml") -> list[str]:
    with pytest.raises(InputError) as caught:
        recipe(text, *overrides, name=name)
    return str(caught.value).splitlines()


def test_defaults_are_filled_in() -> None:
    read_recipe = recipe(GOOD)
    assert read_recipe.values == {
        "name": "talk",
        "seed": 0,
        "text": "",
        "shards": None,
        "portrait": None,
        "adapter": {
            "type": "lora",
            "rank": 8,
            "alpha": 1e-4,
            "targets": ["attention"],
            "schedule": {"warmup_steps": 0, "kind": "constant"},
            "dropout": None,
            "start": "auto",
        },
        "trainer": {"type": "trainer", "steps": 10, "precision": "bf16", "save": True},
    }
    assert read_recipe["name"] == "talk"
    assert "media" not in read_recipe


def test_build_calls_the_entry_with_typed_values() -> None:
    text = GOOD.replace("rank: 8", "rank: 8, targets: [a, b], schedule: {kind: cosine}")
    built = recipe(text).build("adapter", "the model")
    module: ModuleType = sys.modules[MODULE]
    assert built == module.Lora(
        "the model", rank=8, targets=("a", "b"), schedule=module.Schedule(kind="cosine")
    )
    assert recipe(text).factory("adapter") is module.Lora
    assert recipe(text).build("trainer") == (10, "bf16", True)


def test_the_stored_text_reads_back_to_the_same_recipe() -> None:
    text = GOOD + "text: 'no'\nseed: 7\ntrainer: {steps: 5}\n"
    for value in ("'12:30'", "2024-01-01", "' padded'", "1e-4x", "'null'", "ключ: é", '"a\\nb"'):
        first = recipe(text.replace("'no'", f"'{value}'" if value == "ключ: é" else value))
        second = recipe(first.text, name="stored.yaml")
        assert second.values == first.values
        assert second.sha256 == first.sha256


def test_the_hash_follows_values_not_spelling() -> None:
    spelled = "# why\nadapter:\n  rank: 0x8\n  type: lora\nname: 'talk'\ntrainer:\n"
    assert recipe(spelled).sha256 == recipe(GOOD).sha256
    assert recipe(GOOD, "seed=1").sha256 != recipe(GOOD).sha256


# What a user gets wrong, one at a time.


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (
            GOOD.replace("rank", "rnak"),
            "talk.yaml:2: adapter.rnak: unknown 'rnak'; did you mean 'rank'? "
            "valid: alpha, dropout, rank, schedule, start, targets, type",
        ),
        (
            GOOD + "trainr: {steps: 1}\n",
            "talk.yaml:3: trainr: unknown 'trainr'; did you mean 'trainer'? valid: adapter, "
            "extends, media, name, portrait, seed, shards, text, trainer",
        ),
        (
            GOOD.replace("lora", "lroa"),
            "talk.yaml:2: adapter.type: unknown 'lroa'; did you mean 'lora'? valid: full, lora",
        ),
        (
            GOOD.replace("type: lora, ", ""),
            "talk.yaml:2: adapter.type: missing; valid: full, lora",
        ),
        (GOOD.replace("rank: 8", ""), "talk.yaml:2: adapter.rank: missing"),
        (GOOD.replace("name: talk", ""), "talk.yaml: name: missing"),
        ("name: talk\n", "talk.yaml: adapter: missing; its types: full, lora"),
        ("", "talk.yaml: name: missing"),
        (
            GOOD.replace("8", "eight"),
            'talk.yaml:2: adapter.rank: "eight" should be a valid integer',
        ),
        (GOOD.replace("8", "'8'"), 'talk.yaml:2: adapter.rank: "8" should be a valid integer'),
        (GOOD.replace("8", "8.0"), "talk.yaml:2: adapter.rank: 8.0 should be a valid integer"),
        (GOOD.replace("8", "true"), "talk.yaml:2: adapter.rank: true should be a valid integer"),
        (
            GOOD.replace("8", "0"),
            "talk.yaml:2: adapter.rank: 0 should be greater than or equal to 1",
        ),
        (
            GOOD.replace("8", "8, alpha: .nan"),
            "talk.yaml:2: adapter.alpha: NaN should be a finite number",
        ),
        (
            GOOD.replace("8", "8, targets: attention"),
            'talk.yaml:2: adapter.targets: "attention" should be a valid list',
        ),
        (
            GOOD + "trainer:\n  save: no\n",
            'talk.yaml:4: trainer.save: "no" should be a valid boolean',
        ),
        (
            GOOD + "trainer:\n  precision: bf61\n",
            "talk.yaml:4: trainer.precision: unknown 'bf61'; did you mean 'bf16'? "
            "valid: bf16, fp32",
        ),
        (
            GOOD.replace("8", "8, schedule: {kind: cosin, warmup_step: 3}"),
            "talk.yaml:2: adapter.schedule.kind: unknown 'cosin'; did you mean 'cosine'? "
            "valid: constant, cosine",
        ),
        (
            GOOD.replace("8", "8, schedule: {warmup_step: 3}"),
            "talk.yaml:2: adapter.schedule.warmup_step: unknown 'warmup_step'; "
            "did you mean 'warmup_steps'? valid: kind, warmup_steps",
        ),
        (
            GOOD.replace("8", "8, start: atuo"),
            'talk.yaml:2: adapter.start: "atuo" should be a valid integer or '
            "unknown 'atuo'; did you mean 'auto'? valid: auto",
        ),
        (
            "name: talk\nadapter: {type: full, parts: 3}\n",
            "talk.yaml:2: adapter.parts: 3 should be a valid string or be a valid list",
        ),
        (GOOD + "trainer: 3\n", "talk.yaml:3: trainer: 3; should be keys with values"),
        (GOOD + "seed: 1\nseed: 2\n", "talk.yaml:4: seed: is written twice"),
        (
            GOOD.replace("rank: 8", "rank: 8, rank: 9"),
            "talk.yaml:2: adapter.rank: is written twice",
        ),
        (GOOD + "text: &x a\n", "talk.yaml:3: text: anchors have no place in a recipe"),
        (
            GOOD + "text: !!python/name:os.system x\n",
            "talk.yaml:3: text: tag tag:yaml.org,2002:python/name:os.system has no place in "
            "a recipe",
        ),
        (GOOD + "seed: !!int x\n", "talk.yaml:3: seed: 'x' is not tag:yaml.org,2002:int"),
        ("- a\n", "talk.yaml: must hold keys with values, such as `name: talk`"),
        (
            GOOD + "portrait: portait.png\n",
            "talk.yaml:3: portrait: 'portait.png' does not exist; did you mean 'portrait.png'?",
        ),
        (GOOD + "portrait: shards\n", "talk.yaml:3: portrait: 'shards' is a folder"),
        (GOOD + "shards: portrait.png\n", "talk.yaml:3: shards: 'portrait.png' is a file"),
        (
            GOOD + "portrait: shrads/a/b.png\n",
            "talk.yaml:3: portrait: 'shrads/a/b.png' does not exist: there is no 'shrads'; did you "
            "mean 'shards'?",
        ),
        (
            GOOD + "portrait: shipped:date/x.png\n",
            "talk.yaml:3: portrait: 'shipped:date/x.png' must begin with one of "
            "shipped:plugins, shipped:recipes, shipped:data",
        ),
    ],
)
def test_one_mistake(text: str, finding: str) -> None:
    Path("portrait.png").touch()
    Path("shards").mkdir()
    assert finding in refusal(text)


def test_broken_yaml_names_its_line() -> None:
    (line,) = refusal("name: talk\nadapter: {type: lora\n")
    assert line.startswith("talk.yaml:3: is not YAML: ")


def test_text_in_another_encoding() -> None:
    Path("latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(InputError, match="latin.yaml: is not text in UTF-8"):
        read("latin.yaml", [], SCHEMA)


def test_a_mistake_of_each_kind_is_reported_at_once() -> None:
    text = """
name: 3
seed: -1
seed: 5
adapter:
  type: lora
  rnak: 8
  alpha: '1'
trainer: {precision: half}
portrait: gone.png
colour: red
"""
    found = refusal(text, "trainer.steps=many", "nonsense")
    starts = [
        "talk.yaml:2: name: ",
        "talk.yaml:3: seed: -1 ",
        "talk.yaml:4: seed: is written twice",
        "talk.yaml:7: adapter.rnak: ",
        "talk.yaml:5: adapter.rank: missing",
        "talk.yaml:8: adapter.alpha: ",
        "talk.yaml:9: trainer.precision: ",
        "talk.yaml:10: portrait: ",
        "talk.yaml:11: colour: ",
        "command line: trainer.steps: ",
        "command line: 'nonsense': write it as key=value",
    ]
    assert len(found) == len(starts)
    for start in starts:
        assert any(line.startswith(start) for line in found), (start, found)


# YAML 1.2 scalars.


@pytest.mark.parametrize("text", ["no", "off", "12:30", "2024-01-01", "1e-4x", "Yes", "0o9"])
def test_words_that_other_yaml_turns_into_something_else(text: str) -> None:
    assert recipe(GOOD + f"text: {text}\n")["text"] == text


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E5", 1e5), ("3", 3.0), ("-.5", -0.5)]
)
def test_numbers(text: str, value: float) -> None:
    checked = recipe(GOOD, f"adapter.alpha={text}")["adapter"]
    assert checked.alpha == value
    assert isinstance(checked.alpha, float)


# Overrides.


def test_overrides_follow_the_rules_of_the_file() -> None:
    changed = recipe(
        GOOD,
        "adapter.alpha=1e-3",
        "adapter.targets=[a, b]",
        "adapter.schedule.kind=cosine",
        "text=a=b",
        "trainer={steps: 3}",
    )
    assert changed.values["adapter"]["alpha"] == 1e-3
    assert changed.values["adapter"]["targets"] == ["a", "b"]
    assert changed.values["adapter"]["schedule"]["kind"] == "cosine"
    assert changed.values["adapter"]["rank"] == 8
    assert changed.values["text"] == "a=b"
    assert changed.values["trainer"]["steps"] == 3


@pytest.mark.parametrize(
    "overrides", [["adapter.type=full", "adapter.rank=2"], ["adapter.rank=2", "adapter.type=full"]]
)
def test_overriding_the_type_drops_the_old_keys(overrides: list[str]) -> None:
    changed = recipe(GOOD.replace("8", "8, alpha: 2.0"), *overrides)
    assert changed.values["adapter"] == {"type": "full", "rank": 2, "parts": None}


@pytest.mark.parametrize(
    ("overrides", "finding"),
    [
        (
            ["adapter.rnak=3"],
            "command line: adapter.rnak: unknown 'rnak'; did you mean 'rank'? "
            "valid: alpha, dropout, rank, schedule, start, targets, type",
        ),
        (["adapter.rank=x"], 'command line: adapter.rank: "x" should be a valid integer'),
        (["seed=1", "seed=2"], "command line: seed: is written twice"),
        (["seed=1", "seed.x=2"], "command line: seed.x: is written twice"),
        (["seed"], "command line: 'seed': write it as key=value"),
        (["=1"], "command line: '=1': write it as key=value"),
        (["adapter..rank=1"], "command line: 'adapter..rank=1': write it as key=value"),
        (["adapter.targets=[a"], 'command line: adapter.targets: "[a" '),
        (["adapter.type=lroa"], "command line: adapter.type: unknown 'lroa'; "),
        (["adapter=null"], "talk.yaml: adapter: missing; its types: full, lora"),
        (["extends=x.yaml"], "command line: extends: "),
    ],
)
def test_wrong_overrides(overrides: list[str], finding: str) -> None:
    assert any(line.startswith(finding) for line in refusal(GOOD, *overrides))


# One recipe above another.


def child(text: str, *overrides: str) -> Recipe:
    Path("base").mkdir(exist_ok=True)
    Path("base/parent.yaml").write_text(
        "name: parent\nseed: 4\nadapter: {type: lora, rank: 8, alpha: 2.0}\ntrainer: {steps: 5}\n"
    )
    return recipe("extends: base/parent.yaml\n" + text, *overrides)


def test_extends_merges_key_by_key() -> None:
    values = child(
        "name: child\nadapter: {rank: 4}\ntrainer: {type: trainer, save: false}\n"
    ).values
    assert (values["name"], values["seed"]) == ("child", 4)
    assert (values["adapter"]["rank"], values["adapter"]["alpha"]) == (4, 2.0)
    # The parent left its only type unsaid, so naming it is no change of type.
    assert (values["trainer"]["steps"], values["trainer"]["save"]) == (5, False)
    assert "extends" not in values


def test_a_change_of_type_drops_the_parents_keys() -> None:
    values = child("adapter: {type: full}\n").values
    assert values["adapter"] == {"type": "full", "rank": 3, "parts": None}


def test_null_takes_a_section_away() -> None:
    Path("clip.mp4").touch()
    with_media = "name: a\nadapter: {type: full}\nmedia: {video: clip.mp4}\n"
    assert "media" in recipe(with_media)
    assert "media" not in recipe(with_media, "media=null")


def test_extends_is_relative_to_the_recipe_and_its_places_name_the_parent() -> None:
    Path("deep").mkdir()
    Path("deep/parent.yaml").write_text("name: 3\nadapter: {type: full}\n")
    Path("deep/child.yaml").write_text("extends: parent.yaml\nseed: x\n")
    with pytest.raises(InputError) as caught:
        read("deep/child.yaml", [], SCHEMA)
    assert sorted(str(caught.value).splitlines()) == [
        'deep/child.yaml:2: seed: "x" should be a valid integer',
        "deep/parent.yaml:1: name: 3 should be a valid string",
    ]


def test_extends_finds_shipped_recipes() -> None:
    Path("child.yaml").write_text("extends: studio/talk.yaml\n")
    with pytest.raises(InputError, match=r"recipes/studio/talk\.yaml:\d+: "):
        read("child.yaml", [], SCHEMA)


@pytest.mark.parametrize(
    ("value", "finding"),
    [
        (
            "parnet.yaml",
            "talk.yaml:1: extends: 'parnet.yaml' does not exist; did you mean 'parent.yaml'?",
        ),
        ("[a]", "talk.yaml:1: extends: ['a'] is not the name of a recipe"),
        (
            "parent.yaml",
            "talk.yaml:1: extends: parent.yaml extends a recipe itself (parent.yaml:1); one level",
        ),
    ],
)
def test_wrong_parents(value: str, finding: str) -> None:
    Path("parent.yaml").write_text("extends: grandparent.yaml\n" + GOOD)
    assert refusal(f"extends: {value}\n" + GOOD) == [finding]


# Shipped files.


def test_shipped_names_resolve_for_use_and_stay_for_storage() -> None:
    name = "shipped:data/README.md"
    used = recipe(GOOD + f"portrait: {name}\nmedia: {{video: {name}}}\n")
    path = str(shipped.shipped("data") / "README.md")
    assert used["portrait"] == path
    assert used.build("media") == (path, Path("out"))
    assert used.values["portrait"] == used.values["media"]["video"] == name


def test_a_shipped_recipe_is_found_from_anywhere() -> None:
    with pytest.raises(InputError) as caught:
        read("recipes/no_such_recipe.yaml", [], SCHEMA)
    assert "recipes/no_such_recipe.yaml: no such recipe" in str(caught.value)
    for file in shipped.shipped("recipes").glob("*.yaml"):
        assert f"recipes/{file.name}" in str(caught.value)


# The schema for editors.


def test_json_schema_describes_every_type() -> None:
    described = json_schema(SCHEMA)
    json.dumps(described)
    assert described["additionalProperties"] is False
    assert set(described["properties"]) == {*SCHEMA.fields, *SCHEMA.sections, "extends"}
    assert "name" in described["required"]
    definitions = described["$defs"]
    assert definitions["lora"]["properties"]["rank"]["minimum"] == 1
    assert set(definitions["lora"]["required"]) == {"type", "rank"}
    assert definitions["full"]["properties"]["type"]["const"] == "full"
    assert definitions["trainer"].get("required") is None
