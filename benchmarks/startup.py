"""Time to the first optimiser step: `kit fit` beside a plain script of diffusers and PEFT.

    python benchmarks/startup.py

Two bases, read from files: the tiny one, and one of 119 M parameters without the audio parts that
only ours has. The windows are tiny, so that little but starting counts. Every figure is of a
command of its own, one thread each; the sides take turns, and the median counts. A command reads
its base, trains one step on encoded samples, and writes the adapter; ours writes its checkpoint,
curves and a picture of them as well. `first` is the wall time until the first step is told.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

TINY = Path(__file__).parents[1] / "data" / "tiny_base"
SAMPLE = Path(__file__).parents[1] / "data" / "sample" / "shards"
LARGER = {"num_attention_heads": 6, "attention_head_dim": 128, "ffn_dim": 3072}
LARGER |= {"num_layers": 12, "added_kv_proj_dim": 768}
RECIPE = """
name: {name}
buckets: [64x64]
base: {{type: wan, path: {base}, random_weights: 0, dtype: float32}}
adapter: {{type: lora, rank: 32, parts: [attention, ffn]}}
objective: {{type: flow_matching}}
data: {{path: shards, batch_size: 1, window_frames: 9, num_workers: 0, context_frames: 5}}
trainer: {{max_steps: 1, precision: 32-true, checkpoint_blocks: 0, device: cpu}}
"""
PLAIN = """
import sys, torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file

model = WanTransformer3DModel.from_pretrained(sys.argv[1]).requires_grad_(False)
targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "net.0.proj", "net.2"]
model.add_adapter(LoraConfig(r=32, lora_alpha=32, target_modules=targets))
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4)
sample = load_file("sample.safetensors")
noise, sigma = torch.randn_like(sample["latents"]), torch.rand(1)
noisy = (1 - sigma) * sample["latents"] + sigma * noise
velocity = model(
    hidden_states=torch.cat([noisy, sample["given"]], dim=1),
    timestep=1000 * sigma,
    encoder_hidden_states=sample["text"],
    encoder_hidden_states_image=sample["image"],
).sample
F.mse_loss(velocity, noise - sample["latents"]).backward()
torch.nn.utils.clip_grad_norm_(trained, 1.0)
optimizer.step()
open("stepped", "w").close()
model.save_lora_adapter(sys.argv[2])
"""


def main() -> None:
    """Measure both bases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        print(f"{'base':8}{'side':8}{'first s':>9}{'whole s':>9}{'CPU s':>8}")
        for base in ("tiny", "larger"):
            sides = {
                "ours": (["-m", "kit", "fit", f"{base}.yaml"], f"runs/{base}/metrics.csv"),
                "theirs": (["plain.py", f"{base}/transformer", f"{base}_lora"], "stepped"),
            }
            taken: dict[str, list[tuple[float, ...]]] = {side: [] for side in sides}
            for _ in range(repeats):
                for side, (command, sign) in sides.items():
                    taken[side].append(take(command, Path(sign)))
            for side, times in taken.items():
                first, whole, processor = (median(column) for column in zip(*times, strict=True))
                print(f"{base:8}{side:8}{first:9.1f}{whole:9.1f}{processor:8.1f}", flush=True)


def prepare() -> None:
    """Write both bases, recipes, encoded shards, and what the plain script reads."""
    import torch
    from safetensors.torch import save_file

    from kit.models.checkpoints import draw_weights
    from kit.models.wan_base import WanBase

    for base, changes in (("tiny", {}), ("larger", LARGER)):
        subprocess.run(["cp", "-r", TINY, base], check=True)
        config = json.loads(Path(base, "transformer/config.json").read_text()) | changes
        Path(base, "transformer/config.json").write_text(json.dumps(config))
        network = WanBase(path=base, random_weights=0).empty_denoiser().to_empty(device="cpu")
        draw_weights(network, 0, torch.float32)
        weights = network.state_dict()
        audio = {name for name in weights if "audio" in name or "norm_x" in name}
        for file, names in (
            ("transformer/diffusion_pytorch_model", weights.keys() - audio),
            ("audio/model", audio),
        ):
            tensors = {name.removeprefix("transformer."): weights[name] for name in names}
            save_file(tensors, Path(base, f"{file}.safetensors"))
        Path(f"{base}.yaml").write_text(RECIPE.format(name=base, base=base))
    video = torch.randn(1, 16, 3, 8, 8)
    sample = {"latents": video, "given": torch.randn(1, 20, 3, 8, 8)}
    sample |= {"text": torch.randn(1, 512, 32), "image": torch.randn(1, 17, 32)}
    save_file(sample, "sample.safetensors")
    Path("plain.py").write_text(PLAIN)
    words = ["prepare", str(SAMPLE), "--out", "shards", "--recipe", "tiny.yaml", "--encode"]
    subprocess.run([sys.executable, "-m", "kit", *words], check=True, stdout=subprocess.DEVNULL)


def take(command: list[str], sign: Path) -> tuple[float, float, float]:
    """Run a command: seconds until its first step, until its end, and of the processor."""
    if sign.parent.name:
        subprocess.run(["rm", "-rf", sign.parent], check=True)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    whole, after = time.time() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return sign.stat().st_mtime - began, whole, processor


if __name__ == "__main__":
    main()
