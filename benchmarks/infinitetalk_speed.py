"""Time and memory of a denoising step, ours against the public InfiniteTalk code, on a CPU.

    git clone https://github.com/MeiGen-AI/InfiniteTalk && python -m pip install einops
    python benchmarks/infinitetalk_speed.py InfiniteTalk

Both have the same weights and inputs, one thread, and guidance with three branches. Every figure
comes from a process of its own; the sides take turns, and the median counts. Seconds are the
processor's, so that other work on the machine counts little. Memory is the peak beyond the loaded
network. Ours finds what all steps of a chunk share in its first step, which is given apart.

On a CPU, much of the difference is who multiplies matrices: `--mkl` leaves float32 to torch's
own choice on both sides, and shows what is saved in arithmetic alone.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent / "infinitetalk"))

import numpy as np
import public
import torch
from case import Case, draw_inputs, draw_network
from measuring import Measured, measure
from ours import make_step
from torch import Tensor

CASES = [Case(speakers, dtype) for dtype in ("float32", "bfloat16") for speakers in (1, 2)]
RESULTS = Path(__file__).with_suffix(".json")
STEPS_OF_A_CHUNK = 40
COLUMNS = (
    f"{'case':24}{'ours s':>8}{'theirs s':>10}{'ratio':>7}{'first s':>9}"
    f"{'ours MB':>9}{'theirs MB':>11}{'ratio':>7}{'difference':>12}"
)


def main() -> None:
    """Measure all cases, print a table and write it as JSON."""
    options = read_options()
    lack = public.missing(options.checkout)
    if lack is not None:
        print(f"skipped: {lack}")
        return
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(not options.mkl)
    warnings.simplefilter("ignore")
    print(COLUMNS)
    for case in CASES:
        if case.dtype in options.dtypes and case.speakers in options.speakers:
            case = Case(case.speakers, case.dtype, tuple(options.grid), blocks=options.blocks)
            row = compare(case, options)
            print(line(row), flush=True)
            write(options.out, row)


def read_options() -> Any:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="of github.com/MeiGen-AI/InfiniteTalk")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--speakers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--grid", nargs=3, type=int, default=Case.grid)
    parser.add_argument("--blocks", type=int, default=Case.blocks)
    parser.add_argument("--together", action="store_true", help="our branches in one forward pass")
    parser.add_argument("--mkl", action="store_true", help="float32 without oneDNN")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def compare(case: Case, options: Any) -> dict[str, Any]:
    """Measure both sides in turn."""
    theirs, ours = [], []
    for _ in range(options.repeats):
        theirs.append(measure(partial(prepare_public, options.checkout, case), 1))
        ours.append(measure(partial(prepare_ours, case, options.together), 2))
    seconds = median(run.seconds[-1] for run in ours)
    first = median(run.seconds[0] for run in ours)
    public_seconds = median(run.seconds[-1] for run in theirs)
    per_step = (first + (STEPS_OF_A_CHUNK - 1) * seconds) / STEPS_OF_A_CHUNK
    memory, public_memory = (median(run.peak for run in runs) for runs in (ours, theirs))
    return {
        "case": asdict(case)
        | {"grid": list(case.grid), "together": options.together, "mkl": options.mkl},
        "ours": summary(ours),
        "theirs": summary(theirs),
        "seconds": {"ours": per_step, "first": first, "theirs": public_seconds},
        "megabytes": {"ours": memory, "theirs": public_memory},
        "ratio": {"seconds": per_step / public_seconds, "memory": memory / public_memory},
        "difference": difference(ours[-1].velocity, theirs[-1].velocity),
    }


def prepare_public(checkout: Path, case: Case) -> Callable[[], Tensor]:
    """Load the public network and make its step."""
    return public.Step(public.load(checkout, case), case, draw_inputs(case))


def prepare_ours(case: Case, together: bool) -> Callable[[], Tensor]:
    """Load our network and make its step."""
    return make_step(draw_network(case), draw_inputs(case), together=together)


def summary(runs: list[Measured]) -> dict[str, Any]:
    """List what the processes measured."""
    return {
        "seconds": [list(run.seconds) for run in runs],
        "peak_megabytes": [run.peak for run in runs],
        "loaded_megabytes": [run.loaded for run in runs],
    }


def difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Compare guided velocities: largest difference, and Euclidean relative to theirs."""
    return {
        "largest": float(np.abs(ours - theirs).max()),
        "relative": float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)),
    }


def line(row: dict[str, Any]) -> str:
    """Write a row of the table."""
    case, seconds, memory, ratio = (row[k] for k in ("case", "seconds", "megabytes", "ratio"))
    name = f"{case['dtype']}, {case['speakers']} speaker{'s' * (case['speakers'] > 1)}"
    return (
        f"{name:24}{seconds['ours']:8.2f}{seconds['theirs']:10.2f}{ratio['seconds']:7.2f}"
        f"{seconds['first']:9.2f}{memory['ours']:9.0f}{memory['theirs']:11.0f}"
        f"{ratio['memory']:7.2f}{row['difference']['largest']:12.1e}"
    )


def write(path: Path, row: dict[str, Any]) -> None:
    """Put a row into the file of results; other cases keep theirs."""
    rows = json.loads(path.read_text())["cases"] if path.is_file() else []
    others = [other for other in rows if other["case"] != row["case"]]
    path.write_text(json.dumps({"machine": machine(), "cases": [*others, row]}, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Say where this was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [text.split(":")[1].strip() for text in lines if text.startswith("model name")]
    return {
        "processor": names[0],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "public_code_compiled": public.compiles(),
    }


if __name__ == "__main__":
    main()
