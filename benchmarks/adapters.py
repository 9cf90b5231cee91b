"""Adapters in the files of other programs: what a round trip costs, and merging at full width.

    python benchmarks/adapters.py table          # kind x format on the studio base, a minute
    python benchmarks/adapters.py merge          # four blocks of the 14B width, about 10 GB of disk

`table` writes each kind of adapter, with drawn numbers, to each format in float32 and bfloat16,
reads it as that program does, and gives the largest error of a layer's output, relative to what the
adapter changes. `merge` streams a base through `kit export --to wan`. Both write
`benchmarks/adapters.json`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sparse_base import WIDTH_14B, write_base
from torch import nn

from kit.adapters.consumers import UNSUPPORTED
from kit.adapters.export import FORMATS
from kit.adapters.files import AdapterInfo, write_adapter
from kit.adapters.lora import Lora, adapter_tensors, trained_parameters
from kit.adapters.verify import verify
from kit.draws import draw_normal
from kit.models.audio import AudioSizes
from kit.models.wan import Wan
from kit.models.wan_base import WanBase
from kit.run.export import Settings, export

STUDIO = "data/studio_base"
RESULTS = Path(__file__).with_suffix(".json")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, rank-stabilised": {"rank_stabilised": True},
    "lora, ranks by part": {"ranks": {"ffn": 4}, "alphas": {"ffn": 1.0}},
    "dora": {"kind": "dora"},
    "loha": {"kind": "loha"},
    "lokr": {"kind": "lokr"},
}
BLOCKS, BLOCKS_14B = 4, 40


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["table", "merge"])
    what = parser.parse_args().what
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[what] = {"table": measure_table, "merge": measure_merge}[what]()
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def measure_table() -> dict[str, dict[str, Any]]:
    """Write and read every kind in every format."""
    rows: dict[str, dict[str, Any]] = {}
    print("| | " + " | ".join(FORMATS) + " |")
    for name, options in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measure_kind(Path(folder), options)
        print(f"| {name} | " + " | ".join(map(str, rows[name].values())) + " |", flush=True)
    return rows


def measure_kind(folder: Path, options: Mapping[str, Any]) -> dict[str, str]:
    """Give the errors of one kind, float32 and bfloat16, by format."""
    base = WanBase(path=STUDIO, dtype="float32", text_length=64)
    denoiser = base.load_denoiser(torch.device("cpu"))
    kind = options.get("kind", "lora")
    adapter = folder / "adapter.safetensors"
    draw_adapter(denoiser, Lora(**{"rank": 16, **options}), adapter, f"path: {STUDIO}")
    cells = {}
    for target in FORMATS:
        if (kind, target) in UNSUPPORTED:
            cells[target] = "refused"
            continue
        errors = []
        for dtype in ("float32", "bfloat16"):
            settings = Settings(dtype=dtype, with_audio=False)  # type: ignore[arg-type]
            files = export(adapter, [target], folder / dtype, silent, settings=settings)
            read = verify(files[-1], target, adapter, base.empty_denoiser())
            assert not read.problems(), read.problems()
            errors.append(read.error)
        cells[target] = f"{errors[0]:.0e} / {errors[1]:.1e}"
    return cells


def draw_adapter(denoiser: Any, lora: Lora, path: Path, base: str) -> None:
    """Put an adapter on a denoiser, give it numbers, and write it."""
    lora.inject(denoiser, seed=0)
    with torch.no_grad():
        for name, parameter in trained_parameters(denoiser).items():
            parameter.add_(0.02 * draw_normal(tuple(parameter.shape), name))
    recipe = f"base: {{type: wan, {base}}}\nadapter: {{type: lora, kind: {lora.kind}}}\n"
    info = AdapterInfo("drawn", "wan", lora.kind, lora.parts, (), 1, recipe)
    write_adapter(path, adapter_tensors(denoiser, trained_parameters(denoiser), lora.kind), info)


def measure_merge() -> dict[str, float]:
    """Merge a LoRA of rank 32 into some blocks of the public width, in a process of its own."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:
        folder = Path(place)
        with torch.device("meta"):
            model = Wan({**WIDTH_14B, "num_layers": BLOCKS}, audio=AudioSizes())
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        write_base(folder / "wan", shapes, BLOCKS)
        adapter = draw_factors(folder, model)
        arguments = [sys.executable, "-m", "kit", "export", str(adapter), "--to", "wan"]
        started = time.perf_counter()
        process = os.spawnv(os.P_NOWAIT, sys.executable, arguments)
        _, status, usage = os.wait4(process, 0)
        assert status == 0
        seconds = time.perf_counter() - started
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    found = {
        "parameters": count,
        "gigabytes_written": 2 * count / 1e9,
        "seconds": seconds,
        "peak_gigabytes": usage.ru_maxrss * 1024 / 1e9,
        "seconds_at_40_blocks": seconds * BLOCKS_14B / BLOCKS,
    }
    print(json.dumps(found, indent=1))
    return found


def draw_factors(folder: Path, model: Wan) -> Path:
    """Draw an adapter file for layers that have no memory."""
    tensors = {}
    for part in ("attention", "ffn", "audio"):
        for layer in model.parts()[part]:
            linear = model.get_submodule(layer)
            assert isinstance(linear, nn.Linear)
            tensors[f"{layer}.lora_A.weight"] = 0.02 * torch.randn(32, linear.in_features)
            tensors[f"{layer}.lora_B.weight"] = 0.02 * torch.randn(linear.out_features, 32)
            tensors[f"{layer}.alpha"] = torch.tensor(32.0)
    place = folder / "wan"
    audio = f"path: {place}, audio_weights: {place}/infinitetalk.safetensors"
    recipe = f"base: {{type: wan, {audio}}}\nadapter: {{type: lora, kind: lora}}\n"
    info = AdapterInfo("drawn", "wan", "lora", ("attention", "ffn", "audio"), (), 1, recipe)
    write_adapter(folder / "adapter.safetensors", tensors, info)
    return folder / "adapter.safetensors"


def silent(line: str) -> None:
    """Tell nobody."""


if __name__ == "__main__":
    main()
