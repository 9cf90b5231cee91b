"""Time and memory of a LoRA step on a CPU, ours beside plain loops with diffusers and PEFT.

    python benchmarks/training_step.py
    git clone https://github.com/MeiGen-AI/InfiniteTalk && python -m pip install einops
    python benchmarks/training_step.py --checkout InfiniteTalk

The network has 12 blocks, width 768 and 720 video tokens; rank 32 on all linear layers of the
blocks. Ours runs `kit fit`'s whole loop, and audio attention even beside diffusers' Wan, which has
none. Both have the same weights, batches and noise, so the same losses come out. Every figure is of
a process of its own with one thread; the sides take turns, and the median counts. Seconds are the
processor's. Memory is the peak beyond the loaded network, with gradients and the optimiser's.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent / "infinitetalk"))
sys.path.insert(0, str(Path(__file__).parent / "training"))

import fitted
import plain
import torch
from measuring import forget_peak, in_its_own_process, peak_memory
from shape import Shape

RESULTS = Path(__file__).with_suffix(".json")
COLUMNS = (
    f"{'case':36}{'ours s':>8}{'theirs s':>10}{'ratio':>7}"
    f"{'ours MB':>9}{'theirs MB':>11}{'ratio':>7}{'difference':>12}"
)


@dataclass(frozen=True)
class Course:
    """What a process took.

    Attributes:
        seconds: of the processor, for each step behind the first.
        losses: of all steps.
        loaded: memory with everything loaded, before the first step, in MB.
        peak: largest memory that the steps needed beyond it, in MB.
    """

    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    loaded: float
    peak: float


class Watch:
    """Notes time and loss at the end of each step."""

    def __init__(self) -> None:
        self.loaded = forget_peak()
        self.times: list[float] = []
        self.losses: list[float] = []

    def tell(self, loss: float) -> None:
        """Note a step."""
        self.times.append(time.process_time())
        self.losses.append(loss)

    def course(self) -> Course:
        """Give what was noted."""
        seconds = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        return Course(tuple(seconds), tuple(self.losses), self.loaded, peak_memory() - self.loaded)


def main() -> None:
    """Measure all cases, print a table and write it as JSON."""
    options = read_options()
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(not options.mkl)
    warnings.simplefilter("ignore")
    print(COLUMNS)
    for peer, dtype, every in product(options.peers, options.dtypes, options.checkpoint):
        if peer == "infinitetalk" and options.checkout is None:
            print("infinitetalk: skipped; --checkout names none")
            break
        row = compare(Shape(peer, dtype, every), options)
        print(line(row), flush=True)
        write(options.out, row)


def read_options() -> Any:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, help="of github.com/MeiGen-AI/InfiniteTalk")
    parser.add_argument("--peers", nargs="+", default=["diffusers", "infinitetalk"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--checkpoint", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mkl", action="store_true", help="float32 without oneDNN")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def compare(shape: Shape, options: Any) -> dict[str, Any]:
    """Measure both sides in turn."""
    checkout = options.checkout if shape.peer == "infinitetalk" else None
    sides: dict[str, Callable[[], Course]] = {
        "theirs": partial(train_plainly, shape, checkout, options.steps),
        "ours": partial(train_ours, shape, options.steps),
    }
    runs: dict[str, list[Course]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, side in sides.items():
            runs[name].append(in_its_own_process(side))
    seconds = {k: median(s for run in v for s in run.seconds) for k, v in runs.items()}
    megabytes = {k: median(run.peak for run in v) for k, v in runs.items()}
    ours, theirs = runs["ours"][0].losses, runs["theirs"][0].losses
    return {
        "case": asdict(shape) | {"mkl": options.mkl},
        "seconds": seconds,
        "megabytes": megabytes,
        "ratio": {
            "seconds": seconds["ours"] / seconds["theirs"],
            "memory": megabytes["ours"] / megabytes["theirs"],
        },
        "losses": {"ours": ours, "theirs": theirs},
        "difference": max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)),
        "loaded_megabytes": {k: median(run.loaded for run in v) for k, v in runs.items()},
        "all_seconds": {k: [list(run.seconds) for run in v] for k, v in runs.items()},
    }


def train_plainly(shape: Shape, checkout: Path | None, steps: int) -> Course:
    """Train the peer."""
    model, predict = plain.prepare(shape, checkout)
    batches, watch = shape.draw_batches(steps), Watch()
    for loss in plain.train(model, predict, batches):
        watch.tell(loss)
    return watch.course()


def train_ours(shape: Shape, steps: int) -> Course:
    """Train ours."""
    module, batches = fitted.prepare(shape), shape.draw_batches(steps)
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as silent:
        sys.stderr = silent  # of the progress bar
        watch = Watch()
        fitted.train(shape, module, batches, Path(folder), watch.tell)
    return watch.course()


def line(row: dict[str, Any]) -> str:
    """Write a row of the table."""
    case, seconds, memory, ratio = (row[k] for k in ("case", "seconds", "megabytes", "ratio"))
    name = f"{case['peer']}, {case['dtype']}, checkpointing {case['checkpoint']}"
    return (
        f"{name:36}{seconds['ours']:8.2f}{seconds['theirs']:10.2f}{ratio['seconds']:7.2f}"
        f"{memory['ours']:9.0f}{memory['theirs']:11.0f}{ratio['memory']:7.2f}"
        f"{row['difference']:12.1e}"
    )


def write(path: Path, row: dict[str, Any]) -> None:
    """Put a row into the file of results; other cases keep theirs."""
    rows = json.loads(path.read_text())["cases"] if path.is_file() else []
    others = [other for other in rows if other["case"] != row["case"]]
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    path.write_text(json.dumps({"machine": machine, "cases": [*others, row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
