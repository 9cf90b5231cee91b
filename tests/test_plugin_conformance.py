"""Every shipped plugin keeps to what `kit plugins check` asks of anybody's."""

import json
import re
import sys
from operator import attrgetter
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from kit import plugins
from kit.plugins import PATH_VARIABLE
from kit.run.plugin_check import CHECKS, examine
from kit.run.plugin_list import read_options
from kit.sampling.plugin import HOOKS, ONE
from kit.shipped import shipped
from tests.plugin_options import give_options

PAGE = (shipped("plugins") / "README.md").read_text()
SLOW = "is found by new processes"
"""Takes seconds to start a process; what it looks up is looked up here instead."""

APART = {check: problems for check, problems in CHECKS.items() if check != SLOW}


@pytest.mark.parametrize("name", plugins.available())
def test_a_shipped_plugin_passes_the_checks(name: str, tmp_path: Path) -> None:
    options = give_options(name, tmp_path)
    words = [f"{name}.{option}={json.dumps(value)}" for option, value in options.items()]
    outcomes = list(examine(name, ["sampling.steps=3", *words], APART))
    assert [outcome for outcome in outcomes if outcome.problems] == []
    assert len(outcomes) == 3 + len(APART)
    kind = plugins.load(name)
    assert attrgetter(kind.__qualname__)(sys.modules[kind.__module__]) is kind


EXAMPLES = dict(
    zip(
        ("rescale", "speech_focus"),
        re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL),
        strict=True,
    )
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_plugin_of_the_page_passes_the_checks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}.py").write_text(EXAMPLES[name])
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path))
    monkeypatch.setattr(plugins, "__path__", [str(folder) for folder in plugins.folders()])
    outcomes = list(examine(name, ["sampling.steps=3"], APART))
    del sys.modules[f"kit.plugins.{name}"]
    assert [outcome for outcome in outcomes if outcome.problems] == []
    assert len(outcomes) == 3 + len(APART)


def test_the_page_lists_every_hook_in_order_and_how_several_combine() -> None:
    rows = re.findall(r"^\| `(\w+)\(.*\| (\w+) \|$", PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == list(HOOKS)
    assert tuple(name for name, several in rows if several == "one") == ONE


def test_the_page_shows_every_shipped_plugin_with_options_that_it_has() -> None:
    rows = re.findall(r"^\| \[(\w+)\]\((\S+)\) \| .* \| `(.*)` \|$", PAGE, re.MULTILINE)
    folder = shipped("plugins")
    found = {
        name: each for name, each in plugins.available().items() if folder in each.origin.parents
    }
    assert {name: folder / place for name, place, _ in rows} == {
        name: each.origin for name, each in found.items()
    }
    for name, _, snippet in rows:
        ((named, options),) = YAML(typ="safe").load(snippet).items()
        known = {option.name for option in read_options(found[name].origin) or ()}
        assert named == name
        assert options.keys() <= known, name
