"""`kit plugins`: lists options without running anything, writes a skeleton, tries any plugin."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit import plugins
from kit.cli import main
from kit.errors import InputError
from kit.run.plugin_check import CHECKS, examine
from kit.run.plugin_list import Option, explained, list_plugins, read_options
from kit.run.plugin_new import write_skeleton

WAVE = '''"""Wave a hand."""

raise RuntimeError("must not be run to be listed")

Share = Annotated[float, Field(ge=0, lt=1)]


class Wave(Plugin):
    """Waves.

    Args:
        hand: which one: the `left`
            or the `right`.
        often: how many times; at most
            as many as there are: frames.
        share: of the frames.
        more: of the same.

    Source: nobody.
    """

    def __init__(
        self,
        *,
        hand: Literal["left", "right"] = "left",
        often: Annotated[int, Field(gt=0)],
        share: Share | None = None,
        more: "Sequence[Share]" = (),
        untold=3,
    ) -> None: ...


plugin: type[Plugin] = Wave
'''

OPTIONS = [
    Option("hand", "'left' | 'right'", "'left'", "which one: the `left` or the `right`."),
    Option("often", "int, above 0", None, "how many times; at most as many as there are: frames."),
    Option("share", "float | None, at least 0, below 1", "None", "of the frames."),
    Option("more", "'Sequence[Share]'", "()", "of the same."),
    Option("untold", "", "3", ""),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of plugins, of this process and of those that it starts."""
    monkeypatch.setenv(plugins.PATH_VARIABLE, str(tmp_path))
    monkeypatch.setattr(plugins, "__path__", [str(folder) for folder in plugins.folders()])
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(f"kit.plugins.{file.stem}", None)


def test_options_are_read_without_running(tmp_path: Path) -> None:
    (tmp_path / "wave.py").write_text(WAVE)
    assert read_options(tmp_path / "wave.py") == OPTIONS


@pytest.mark.parametrize(
    "line",
    [
        "from .hand import Wave as Greeting\nplugin = Greeting",
        "from .hand import Wave as plugin",
        "from .hand import plugin",
        "from .fingers import plugin",
    ],
)
def test_options_are_read_from_where_the_class_is_imported(tmp_path: Path, line: str) -> None:
    (tmp_path / "__init__.py").write_text(f'"""Wave."""\n\n{line}\n')
    (tmp_path / "hand.py").write_text(WAVE)
    (tmp_path / "fingers").mkdir()
    (tmp_path / "fingers/__init__.py").write_text("from .thumb import Wave\nplugin = Wave\n")
    (tmp_path / "fingers/thumb.py").write_text(WAVE)
    assert read_options(tmp_path / "__init__.py") == OPTIONS


def test_a_class_that_is_nowhere_or_everywhere_is_not_found(tmp_path: Path) -> None:
    file = tmp_path / "wave.py"
    for text in ("", "plugin = make()", "plugin = Gone", "from .gone import plugin"):
        file.write_text(text)
        assert read_options(file) is None
    file.write_text("plugin = other\nother = plugin\n")
    assert read_options(file) is None


def test_entries_of_a_docstring() -> None:
    text = "Waves.\n\nArgs:\n    a (int): one: two.\n        three\n    b: four\nEnd."
    assert explained(text) == {"a": "one: two. three", "b": "four"}
    assert explained("Waves.") == {}


def test_the_list(folder: Path) -> None:
    (folder / "wave.py").write_text(WAVE)
    (folder / "broken.py").write_text("plugin = \n")
    (folder / "empty.py").write_text('"""Nothing."""\n')
    lines: list[str] = []
    list_plugins(lines.append)
    text = "\n".join(lines)
    assert f"wave                 Wave a hand.\n{'':<21}{folder / 'wave.py'}\n" in text
    assert "    hand = 'left'                 which one: the `left` or the `right` (" in text
    assert "    often must be given " in text
    assert "broken               cannot be read: line 1: invalid syntax\n" in text
    assert f"{folder / 'empty.py'}\n{'':<21}defines no class `plugin`" in text


def test_every_option_of_a_shipped_plugin_is_listed_with_its_meaning() -> None:
    for name, found in plugins.available().items():
        options = read_options(found.origin)
        assert options is not None, name
        assert [option for option in options if not (option.kind and option.meaning)] == [], name


