"""The wheel: it holds `kit` alone and every shipped file, and works far from the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from kit.shipped import FOLDERS

ROOT = Path(__file__).parents[1]
MAX_WHEEL_BYTES = 20_000_000

pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists(),
    reason="not a git checkout, and git tells which files a distribution must hold",
)


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # A path of modules in the environment would let the checkout stand in for the wheel.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False
    )


def run_well(*command: str | Path, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run_well(*_build("--sdist", out), cwd=ROOT)
    (file,) = out.glob("*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from the sdist, as an installer without a matching wheel does."""
    source = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    (unpacked,) = source.iterdir()
    run_well(*_build("--wheel", sdist.parent), cwd=unpacked)
    (file,) = sdist.parent.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install into a fresh environment that borrows this one's libraries; gives its `bin`."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    variables = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", variables))
    scripts = Path(sysconfig.get_path("scripts", "venv", variables))
    # Behind the environment's own packages, so that the wheel wins over an editable install.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", scripts / "python", "install"]
    run_well(*pip, "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=folder)
    return scripts


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Make a folder with modules of the names that our own folders have."""
    (tmp_path / "data.py").write_text("raise RuntimeError('the wrong data')\n")
    for name in ("data", "plugins", "recipes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('the wrong {name}')\n")
    (tmp_path / "plugins" / "stranger.py").touch()
    return tmp_path


def test_the_wheel_holds_kit_alone_and_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    inside = {name for name in names if ".dist-info/" not in name}
    expected = _files_of("kit")
    for folder in FOLDERS:
        expected |= {f"kit/_shipped/{name}" for name in _files_of(folder)}
    assert inside == expected
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_the_sdist_holds_the_tests_and_the_front_door(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert _files_of("tests") | {"lightning_app.py", "README.md", "LICENSE"} <= names


def test_the_wheel_knows_its_shipped_folders(installed: Path, foreign: Path) -> None:
    code = "import kit, kit.shipped as s; print(kit.__file__, *map(s.shipped, s.FOLDERS))"
    shown = run_well(installed / "python", "-P", "-c", code, cwd=foreign).split()
    package = Path(shown[0]).parent
    assert package.is_relative_to(installed.parent)
    assert shown[1:] == [str(package / "_shipped" / folder) for folder in FOLDERS]


def test_the_wheel_runs_among_foreign_names(installed: Path, foreign: Path) -> None:
    assert "usage: kit" in run_well(installed / "kit", "--help", cwd=foreign)
    assert "stranger" not in run_well(installed / "kit", "plugins", cwd=foreign)
    described = run_well(installed / "kit", "check", "--schema", "fit", cwd=foreign)
    assert json.loads(described)["type"] == "object"


def test_the_wheel_finds_shipped_recipes(installed: Path, foreign: Path) -> None:
    done = run(installed / "kit", "check", "recipes/no_such_recipe.yaml", cwd=foreign)
    assert done.returncode == 2, done.stderr
    shipped = sorted(name for name in _files_of("recipes") if name.endswith(".yaml"))
    assert f"valid: {', '.join(shipped) or 'none'}" in done.stderr


def _build(kind: str, out: Path) -> list[str | Path]:
    return [sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", out, "."]


def _files_of(folder: str) -> set[str]:
    """List what git tracks or would track in a folder of the checkout."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", folder]
    names = run_well(*listing, cwd=ROOT).splitlines()
    return {name for name in names if (ROOT / name).exists()}
