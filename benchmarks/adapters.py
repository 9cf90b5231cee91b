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
from torch import nn

from kit.adapters.consumers import UNSUPPORTED
from kit.adapters.export import FORMATS
from kit.adapters.files import AdapterInfo, write_adapter
from kit.adapters.lora import Lora, adapter_tensors, trained_parameters
from kit.adapters.verify import verify
from kit.draws import draw_normal
from kit.models.audio import AudioSizes
from kit.models.keys import is_audio, public_name
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
WIDTH_14B = {
    "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 36, "out_channels": 16,
    "ffn_dim": 13824, "image_dim": 1280, "added_kv_proj_dim": 5120,
}  # fmt: skip
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
        write_base(folder / "wan", shapes)
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


def write_base(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write files that are all zeros, which take no room on a disk."""
    folder.mkdir()
    parts: dict[str, dict[str, tuple[int, ...]]] = {
        "infinitetalk.safetensors": {},
        "diffusion_pytorch_model.safetensors": {},
    }
    for name, shape in shapes.items():
        file = "infinitetalk" if is_audio(name) else "diffusion_pytorch_model"
        parts[f"{file}.safetensors"][public_name(name) or name] = shape
    for file, tensors in parts.items():
        header, end = {}, 0
        for key, shape in tensors.items():
            start, end = end, end + 2 * torch.Size(shape).numel()
            header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    sizes = {"model_type": "i2v", "dim": 5120, "num_heads": 40, "ffn_dim": 13824, "freq_dim": 256}
    sizes |= {"in_dim": 36, "out_dim": 16, "num_layers": BLOCKS, "eps": 1e-6, "text_len": 512}
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", **sizes}))


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
