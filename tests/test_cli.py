"""The command line: exit codes, messages, and help that needs no torch."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kit import cli
from kit.errors import InputError, disk_full

COMMANDS = ["prepare", "fit", "sample", "export", "check", "plugins"]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  kit {command}" in capsys.readouterr().out


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n    {command} " in shown for command in COMMANDS)


@pytest.mark.parametrize("words", [[], ["fitt"], ["fit"], ["prepare", "clips"]])
def test_wrong_usage_exits_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "usage: kit" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--help", "--version", "plugins", "fit --help"])
def test_quick_commands_do_not_import_torch(words: str, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from kit import cli\n"
        "try:\n"
        "    assert cli.main(sys.argv[1:]) == 0\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'lightning', 'pydantic', 'av'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, *words.split()], check=True, cwd=tmp_path)


def test_plugins_are_listed(tmp_path: Path) -> None:
    (tmp_path / "nod.py").write_text('"""Nods along."""\n')
    done = run_kit("plugins", KIT_PLUGIN_PATH=str(tmp_path))
    assert "nod                  Nods along.\n" in done.stdout
    assert str(tmp_path / "nod.py") in done.stdout


def test_a_user_error_is_one_line_and_exit_2() -> None:
    done = run_kit("plugins", KIT_PLUGIN_PATH="/gone")
    assert done.returncode == 2
    assert done.stderr == "kit: KIT_PLUGIN_PATH: '/gone' is not a folder\n"


def test_a_missing_recipe_names_the_shipped_ones() -> None:
    done = run_kit("check", "no_such_recipe.yaml")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("kit: no_such_recipe.yaml: no such recipe")


def test_check_needs_something_to_check() -> None:
    done = run_kit("check", "seed=1")
    assert (done.returncode, done.stderr[:18]) == (2, "kit: check: name a"), done.stderr


@pytest.mark.skipif(
    not Path("/dev/full").exists(),
    reason="only Linux has /dev/full, which fails as a full disk does",
)
def test_a_full_disk_is_one_line_and_exit_2(tmp_path: Path) -> None:
    # A link, so that even a writer that replaces its file leaves the device alone.
    (tmp_path / "full").symlink_to("/dev/full")
    done = run_kit("check", "--schema", "fit", "--out", str(tmp_path / "full"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("kit: the disk is full")
    assert done.stderr.count("\n") == 1


def test_a_full_disk_is_seen_behind_other_errors() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a.safetensors")
    wrapped = RuntimeError("writing failed")
    wrapped.__cause__ = full
    expected = "the disk is full, while writing runs/a.safetensors"
    assert disk_full(full) == disk_full(wrapped) == expected
    foreign = RuntimeError("I/O error: No space left on device (os error 28)")
    assert disk_full(foreign) == f"the disk is full: {foreign}"
    assert disk_full(OSError(errno.ENOENT, "No such file", "a")) is None
    assert disk_full(InputError("no")) is None


@pytest.mark.skipif(
    not hasattr(os, "mkfifo"), reason="Windows has no named pipes, which keep the command busy here"
)
def test_the_keyboard_stops_with_130(tmp_path: Path) -> None:
    # A plugin file that never ends keeps the command busy; opening the other end waits for it.
    pipe = tmp_path / "endless.py"
    os.mkfifo(pipe)
    environment = {**os.environ, "KIT_PLUGIN_PATH": str(tmp_path)}
    command = [sys.executable, "-m", "kit", "plugins"]
    # Shells let what they run in the background ignore this signal, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        with pipe.open("w"):
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
    signal.signal(signal.SIGINT, before)
    assert (process.returncode, errors) == (130, "kit: stopped\n")


def test_the_front_door_runs_the_checkout(tmp_path: Path) -> None:
    door = Path(__file__).parents[1] / "lightning_app.py"
    done = subprocess.run(
        [sys.executable, "-P", door, "plugins"],
        cwd=tmp_path,
        env={**os.environ, "KIT_PLUGIN_PATH": "/gone"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr[:5]) == (2, "kit: ")


def run_kit(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kit", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_words_may_stand_on_either_side_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "nowhere.yaml", "seed=1", "--report", "text=2"]
    assert cli.main(words) == 2
    assert "nowhere.yaml: no such recipe" in capsys.readouterr().err
    for rest in ("--reprot", "x"):
        with pytest.raises(SystemExit):
            cli.main([*words, rest])
        assert f"unrecognized arguments: text=2 {rest}" in capsys.readouterr().err
