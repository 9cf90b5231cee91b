"""Kill commands at random points, start them again, and compare the end with undisturbed runs.

    python benchmarks/chaos.py --kills 30

Half of the kills fall at a random time, half right before a random operation on a file: opening it
to write, renaming, removing, making a folder. Time alone would hardly ever hit those.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from kit.adapters.merged import write_diffusers
from kit.cli import main as kit
from kit.data.media import VideoWriter, encode_wav
from kit.draws import draw_normal
from kit.models.wan_base import WanBase
from kit.training.curves import read_curves

ROOT = Path(__file__).parents[1]
FIT, TALK = (ROOT / "tests" / "recipes" / name for name in ("tiny.yaml", "tiny_talk.yaml"))
TINY_BASE = ROOT / "data" / "tiny_base"
RECIPE = f"""
extends: {FIT}
base: {{path: FOLDER/base}}
data: {{window_frames: 9, context_frames: 5, num_workers: 0}}
preview: null
"""
LIMIT_SECONDS = 120.0
PRELOADED = [f"kit.run.{name}" for name in ("fit", "prepare", "sample", "export")]

FILE_OPERATIONS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
"""Audit events of Python; `open` is another one, if it is to write."""

MEASURED = {"seconds", "seconds_in_steps", "seconds_per_step", "peak_memory_mb"}
"""Numbers of a run that no two runs share."""

NOT_COMPARED = {"checkpoints", "tensorboard"}
"""Folders; training that goes on writes some of it twice."""


@dataclass(frozen=True)
class Command:
    """A command to kill.

    Attributes:
        words: of the command line; outputs are relative to the folder that it runs in.
        progress: tells from that folder how far it is.
    """

    words: Sequence[str]
    progress: Callable[[Path], str]


@dataclass(frozen=True)
class Calm:
    """An undisturbed run: where it ran, its seconds, and its operations on files."""

    folder: Path
    seconds: float
    operations: int


class Blow(NamedTuple):
    """When to kill: after some seconds, or before an operation on a file by its number, from 1."""

    seconds: float = LIMIT_SECONDS
    operation: int = 0


@dataclass
class Outcome:
    """What the kills of one command led to.

    Attributes:
        fell: how far the command was at each kill.
        jobs: runs from an empty folder to the end.
        differing: files at the end that are not those of an undisturbed run.
    """

    fell: list[str] = field(default_factory=list)
    jobs: int = 0
    differing: list[str] = field(default_factory=list)


def main() -> None:
    """Attack all commands and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| command | kills | where they fell | jobs | equal at the end |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, outcome in attack_all(Path(folder), options.kills, options.seed).items():
            verdict = ", ".join(outcome.differing) or "yes"
            fell = ", ".join(outcome.fell)
            print(f"| {name} | {len(outcome.fell)} | {fell} | {outcome.jobs} | {verdict} |")


def attack_all(folder: Path, kills: int, seed: int, *, length: int = 24) -> dict[str, Outcome]:
    """Attack every command.

    Args:
        folder: empty; for all that is written.
        kills: in all.
        seed: of the points at which they fall.
        length: of the work, as `draw_inputs` and `all_commands` take it.

    Returns:
        The outcome of each command, by name.
    """
    draws, outcomes = random.Random(seed), dict[str, Outcome]()
    draw_inputs(folder, length)
    commands = all_commands(folder, length)
    for number, (name, command) in enumerate(commands.items()):
        calm = run_calmly(command, folder / name)
        share = (kills + number) // len(commands)
        outcomes[name] = attack(command, calm, share, draws)
    return outcomes


def draw_inputs(folder: Path, length: int) -> None:
    """Write a base, a recipe, the speech of a video of some chunks, and as many short clips."""
    denoiser = WanBase(path=str(TINY_BASE), random_weights=0).load_denoiser(torch.device("cpu"))
    shutil.copytree(TINY_BASE, folder / "base")
    public = WanBase.public_name
    write_diffusers(denoiser.named_parameters(), folder / "base", lambda n: public(n) or n)
    (folder / "fit.yaml").write_text(RECIPE.replace("FOLDER", str(folder)))
    talk = draw_normal((1, (4 * length + 5) * 640), "talk")
    (folder / "speech.wav").write_bytes(encode_wav(0.1 * talk))
    draw_clips(folder / "clips", length)


def draw_clips(folder: Path, count: int) -> None:
    """Draw short clips of moving colours, with sound and captions."""
    across = np.linspace(0, 6, 64)
    for clip in range(count):
        waves = np.sin(across + clip + 0.2 * np.arange(17)[:, None])
        frames = np.broadcast_to(waves[:, None, :, None], (17, 64, 64, 3))
        speech = 0.1 * draw_normal((17 * 640,), clip, "speech")
        path = folder / f"clip{clip:02d}.mp4"
        with VideoWriter(path, fps=25, height=64, width=64, speech=speech) as writer:
            writer.write((127 + 120 * frames).astype(np.uint8))
        path.with_suffix(".txt").write_text(f"clip {clip}")


