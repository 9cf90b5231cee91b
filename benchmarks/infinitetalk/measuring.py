"""Seconds and memory of one side, in a process of its own."""

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MB = 1e6

Prepare = Callable[[], Callable[[], Tensor]]
"""Loads a side and makes its step."""


@dataclass(frozen=True)
class Measured:
    """What a process took.

    Attributes:
        seconds: of the processor, for each step.
        loaded: memory of the process with everything loaded, before the first step, in MB.
        peak: largest memory that the steps needed beyond it, in MB.
        velocity: what the last step gave. [1, C, F, H, W]
    """

    seconds: tuple[float, ...]
    loaded: float
    peak: float
    velocity: np.ndarray


def measure(prepare: Prepare, num_steps: int) -> Measured:
    """Fork, load, take some steps, and report."""
    context = get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, prepare, num_steps))
    process.start()
    there.close()
    try:
        measured: Measured = here.recv()
    finally:
        process.join()
    return measured


def _work(pipe: Connection, prepare: Prepare, num_steps: int) -> None:
    seconds = []
    with torch.no_grad():
        step = prepare()
        _forget_peak()
        loaded = _memory("VmRSS")
        for _ in range(num_steps):
            started = time.process_time()
            velocity = step()
            seconds.append(time.process_time() - started)
    peak = _memory("VmHWM") - loaded
    pipe.send(Measured(tuple(seconds), loaded, peak, velocity.numpy()))


def _forget_peak() -> None:
    """Return free memory to the system, and let the peak begin at what is left."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _memory(kind: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line for line in lines if line.startswith(kind)).split()[1]
    return int(kilobytes) * 1024 / MB
