"""Seconds and memory of one side, in a process of its own."""

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

MB = 1e6

Result = TypeVar("Result")

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
    return in_its_own_process(partial(_work, prepare, num_steps))


def in_its_own_process(work: Callable[[], Result]) -> Result:
    """Fork, work, and send back what came of it."""
    context = get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=lambda: there.send(work()))
    process.start()
    there.close()
    try:
        result: Result = here.recv()
    finally:
        process.join()
    return result


def _work(prepare: Prepare, num_steps: int) -> Measured:
    seconds = []
    with torch.no_grad():
        step = prepare()
        loaded = forget_peak()
        for _ in range(num_steps):
            started = time.process_time()
            velocity = step()
            seconds.append(time.process_time() - started)
    return Measured(tuple(seconds), loaded, peak_memory() - loaded, velocity.numpy())


def forget_peak() -> float:
    """Return free memory to the system, let the peak begin at what is left, and say how much."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def peak_memory() -> float:
    """Say how much memory the process had at most since `forget_peak`, in MB."""
    return _memory("VmHWM")


def _memory(kind: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line for line in lines if line.startswith(kind)).split()[1]
    return int(kilobytes) * 1024 / MB
