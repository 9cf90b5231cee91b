"""Several processes as torchrun would start them.

They are forked from a process that has imported what they need and computed nothing yet: a fork of
one in which torch has computed may hang.
"""

import os
import queue
import socket
import traceback
from collections.abc import Callable
from io import BytesIO
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import distributed

LIMIT_SECONDS = 240.0
PRELOADED = ["kit.run.fit", "kit.run.sample", "tests.processes"]


def run_together(world: int, work: Callable[..., Any], *given: object) -> list[Any]:
    """Run `work(*given)` in several processes that know each other.

    Args:
        world: how many.
        work: what all of them do, a function of a module; results and arguments are plain values
            or tensors.
        given: its arguments.

    Returns:
        What each process gave, by its number.
    """
    processes, results = start_together(world, work, *given)
    try:
        found = dict(results.get(timeout=LIMIT_SECONDS) for _ in processes)
    except queue.Empty:
        raise TimeoutError(f"{world} processes gave no results") from None
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    done = {rank: torch.load(BytesIO(packed), weights_only=True) for rank, packed in found.items()}
    for rank in range(world):
        if "error" in done[rank]:
            raise AssertionError(f"process {rank}:\n{done[rank]['error']}")
    return [done[rank]["result"] for rank in range(world)]


def start_together(
    world: int, work: Callable[..., Any], *given: object
) -> tuple[list[BaseProcess], Any]:
    """Start what `run_together` runs.

    Returns:
        The processes by number, and the queue that gets what each of them gives.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results = context.Queue()
    processes = [
        context.Process(target=_enter, args=(rank, world, port, results, Path.cwd(), work, given))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return list(processes), results


def _enter(
    rank: int,
    world: int,
    port: int,
    results: Any,
    folder: Path,
    work: Callable[..., Any],
    given: Any,
) -> None:
    os.chdir(folder)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        GROUP_RANK="0",
        GROUP_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
    )
    torch.set_num_threads(1)
    try:
        done = {"result": work(*given)}
    except BaseException:  # also SystemExit, which would leave the others waiting
        done = {"error": traceback.format_exc()}
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    # Tensors as such would be shared memory, which is gone with this process.
    packed = BytesIO()
    torch.save(done, packed)
    results.put((rank, packed.getvalue()))
