"""What the README says is there, and the commands it shows are understood."""

import re
import shlex
from pathlib import Path

import pytest

from kit.cli import main
from kit.run.quickstart import PHASES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (?:\.venv/bin/)?kit (.+?)(?:\s+#.*)?$", README, re.MULTILINE)


def test_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_files_and_tests_it_names_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    named = re.findall(r"`((?:tests|recipes|benchmarks)/[\w./]+)`", README)
    tour = re.findall(r"^    ((?:kit|data|plugins|tests|benchmarks)/[\w./]*)", README, re.MULTILINE)
    assert links and named and tour
    assert [path for path in (*links, *named, *tour) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_name_what_exists(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line)
    with pytest.raises(SystemExit) as end:
        main([words[0], "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert [word for word in words if word.startswith("--") and word not in shown] == []
    for word in words:
        if word.startswith("recipes/"):
            assert (ROOT / word).is_file()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"(?:`|^    )make (\w+)", README, re.MULTILINE)
    assert targets
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []


def test_quickstart_runs_every_command_that_the_readme_shows() -> None:
    # Extracting needs a second set of weights, which nothing here trains.
    shown = {line.split()[0] for line in COMMANDS} - {"extract"}
    assert shown <= {command.split()[0] for command in PHASES.values()}
