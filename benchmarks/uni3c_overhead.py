"""Time and memory that Uni3C's controller adds to a denoising step, on a CPU.

    python benchmarks/uni3c_overhead.py

The base is the 124 M configuration of `infinitetalk_speed.py`; the controller is scaled to it as
the public one is to the 14B model: a fifth of its width, half of its blocks. Guidance has three
branches. Every figure comes from a process of its own; the sides take turns, and the medians count.
Seconds are the processor's. Memory is the peak beyond the loaded networks. What is computed once a
chunk, from the render and for the conditions, is in the first step, which is given apart.
"""

import argparse
import importlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent / "infinitetalk"))

import numpy as np
import torch
from case import AUDIO_SCALE, TEXT_SCALE, Case, draw_inputs, draw_network, one_block
from measuring import Measured, measure
from safetensors.torch import save_file
from torch import Tensor

from kit import plugins
from kit.draws import draw_normal
from kit.sampling.chunks import Chunk
from kit.sampling.frames import StillSource
from kit.sampling.hooks import Hooks
from kit.sampling.pipeline import TalkSampler
from kit.sampling.plugin import Plugin, Run
from kit.sampling.scene import Scene

controllers: Any = importlib.import_module("kit.plugins.uni3c.controller")

PIXELS = 16
"""In a token, each way."""


class DrawnLatents:
    """In the place of encoders, whose time is no part of a step."""

    def encode_video(self, pixels: Tensor) -> Tensor:
        """Give latents of the right size."""
        _, _, count, height, width = pixels.shape
        return draw_normal((1, 16, (count + 3) // 4, height // 8, width // 8), "render")


def main() -> None:
    """Measure both sides in turn, and print a table."""
    options = read_options()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    case = Case(speakers=1, dtype=options.dtype, grid=tuple(options.grid))
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "controller.safetensors"
        save_file(draw_controller(case).state_dict(), weights, {"num_heads": "5"})
        sides = {"plain": None, "uni3c": weights}
        runs: dict[str, list[Measured]] = {name: [] for name in sides}
        for _ in range(options.repeats):
            for name, file in sides.items():
                prepare = partial(prepare_step, case, file, together=not options.apart)
                runs[name].append(measure(prepare, 2))
    print_table(runs)


def read_options() -> Any:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--grid", nargs=3, type=int, default=(5, 20, 20), help="of video tokens")
    parser.add_argument("--apart", action="store_true", help="guidance branches one by one")
    return parser.parse_args()


def draw_controller(case: Case) -> Any:
    """Draw a controller."""
    sizes = controllers.Sizes(
        in_channels=36,
        guide_channels=7,
        guide_dim=40,
        base_dim=case.dim,
        time_dim=case.dim,
        dim=160,
        ffn_dim=640,
        num_heads=5,
        num_layers=case.blocks // 2,
    )
    controller = controllers.Controller(sizes)
    for name, parameter in controller.named_parameters():
        parameter.data = 0.02 * draw_normal(tuple(parameter.shape), name)
    return controller


def prepare_step(case: Case, weights: Path | None, *, together: bool) -> Callable[[], Tensor]:
    """Load the networks and make a step; the first call also finds what all steps share."""
    network, inputs = draw_network(case), draw_inputs(case)
    with one_block(network.transformer):
        network(inputs.noisy, inputs.sigma[None], inputs.conditions)
    named: dict[str, Plugin] = {}
    if weights is not None:
        kind: Any = plugins.load("uni3c")
        named["uni3c"] = kind(weights=str(weights), source="video", end=1.0)
    scales = {"text_scale": TEXT_SCALE, "audio_scale": AUDIO_SCALE}
    sampler = TalkSampler(Hooks(named), together=together, **scales)
    chunk = Chunk(0, 0, 4 * case.grid[0] - 3, 0, 1)
    sampler.hooks.open(still_run(case, sampler, chunk))
    hooks = sampler.hooks.chunk(chunk, sampler.sigmas)
    conditions = hooks.conditions(inputs.conditions)
    velocity = sampler.guided(network, conditions, inputs.null_text, hooks)

    def step() -> Tensor:
        hooks.begin(0)
        predicted = velocity(inputs.noisy, inputs.sigma)
        hooks.step(inputs.noisy)
        return predicted

    return step


def still_run(case: Case, sampler: TalkSampler, chunk: Chunk) -> Run:
    """Tell the plugin of a run from a grey picture."""
    size = (PIXELS * case.grid[1], PIXELS * case.grid[2])
    portrait = StillSource(np.full((*size, 3), 128, np.uint8), size)
    scene = Scene("", torch.zeros(1, 1), portrait, torch.ones(1, size[0] // 8, size[1] // 8))
    encoders: Any = DrawnLatents()
    encoded: Any = None
    return Run(None, encoders, scene, encoded, (chunk,), sampler.own_sigmas, 0)


def print_table(runs: dict[str, list[Measured]]) -> None:
    """Print what a step takes, and by how much more it is with the controller."""
    print(f"{'':8}{'step s':>9}{'first s':>9}{'peak MB':>9}{'loaded MB':>11}")
    for name, some in runs.items():
        first, later = (median(run.seconds[n] for run in some) for n in (0, 1))
        peak, loaded = median(run.peak for run in some), median(run.loaded for run in some)
        print(f"{name:8}{later:9.2f}{first:9.2f}{peak:9.0f}{loaded:11.0f}")
    pairs = list(zip(runs["uni3c"], runs["plain"], strict=True))
    ratios = sorted(one.seconds[1] / other.seconds[1] for one, other in pairs)
    print(f"step, ratio: {median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    more = median(one.peak - other.peak for one, other in pairs)
    print(f"peak memory beyond the plain step: {more:.0f} MB")
    changed, plain = (run.velocity for run in pairs[-1])
    change = np.linalg.norm(changed - plain) / np.linalg.norm(plain)
    print(f"change of the velocity, relative: {change:.2g}")


if __name__ == "__main__":
    main()
