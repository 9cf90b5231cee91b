"""Memory of reading a base of 14B size into one of several processes that share it.

    python benchmarks/loading.py                     # 4 and 8 processes, all 40 blocks
    python benchmarks/loading.py --world 2 --blocks 8

The base lies in files of zeros in Wan2.1's own layout. One process is measured for each number of
them: reading asks nothing of the others, so that the first of a group of torch's `fake` kind does
what the first of a true one would. Peak and end are resident memory beyond that after the imports.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from sparse_base import WIDTH_14B, write_base
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from kit.adapters.lora import Lora
from kit.models.audio import AudioSizes
from kit.models.checkpoints import parameter_shapes
from kit.models.wan import Wan
from kit.models.wan_base import WanBase
from kit.run.processes import distribute_base

CPU = torch.device("cpu")
GB = 1e9


class Loaded(NamedTuple):
    """What one process needed.

    Attributes:
        share: what it holds in the end, by the sizes of its tensors, in GB.
        end: memory beyond that after the imports, in GB.
        peak: the largest on the way, in GB.
        seconds: from the first file to the end.
    """

    share: float
    end: float
    peak: float
    seconds: float


def main() -> None:
    """Measure each number of processes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--blocks", type=int, default=40)
    options = parser.parse_args()
    with torch.device("meta"):
        model = Wan({**WIDTH_14B, "num_layers": options.blocks}, audio=AudioSizes())
    shapes = parameter_shapes(model)
    whole = 2 * sum(torch.Size(shape).numel() for shape in shapes.values()) / GB
    print(f"{options.blocks} blocks of 14B width, {whole:.1f} GB in bfloat16, LoRA of rank 32")
    print("| processes | share GB | end GB | peak GB | seconds |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:
        folder = Path(place) / "wan"
        write_base(folder, shapes, options.blocks)
        for world in options.world:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(load, (str(folder), world))
            print(
                f"| {world} | " + " | ".join(f"{value:.2f}" for value in found) + " |", flush=True
            )


def load(folder: str, world: int) -> Loaded:
    """Read the share of the first of so many processes, with the factors of an adapter."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    before, started = _resident(), time.perf_counter()
    base = WanBase(path=folder, audio_weights=f"{folder}/infinitetalk.safetensors")
    denoiser, lora = base.hollow_denoiser(), Lora(rank=32)
    lora.inject(denoiser, seed=0)
    distribute_base(base, denoiser, {}, init_device_mesh("cpu", (world,)), CPU)
    seconds = time.perf_counter() - started
    held = [parameter.to_local() for parameter in denoiser.parameters()]  # type: ignore[attr-defined]
    share = sum(part.numel() * part.element_size() for part in held) / GB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB
    return Loaded(share, _resident() - before, peak - before, seconds)


def _resident() -> float:
    """Read how much memory this process has, in GB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / GB


if __name__ == "__main__":
    main()
