"""Plugins: found without being imported, loaded by name, refused with a reason."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kit import plugins
from kit.errors import InputError
from kit.sampling.plugin import Plugin

GOOD = '''"""Nods along.

More words.
"""

from kit.sampling.plugin import Plugin


class Nod(Plugin):
    _depth = 3


plugin = Nod
'''
LOUD = '"""Must not be imported to be listed."""\n\nraise RuntimeError("no key found")\n'


def write_plugin(folder: Path, name: str, text: str) -> Path:
    file = folder / f"{name}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def use_folders(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    monkeypatch.setattr(plugins, "__path__", [str(folder) for folder in folders])


def forget(*names: str) -> None:
    for name in names:
        sys.modules.pop(f"kit.plugins.{name}", None)


def test_shipped_plugins_load() -> None:
    for name, found in plugins.available().items():
        assert issubclass(plugins.load(name), Plugin)
        assert found.summary.endswith("."), found.origin


def test_plugins_are_listed_with_their_first_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nod = write_plugin(tmp_path / "one", "nod", GOOD)
    package = write_plugin(tmp_path / "two/blink", "__init__", LOUD)
    write_plugin(tmp_path / "two", "silent", "plugin = 1\n")
    write_plugin(tmp_path / "two", "broken", "plugin = \n")
    (tmp_path / "two/binary.py").write_bytes(b"\0")
    for name in ("_private", "test_nod", "conftest"):
        write_plugin(tmp_path / "two", name, GOOD)
    (tmp_path / "two/README.md").touch()
    (tmp_path / "two/no_package").mkdir()
    use_folders(monkeypatch, tmp_path / "one", tmp_path / "two")
    found = plugins.available()
    assert list(found) == ["binary", "blink", "broken", "nod", "silent"]
    assert found["nod"] == plugins.Found("nod", "kit.plugins.nod", nod, "Nods along.")
    assert found["blink"].origin == package
    assert found["silent"].summary == ""
    assert found["broken"].summary == "cannot be read: line 1: invalid syntax"
    assert found["binary"].summary.startswith("cannot be read: ")


def test_load_imports_under_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plugin(tmp_path, "nod", GOOD)
    use_folders(monkeypatch, tmp_path)
    try:
        assert plugins.load("nod").__module__ == "kit.plugins.nod"
        assert sys.modules["kit.plugins.nod"].__file__ == str(tmp_path / "nod.py")
    finally:
        forget("nod")


@pytest.mark.parametrize(
    ("name", "text", "finding"),
    [
        ("nodd", GOOD, "plugin 'nodd' is unknown; did you mean 'nod'? valid: nod"),
        ("nod", LOUD, "cannot be imported: RuntimeError: no key found"),
        ("nod", "import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("nod", "x = \n", "cannot be imported: SyntaxError"),
        ("nod", "Plugin = 1\n", "defines no `plugin`; did you mean 'Plugin'?"),
        ("nod", "", "defines no `plugin`"),
        ("nod", "plugin = 1\n", "`plugin` is not a class that inherits kit.sampling.plugin.Plugin"),
        ("nod", GOOD.replace("_depth", "stepp"), "'stepp' is no hook; did you mean 'step'?"),
        (
            "nod",
            GOOD.replace("_depth = 3", "def step(self, x): ..."),
            "'step' takes (self, x); should take (self, noisy, at)",
        ),
    ],
)
def test_load_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, finding: str
) -> None:
    write_plugin(tmp_path, "nod", text)
    use_folders(monkeypatch, tmp_path)
    try:
        with pytest.raises(InputError) as caught:
            plugins.load(name)
    finally:
        forget("nod")
    assert finding in str(caught.value)


def test_two_plugins_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_plugin(tmp_path / "one", "nod", GOOD)
    second = write_plugin(tmp_path / "two/nod", "__init__", GOOD)
    use_folders(monkeypatch, tmp_path / "one", tmp_path / "two")
    with pytest.raises(InputError) as caught:
        plugins.available()
    assert str(caught.value) == f"plugin 'nod' is there twice: {first}, {second}"


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_folders(monkeypatch, tmp_path / "gone")
    with pytest.raises(InputError, match="KIT_PLUGIN_PATH: '.*gone' is not a folder"):
        plugins.available()


def write_distribution(site: Path, entry: str) -> None:
    metadata = site / "nodder-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: nodder\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[kit.plugins]\n{entry}\n")


def test_a_distribution_adds_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distribution(tmp_path, "nodder = nodder_package.inner.nod")
    write_plugin(tmp_path / "nodder_package", "__init__", LOUD)
    write_plugin(tmp_path / "nodder_package/inner", "__init__", "")
    origin = write_plugin(tmp_path / "nodder_package/inner", "nod", GOOD)
    use_folders(monkeypatch)
    monkeypatch.syspath_prepend(tmp_path)
    found = plugins.available()["nodder"]
    assert found == plugins.Found("nodder", "nodder_package.inner.nod", origin, "Nods along.")
    # Listing did not run the package that raises; loading does.
    with pytest.raises(InputError, match="RuntimeError: no key found"):
        plugins.load("nodder")
    write_plugin(tmp_path / "nodder_package", "__init__", "")
    assert plugins.load("nodder").__module__ == "nodder_package.inner.nod"


def test_a_distribution_with_a_wrong_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distribution(tmp_path, "nodder = nodder_gone.nod")
    use_folders(monkeypatch)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="plugin 'nodder' names 'nodder_gone.nod', which does not"):
        plugins.available()


def test_the_environment_names_folders(tmp_path: Path) -> None:
    """A fresh process sees them, and a spawned worker unpickles what a plugin defines."""
    write_plugin(tmp_path / "one", "nod", GOOD)
    write_plugin(tmp_path / "two", "blink", GOOD)
    code = """
import multiprocessing
from kit import plugins

def depth(nod):
    return nod._depth

if __name__ == "__main__":
    assert {"nod", "blink"} <= set(plugins.available())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(depth, [plugins.load("nod")()]))
"""
    script = tmp_path / "main.py"
    script.write_text(code)
    folders = os.pathsep.join([str(tmp_path / "one"), str(tmp_path / "two")])
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, plugins.PATH_VARIABLE: folders},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "[3]\n"), done.stderr
