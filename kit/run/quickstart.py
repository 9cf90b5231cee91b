"""Everything once on the drawn sample: `python -m kit.run.quickstart`, or `make quickstart`.

Each phase is a command of its own, printed so that it can be typed.
"""

import json
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from kit.data.media import VideoWriter, iter_frames, load_speech
from kit.models.base import Geometry
from kit.run.fit import RUNS

NAME = "quickstart"
WITHOUT, WITH = "without", "talk"
"""The same video without the adapter and with it, `NAME.mp4` each."""

PHASES = {
    "prepare": (
        "prepare shipped:data/sample/shards --out runs/quickstart/shards "
        "--recipe recipes/quickstart.yaml --encode --overwrite"
    ),
    "check": "check recipes/quickstart.yaml",
    "fit": "fit recipes/quickstart.yaml",
    "sample": "sample recipes/quickstart_talk.yaml --report",
    "sample without": (
        "sample --report recipes/quickstart_talk.yaml adapter=null "
        f"out=runs/quickstart/{WITHOUT}.mp4"
    ),
    "export": "export runs/quickstart/adapter.safetensors --to diffusers,comfyui",
}
PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft", "av")

SCALE = 4
"""The base's pictures are small; for the eye each pixel becomes a square."""

STRIP_FRAMES, STRIP_STEP = 10, 31


@dataclass(frozen=True)
class Cost:
    """What a phase took: the command, its time and the most memory it held."""

    command: str
    seconds: float
    peak_memory_mb: int


def main() -> int:
    """Run all phases and write `runs/quickstart/report.json`.

    Returns:
        0, or the exit status of the phase that failed.
    """
    costs: dict[str, Cost] = {}
    for phase, command in PHASES.items():
        status, costs[phase] = _run(command)
        if status != 0:
            return status
    folder = RUNS / NAME
    show_side_by_side(folder)
    numbers = {name: _numbers(folder / f"{name}.report.json") for name in (WITHOUT, WITH)}
    report = {
        "phases": {phase: asdict(cost) for phase, cost in costs.items()},
        "seconds": round(sum(cost.seconds for cost in costs.values()), 1),
        "losses": json.loads((folder / "fit.json").read_text()),
        "numbers": numbers,
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _say(f"\n{'':<20}{'base':>12}{'with adapter':>14}")
    for name, value in numbers[WITH].items():
        if value is not None:
            _say(f"{name:<20}{numbers[WITHOUT][name]:>12.3f}{value:>14.3f}")
    _say(f"\ndone in {report['seconds']} s; look at:")
    for file in ("side_by_side.mp4", "side_by_side.png", "loss.png", "previews", "report.json"):
        _say(f"  {folder / file}")
    return 0


def show_side_by_side(folder: Path) -> None:
    """Put both videos beside each other, in one video and in one strip of pictures.

    Args:
        folder: holds both videos; gets `side_by_side.mp4` and `side_by_side.png`.
    """
    fps = Geometry().fps
    videos = [folder / f"{name}.mp4" for name in (WITHOUT, WITH)]
    pairs = zip(*(iter_frames(video, fps) for video in videos), strict=True)
    frames = [np.concatenate([_enlarged(frame) for frame in pair], axis=1) for pair in pairs]
    height, width = frames[0].shape[:2]
    speech = load_speech(videos[0])
    out = folder / "side_by_side.mp4"
    with VideoWriter(out, fps=fps, height=height, width=width, speech=speech) as writer:
        writer.write(np.stack(frames))
    shown = islice(frames, 0, None, STRIP_STEP)
    columns = [
        np.concatenate([frame[:, : width // 2], frame[:, width // 2 :]])
        for frame in islice(shown, STRIP_FRAMES)
    ]
    Image.fromarray(np.concatenate(columns, axis=1)).save(folder / "side_by_side.png")


def _enlarged(frame: np.ndarray) -> np.ndarray:
    return frame.repeat(SCALE, axis=0).repeat(SCALE, axis=1)


def _numbers(path: Path) -> dict[str, float | None]:
    numbers: dict[str, float | None] = json.loads(path.read_text())["tracks"][0]
    return numbers


def _run(command: str) -> tuple[int, Cost]:
    _say(f"\n$ kit {command}")
    started = time.perf_counter()
    arguments = [sys.executable, "-m", "kit", *shlex.split(command)]
    process = os.spawnv(os.P_NOWAIT, sys.executable, arguments)
    _, status, usage = os.wait4(process, 0)
    seconds = round(time.perf_counter() - started, 1)
    cost = Cost(f"kit {command}", seconds, usage.ru_maxrss // 1024)
    return os.waitstatus_to_exitcode(status), cost


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
