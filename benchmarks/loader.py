"""Samples per second of the loader, raw and encoded, with 0, 1 and 2 workers.

    python benchmarks/loader.py runs/quickstart/shards

The two kinds are read in turn, three times, and the median is printed; raw samples are decoded but
not encoded. `data/README.md` tells what they hold.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from kit.data.module import ShardData

BATCHES = 60
ROUNDS = 3


def main() -> None:
    """Read the folder's raw and encoded shards and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="raw shards with an `encoded` folder inside")
    folder = parser.parse_args().folder
    print(f"{'workers':>8} {'raw':>10} {'encoded':>10} {'ratio':>7}   samples/s")
    with tempfile.TemporaryDirectory() as alone:
        # Encoded shards inside a folder win over its raw ones, so the raw ones are linked apart.
        for path in (*folder.glob("*.tar"), folder / "index.json"):
            (Path(alone) / path.name).symlink_to(path.absolute())
        for workers in (0, 1, 2):
            print_row(Path(alone), folder / "encoded", workers)


def print_row(raw: Path, encoded: Path, workers: int) -> None:
    """Read both kinds in turn and print the medians."""
    rounds = [(rate(raw, workers), rate(encoded, workers)) for _ in range(ROUNDS)]
    slow, fast = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"{workers:>8} {slow:>10.1f} {fast:>10.1f} {fast / slow:>7.1f}")


def rate(folder: Path, workers: int) -> float:
    """Read some batches and give samples per second, the start of the workers left out."""
    data = ShardData(
        4,
        8,
        25,
        None,
        path=str(folder),
        batch_size=2,
        window_frames=33,
        windows_per_clip=3,
        references_per_window=1,
        num_workers=workers,
    )
    data.prepare_run(None, seed=0, num_batches=BATCHES + 1, place=(0, 1))
    batches = iter(data.train_dataloader())
    next(batches)
    started = time.perf_counter()
    samples = sum(2 for _ in batches)
    return samples / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
