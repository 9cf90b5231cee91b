"""A full disk: one clear error, nothing broken left behind, and the same command goes on."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks.chaos import all_commands, contents, differences, draw_inputs
from kit.cli import main
from kit.data.media import probe
from kit.data.writer import index_tar
from kit.training.checkpoints import is_whole

DISK_BYTES = 2**26
LENGTH = 5
"""Chunks of the video; training has three steps for each, and there are as many clips."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system can only be mounted by root on Linux: {error}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What undisturbed commands leave, in one folder for each."""
    folder = tmp_path_factory.mktemp("calm")
    draw_inputs(folder, LENGTH)
    with pytest.MonkeyPatch.context() as patch:
        for name, command in all_commands(folder, LENGTH).items():
            (folder / name).mkdir()
            patch.chdir(folder / name)
            assert main(command.words) == 0
    return folder


def opens(path: Path) -> object:
    """Open a file as its readers do."""
    with safe_open(path, "np") as file:
        return file.metadata()


READERS: dict[str, Callable[[Path], object]] = {
    ".tar": index_tar,
    ".safetensors": opens,
    ".mp4": probe,
    ".ckpt": is_whole,
}


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("name", ["encode", "fit", "sample", "export"])
def test_a_full_disk(
    name: str,
    share: float,
    calm: Path,
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    needed = sum(path.stat().st_size for path in (calm / name).rglob("*"))
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(DISK_BYTES - int(share * needed)))
    place = disk / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    words = all_commands(calm, LENGTH)[name].words
    assert main(words) == 2
    said = capsys.readouterr().err
    last = said.splitlines()[-1]
    assert last.startswith("kit: the disk is full, while writing ") and "/" in last, said
    for path in place.rglob("*"):
        if ".partial" not in str(path.relative_to(place)) and path.suffix in READERS:
            assert READERS[path.suffix](path)
    ballast.unlink()
    assert main(words) == 0
    assert not differences(place, calm / name)
    assert not [file for file in contents(place) if ".partial" in file]
