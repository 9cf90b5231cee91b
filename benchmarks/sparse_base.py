"""A base of the 14B model's width in files of zeros, which take no room on a disk."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from kit.models.keys import is_audio, public_name

WIDTH_14B = {
    "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 36, "out_channels": 16,
    "ffn_dim": 13824, "image_dim": 1280, "added_kv_proj_dim": 5120,
}  # fmt: skip


def write_base(folder: Path, shapes: Mapping[str, tuple[int, ...]], num_blocks: int) -> None:
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
    sizes |= {"in_dim": 36, "out_dim": 16, "num_layers": num_blocks, "eps": 1e-6, "text_len": 512}
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", **sizes}))
