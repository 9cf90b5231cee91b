"""Peak memory of `kit sample` at 3, 30 and 100 chunks: it must not grow with the video.

    python benchmarks/length.py

Each video is made in a process of its own with the quickstart's base.
"""

import os
import sys
import tempfile
from pathlib import Path

from kit.data.media import encode_wav
from kit.draws import draw_normal

CHUNK_FRAMES, CONTEXT_FRAMES = 33, 9
RECIPE = "recipes/quickstart_talk.yaml"


def main() -> None:
    """Make short and long videos and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        megabytes = {chunks: peak_memory(chunks, Path(folder)) for chunks in (3, 30, 100)}
    for chunks, memory in megabytes.items():
        print(f"{chunks:4} chunks {memory:6} MB, ratio {memory / megabytes[3]:.3f}")


def peak_memory(chunks: int, folder: Path) -> int:
    """Make a video of so many chunks and give the largest memory of its process, in MB."""
    frames = CHUNK_FRAMES + (chunks - 1) * (CHUNK_FRAMES - CONTEXT_FRAMES)
    audio, out = folder / f"{chunks}.wav", folder / f"{chunks}.mp4"
    audio.write_bytes(encode_wav(0.1 * draw_normal((1, frames * 640), chunks, "speech")))
    words = ["adapter=null", f"audio={audio}", f"out={out}", "sampling.steps=2"]
    arguments = [sys.executable, "-m", "kit", "sample", RECIPE, *words]
    process = os.spawnv(os.P_NOWAIT, sys.executable, arguments)
    _, status, usage = os.wait4(process, 0)
    assert status == 0
    return usage.ru_maxrss // 1024


if __name__ == "__main__":
    main()