def all_commands(inputs: Path, length: int) -> dict[str, Command]:
    """Name the commands; later ones need what earlier ones left after an undisturbed run.

    Args:
        inputs: holds what `draw_inputs` drew, and the folders of undisturbed runs.
        length: chunks of the video; training has three steps for each.
    """
    recipe, clips, speech = (str(inputs / name) for name in ("fit.yaml", "clips", "speech.wav"))
    steps = [f"trainer.max_steps={3 * length}", "trainer.save_every=5"]
    shards = inputs / "encode" / "shards" / "encoded"
    adapter = inputs / "fit" / "runs" / "tiny" / "adapter.safetensors"
    given = [f"base.path={inputs / 'base'}", f"adapter={adapter}", f"audio={speech}"]
    video = ["sampling.num_frames=9", "sampling.context_frames=5", "sampling.steps=1"]
    to = "diffusers,comfyui,kohya,peft,base,wan,kit,hub"
    return {
        "encode": Command(
            ["prepare", clips, "--out", "shards", "--recipe", recipe, "--encode"],
            lambda folder: f"{_count(folder, 'shard-*.tar')} shards",
        ),
        "fit": Command(
            ["fit", recipe, f"data.path={shards}", *steps],
            lambda folder: f"step {len(read_curves(folder / 'runs/tiny/metrics.csv'))}",
        ),
        "sample": Command(
            ["sample", str(TALK), *given, "out=talk.mp4", *video],
            lambda folder: f"{_count(folder, 'chunk-*[0-9].mp4')} chunks",
        ),
        "export": Command(
            ["export", str(adapter), "--to", to, "--out", "files"],
            lambda folder: f"{_count(folder, '*.safetensors')} files",
        ),
    }


def run_calmly(command: Command, folder: Path) -> Calm:
    """Run a command to its end."""
    started = time.perf_counter()
    done, operations = run(command.words, folder, Blow())
    assert done, f"{folder} took longer than {LIMIT_SECONDS} s"
    return Calm(folder, time.perf_counter() - started, operations)


def attack(command: Command, calm: Calm, kills: int, draws: random.Random) -> Outcome:
    """Run a command with so many kills, from an empty folder whenever it has come to its end."""
    outcome = Outcome()
    while len(outcome.fell) < kills:
        outcome.jobs += 1
        folder = calm.folder.with_name(f"{calm.folder.name}{outcome.jobs}")
        is_done = False
        while not is_done:
            blow = draw_blow(calm, draws) if len(outcome.fell) < kills else Blow()
            is_done, _ = run(command.words, folder, blow)
            if not is_done:
                outcome.fell.append(command.progress(folder))
        outcome.differing += [f"{folder.name}/{name}" for name in differences(folder, calm.folder)]
    return outcome


def draw_blow(calm: Calm, draws: random.Random) -> Blow:
    """Draw when to kill: by the clock, or at an operation on a file."""
    if draws.random() < 0.5:
        return Blow(seconds=draws.uniform(0, calm.seconds))
    return Blow(operation=draws.randint(1, calm.operations))


def run(words: Sequence[str], folder: Path, blow: Blow) -> tuple[bool, int]:
    """Run a command in a folder until it ends or is killed.

    Returns:
        Whether it came to its end, and how many operations on files it did.

    Raises:
        RuntimeError: it failed by itself.
    """
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    operations = context.Value("i", 0, lock=False)
    process = context.Process(target=_enter, args=(words, folder, blow.operation, operations))
    process.start()
    process.join(blow.seconds)
    process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"kit {' '.join(words)}:\n{_log(folder).read_text()}")
    return process.exitcode == 0, operations.value


def _enter(words: Sequence[str], folder: Path, fatal: int, operations: Any) -> None:
    """Be the process of a command that kills itself at an operation on a file."""
    torch.set_num_threads(1)
    os.chdir(folder)
    log = os.open(_log(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if is_operation(event, arguments, folder):
            operations.value += 1
            if operations.value == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    sys.exit(kit(words))


def is_operation(event: str, arguments: tuple[Any, ...], folder: Path) -> bool:
    """Tell whether an audit event of Python is about to change a file in a folder."""
    writes = event == "open" and bool(set(arguments[1] or "") & set("wax+"))
    if not writes and event not in FILE_OPERATIONS:
        return False
    path = arguments[0]
    return isinstance(path, str | os.PathLike) and Path(path).absolute().is_relative_to(folder)


def differences(folder: Path, other: Path) -> list[str]:
    """Name the files of two folders that are not in both, or do not hold the same."""
    found, expected = contents(folder), contents(other)
    names = sorted(found.keys() | expected.keys())
    return [name for name in names if found.get(name) != expected.get(name)]


def contents(folder: Path) -> dict[str, object]:
    """Read all files in and below a folder, times aside."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        str(file): READERS.get(file.suffix, _digest)(folder / file)
        for file in files
        if not set(file.parts) & NOT_COMPARED
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _tensors(path: Path) -> object:
    """Read tensors and header; safetensors writes the header's entries in any order."""
    with safe_open(path, "np") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        size = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        data = hashlib.sha256(path.read_bytes()[size:]).hexdigest()
        kinds = {name: (part.get_dtype(), part.get_shape()) for name, part in tensors.items()}
        return file.metadata(), kinds, data


def _rows(path: Path) -> list[dict[str, str]]:
    return [_not_measured(row) for row in read_curves(path)]


def _facts(path: Path) -> dict[str, object]:
    return _not_measured(json.loads(path.read_text()))


def _not_measured(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in MEASURED}


READERS: dict[str, Callable[[Path], object]] = {
    ".safetensors": _tensors,
    ".csv": _rows,
    ".json": _facts,
}
"""By suffix, for files that hold times or whose bytes may be arranged in another way."""


def _count(folder: Path, pattern: str) -> int:
    return sum(1 for _ in folder.rglob(pattern))


def _log(folder: Path) -> Path:
    return folder.with_suffix(".log")


if __name__ == "__main__":
    main()