def test_a_skeleton_passes_the_checks_and_its_test(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    write_skeleton("calm_noise", folder, lines.append)
    assert f"KIT_PLUGIN_PATH={folder} kit plugins check calm_noise" in lines
    assert set(plugins.available()) >= {"calm_noise"}
    assert "test_calm_noise" not in plugins.available()
    words = ["sampling.steps=2", "calm_noise.share=0.2"]
    assert main(["plugins", "check", "calm_noise", *words]) == 0
    shown = capsys.readouterr().out
    assert shown.count("passed  ") == 3 + len(CHECKS)
    assert "FAILED" not in shown
    # The third of its tests runs the checks again.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "not good", "test_calm_noise.py"],
        cwd=folder,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 passed, 1 deselected" in done.stdout, done.stdout


@pytest.mark.parametrize("name", ["Calm", "calm-noise", "_calm", "test_calm", "lambda", "", "1a"])
def test_names_that_no_plugin_can_have(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be a plugin's name; valid: small letters"):
        write_skeleton(name, folder, print)
    assert list(folder.iterdir()) == []


def test_a_skeleton_replaces_nothing(folder: Path) -> None:
    (folder / "test_calm.py").touch()
    with pytest.raises(InputError, match="test_calm.py: there already; nothing was written"):
        write_skeleton("calm", folder, print)
    assert not (folder / "calm.py").exists()
    with pytest.raises(InputError, match="plugin 'sdedit' is there already: "):
        write_skeleton("sdedit", folder / "other", print)


HEAD = '''"""Do something."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kit.sampling.plugin import At, Plugin, Run, Setup

'''

LACKING = {
    "explained": (
        "    def __init__(self, share, *, by=2.0) -> None: ...\n",
        {
            "'share' cannot be set by a recipe: options stand behind `*,`",
            "'share' is not explained in the section Args of the class's docstring",
            "'by' has no type",
            "'by' is not explained in the section Args of the class's docstring",
        },
    ),
    "takes the tiny base": (
        "    def problems(self, setup: Setup) -> list[str]:\n        return 'too small'\n",
        {"plugin 'bad': `problems` gave str; should give a list of texts"},
    ),
    "one chunk": (
        "    def noise(self, noise: Tensor, at: At) -> Tensor:\n        return noise / 0\n",
        {"frames have numbers that are not finite"},
    ),
    "two chunks": (
        "    def pixels(self, pixels: Tensor, at: At) -> Tensor:\n        return pixels.double()\n",
        {"frames are torch.float64; should be torch.float32"},
    ),
    "changes the video": (
        "    def pixels(self, pixels: Tensor, at: At) -> Tensor:\n        return pixels * 1\n",
        {"the video is, bit for bit, what it is without it: give options with which it does "},
    ),
    "hooks called": (
        "    def is_active(self, at: At) -> bool:\n        return at.sigma > 1\n\n"
        "    def step(self, noisy: Tensor, at: At) -> Tensor:\n        return noisy / 2\n",
        {"`step` was never called; was `is_active` ever True?"},
    ),
    "one by one": (
        "    def predict(self, ask, noisy, sigma, conditions, at):\n"
        "        first, second, third = ask(noisy, sigma, conditions)\n"
        "        return torch.stack([first, second, third])\n",
        {"ValueError: not enough values to unpack"},
    ),
    "previews": (
        "    def open(self, run: Run) -> None:\n        run.denoiser.blocks()\n",
        {"AttributeError: 'function' object has no attribute 'blocks'"},
    ),
    "same seed": (
        "    def noise(self, noise: Tensor, at: At) -> Tensor:\n"
        "        return torch.randn_like(noise)\n",
        {"it draws from a global generator; take kit.draws", "frames differ by up to "},
    ),
    "other videos": (
        "    _count = 0\n\n"
        "    def noise(self, noise: Tensor, at: At) -> Tensor:\n"
        "        self._count += 1\n        return noise / self._count\n",
        {"frames differ by up to "},
    ),
    "stopped video": (
        "    def open(self, run: Run) -> None:\n        self._first = None\n\n"
        "    def noise(self, noise: Tensor, at: At) -> Tensor:\n"
        "        self._first = noise if self._first is None else self._first\n"
        "        return self._first\n",
        {"frames differ by up to "},
    ),
    "as it was": (
        "    def open(self, run: Run) -> None:\n"
        "        for weight in getattr(run.denoiser, 'parameters', list)():\n"
        "            weight.data.mul_(1.01)\n",
        {"a video without it is another one after it was used"},
    ),
}


@pytest.mark.parametrize("check", LACKING)
def test_a_plugin_that_breaks_a_promise_fails_the_check_of_it(folder: Path, check: str) -> None:
    hook, expected = LACKING[check]
    text = f'{HEAD}\nclass Bad(Plugin):\n    """Breaks a promise."""\n\n{hook}\n\nplugin = Bad\n'
    (folder / "bad.py").write_text(text)
    tried = {name: problems for name, problems in CHECKS.items() if check in name}
    outcome = [*examine("bad", ["sampling.steps=2"], tried)][-1]
    assert check in outcome.check
    for line in expected:
        assert any(problem.startswith(line) for problem in outcome.problems), outcome.problems


def write_bad(folder: Path, docstring: str, hook: str) -> None:
    text = f'{HEAD}\nclass Bad(Plugin):\n    """{docstring}"""\n\n{hook}\n\nplugin = Bad\n'
    (folder / "bad.py").write_text(text)


def test_a_plugin_that_only_looks_on_says_so_and_does_so(folder: Path) -> None:
    check = "changes the video"
    told = "its docstring says 'Changes nothing', but the video is another one"
    for result, problems in (("pixels", ()), ("-pixels", (told,))):
        hook = f"    def pixels(self, pixels: Tensor, at: At) -> Tensor:\n        return {result}\n"
        write_bad(folder, "Looks on.\n\n    Changes nothing: it is a test.\n    ", hook)
        *_, outcome = examine("bad", ["sampling.steps=1"], {check: CHECKS[check]})
        assert outcome.problems == problems
        sys.modules.pop("kit.plugins.bad")


def test_a_hook_that_forgets_to_return_is_named_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bad(folder, "Forgets.", "    def noise(self, noise: Tensor, at: At) -> Tensor: ...\n")
    assert main(["plugins", "check", "bad", "sampling.steps=1"]) == 2
    shown = capsys.readouterr().out
    told = "plugin 'bad': `noise` gave None; should give a tensor [1, 16, 3, 4, 6]\n"
    assert shown.count(told) == 1
    assert shown.count("as above\n") == shown.count("FAILED") - 1 > 1


def test_a_layer_is_not_compared_with_a_text(folder: Path) -> None:
    hook = (
        "    def attention(self, attend, layer, query, seen, at):\n"
        "        return attend(query, seen) * (2 if layer == 'audio' else 1)\n"
    )
    write_bad(folder, "Compares.", hook)
    check = "makes a video of one chunk"
    *_, outcome = examine("bad", ["sampling.steps=1"], {check: CHECKS[check]})
    told = "TypeError: a layer is no text; compare its kind: layer.kind == 'audio' ("
    assert outcome.problems[0].startswith(told)


def test_a_class_that_other_processes_do_not_find(folder: Path) -> None:
    text = f'{HEAD}\ndef make():\n    class Bad(Plugin):\n        """Hides."""\n    return Bad\n'
    (folder / "bad.py").write_text(f"{text}\n\nplugin = make()\n")
    check = "is found by new processes"
    *_, outcome = examine("bad", ["sampling.steps=1"], {check: CHECKS[check]})
    assert outcome.problems[0].startswith("another process cannot import its class: ")


def test_errors_name_the_line_of_the_plugin(folder: Path) -> None:
    hook = (
        "    def noise(self, noise: Tensor, at: At) -> Tensor:\n        return noise + self.gone\n"
    )
    (folder / "bad.py").write_text(f"{HEAD}class Bad(Plugin):\n{hook}\n\nplugin = Bad\n")
    check = "makes a video of one chunk"
    *_, outcome = examine("bad", ["sampling.steps=1"], {check: CHECKS[check]})
    line = HEAD.count("\n") + 3
    where = f"({folder / 'bad.py'}:{line})"
    assert outcome.problems == (f"AttributeError: 'Bad' object has no attribute 'gone' {where}",)


def test_an_option_without_the_plugins_name_is_told_where_it_belongs(folder: Path) -> None:
    *_, outcome = examine("nag", ["scale=3"])
    assert outcome.problems == ("'scale=3': an option of the plugin; write nag.scale=3",)


def test_options_come_from_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", "skip_layers"]) == 2
    shown = capsys.readouterr()
    assert "FAILED  can be built, and takes the tiny base\n" in shown.out
    assert "plugins.skip_layers.layers: missing" in shown.out
    assert shown.err == "kit: plugin 'skip_layers': 1 check failed\n"
    assert main(["plugins", "check", "skip_layers", "skip_layers.layers=[7]"]) == 2
    assert "layers: 7 is no block of this base; valid: 0 to 1\n" in capsys.readouterr().out
