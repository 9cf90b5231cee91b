"""Everything once on the drawn sample clips: `python -m kit.run.quickstart`, or `make quickstart`.

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

from kit.run.fit import RUNS

NAME = "quickstart"
PHASES = {
    "prepare": (
        "prepare shipped:data/sample/clips --out runs/quickstart/shards "
        "--recipe recipes/quickstart.yaml --encode --overwrite"
    ),
    "check": "check recipes/quickstart.yaml",
    "fit": "fit recipes/quickstart.yaml",
    "sample": "sample recipes/quickstart_talk.yaml",
    "export": "export runs/quickstart/adapter.safetensors --to diffusers,comfyui",
}
PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft", "av")


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
    report = {
        "phases": {phase: asdict(cost) for phase, cost in costs.items()},
        "seconds": round(sum(cost.seconds for cost in costs.values()), 1),
        "losses": json.loads((folder / "fit.json").read_text()),
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _say(f"\ndone in {report['seconds']} s; look at:")
    for file in ("talk.mp4", "loss.png", "shards/census.png", "previews", "report.json"):
        _say(f"  {folder / file}")
    return 0


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
