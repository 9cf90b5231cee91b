"""Memory that `kit plan` predicts against what `kit fit` takes, on a CPU.

    python benchmarks/plan.py          # five recipes, five minutes on one free core

Each recipe trains three steps of a base with drawn weights, 78.6 M parameters, on batches of two
clips of 720 video tokens. What is measured is the largest resident memory of a fresh process, less
what it had after a run of the tiny base had imported and compiled everything. Memory is asked from
the system in pieces of 1 MiB or more (`MALLOC_MMAP_THRESHOLD_`), so that what is freed is free:
glibc by itself keeps it, and takes up to twice as much, in three quarters of the time.
`benchmarks/plan.json` has the numbers.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "infinitetalk"))

import numpy as np
from measuring import forget_peak, peak_memory

from kit.data.media import VideoWriter
from kit.draws import draw_normal
from kit.run.fit import fit
from kit.run.plan import plan
from kit.run.prepare import prepare
from kit.run.recipes import FIT, read_as

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_suffix(".json")
RECIPE = str(ROOT / "tests" / "recipes" / "tiny.yaml")
TINY = ROOT / "data" / "tiny_base"
SIZE, SECONDS, FRAMES = 192, 1, 17
WIDTHS = {
    "num_attention_heads": 6, "attention_head_dim": 128, "freq_dim": 256, "ffn_dim": 3072,
    "num_layers": 6, "added_kv_proj_dim": 768,
}  # fmt: skip
AUDIO = {"output_dim": 256, "intermediate_dim": 64}
COMMON = [
    f"buckets={SIZE}x{SIZE}", f"data.window_frames={FRAMES}", "data.windows_per_clip=1",
    "data.context_frames=5", "data.num_workers=0", "data.batch_size=2", "trainer.max_steps=3",
    "preview=null", "optimizer.warmup_steps=0",
]  # fmt: skip
MIXED = ["base.dtype=bfloat16", "trainer.precision=bf16-mixed"]
CASES = {
    "lora, float32": ["trainer.checkpoint_blocks=0"],
    "lora, float32, all blocks recomputed": ["trainer.checkpoint_blocks=1"],
    "lora, bf16-mixed": [*MIXED, "trainer.checkpoint_blocks=0"],
    "lora on nf4, every second block recomputed": [
        *MIXED, "base.quantise=nf4", "trainer.checkpoint_blocks=2",
    ],
    "everything, float32, all blocks recomputed": [
        "adapter.type=full", "trainer.checkpoint_blocks=1",
    ],
}  # fmt: skip
WHOLE_PIECES = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}


def main() -> None:
    """Measure all cases, or one in this process, and print a table."""
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
        return
    results = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        draw_base(folder / "base")
        draw_clips(folder / "media")
        print(f"{'recipe':46}{'predicted MB':>14}{'measured MB':>13}{'ratio':>7}")
        for case in CASES:
            command = [sys.executable, __file__, case, place]
            environment = os.environ | WHOLE_PIECES
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            found["ratio"] = found["predicted"] / found["measured"]
            results[case] = found
            print(
                f"{case:46}{found['predicted']:14.0f}{found['measured']:13.0f}{found['ratio']:7.2f}"
            )
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def draw_base(folder: Path) -> None:
    """Write the configurations of a wider and deeper tiny base."""
    shutil.copytree(TINY, folder)
    for part, sizes in (("transformer", WIDTHS), ("audio", AUDIO)):
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | sizes))


def draw_clips(folder: Path) -> None:
    """Write two short videos with speech."""
    folder.mkdir()
    for number, name in enumerate(("ann", "bob")):
        shape = (1, SIZE, SIZE, 3)
        picture = (255 * np.random.default_rng(number).random(shape)).astype(np.uint8)
        speech = 0.1 * draw_normal((SECONDS * 16_000,), number, "speech")
        file = folder / f"{name}.mp4"
        with VideoWriter(file, fps=25, height=SIZE, width=SIZE, speech=speech) as writer:
            writer.write(picture.repeat(25 * SECONDS, 0))
        (folder / f"{name}.txt").write_text(f"{name} speaks")


def measure(case: str, folder: Path) -> dict[str, float]:
    """Train the tiny base, then the case, and predict it."""
    os.chdir(tempfile.mkdtemp(dir=folder))
    small = encoded(case, TINY, folder / "media", Path("small"))
    large = encoded(case, folder / "base", folder / "media", Path("large"))
    # Rows of the tiny base are too short for four bits.
    fit(RECIPE, [*(w for w in small if "quantise" not in w), "name=small"], silent)
    before = forget_peak()
    fit(RECIPE, [*large, "name=large"], silent)
    measured = peak_memory() - before
    plan(RECIPE, [*large, "name=planned"], silent, rate=1.0, out=Path("plan.json"))
    predicted = json.loads(Path("plan.json").read_text())["peak"] / 1e6
    return {"predicted": predicted, "measured": measured}


def encoded(case: str, base: Path, media: Path, out: Path) -> list[str]:
    """Prepare and encode the clips with a base; gives the overrides of a run on them."""
    words = [word for word in CASES[case] if not word.startswith("base.quantise=")]
    words += [*COMMON, f"base.path={base}", f"data.path={out.absolute()}"]
    if not any(word.startswith("base.dtype=") for word in words):
        words.append("base.dtype=float32")
    recipe = Path(f"{out}.yaml")
    recipe.write_text(read_as(RECIPE, words, FIT).text)
    prepare(
        media, out, recipe=str(recipe), encode=True, window=None, buckets=None, clip_seconds=15,
        sequence_fps=25, overwrite=True, report=silent,
    )  # fmt: skip
    return [*words, *(word for word in CASES[case] if word not in words)]


def silent(line: str) -> None:
    """Tell nobody."""


if __name__ == "__main__":
    main()
