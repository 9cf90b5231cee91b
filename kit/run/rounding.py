"""What a quantised base does otherwise than the same base in full, seen before it trains."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kit.batch import Conditions
from kit.data.module import ShardData
from kit.models.base import Base, Denoiser
from kit.models.checkpoints import assign
from kit.models.low_bits import is_quantised
from kit.objectives.base import Objective

FILE_NAME = "rounding.json"

Inputs = tuple[Tensor, Tensor, Conditions]
"""Noisy latents [B, C, F, H, W], their noise levels [B], and conditions."""


@dataclass(frozen=True)
class BlockError:
    """Error of a block's output, relative to the output in full; 0 is none.

    Attributes:
        block: its number.
        alone: given what the block in full is given.
        accumulated: given what all blocks before it made, quantised like it.
    """

    block: int
    alone: float
    accumulated: float


@dataclass(frozen=True)
class Rounding:
    """Errors of a quantised denoiser on one sample.

    Attributes:
        blocks: in order.
        velocity: error of what the denoiser predicts, relative to its prediction in full.
    """

    blocks: tuple[BlockError, ...]
    velocity: float

    @property
    def worst(self) -> BlockError:
        """The block that adds most of its own."""
        return max(self.blocks, key=lambda error: error.alone)

    def table(self) -> str:
        """Lay the errors out for reading, in percent."""
        rows = [f"{e.block:5}{e.alone:11.3%}{e.accumulated:14.3%}" for e in self.blocks]
        heading = "error of the quantised base: block, alone, accumulated"
        last = f"velocity {self.velocity:.3%}; worst block {self.worst.block}"
        return "\n".join([heading, *rows, last])


def report_rounding(
    base: Base,
    denoiser: Denoiser,
    inputs: Callable[[], Inputs],
    folder: Path,
    report: Callable[[str], None],
) -> None:
    """Measure a base's denoiser if it is quantised, print the errors and save them.

    Args:
        base: reads the blocks in full.
        denoiser: of the base, without an adapter.
        inputs: gives what to measure on.
        folder: receives `rounding.json`.
        report: told the errors, as a table.
    """
    if not is_quantised(denoiser):
        return
    given = inputs()
    found = measure_rounding(denoiser, stream_blocks(base, given[0].device), given)
    report(found.table())
    (folder / FILE_NAME).write_text(json.dumps(asdict(found), indent=2) + "\n")


@torch.no_grad()
def measure_rounding(
    denoiser: Denoiser, full_blocks: Iterable[nn.Module], inputs: Inputs
) -> Rounding:
    """Compare a quantised denoiser with its own blocks in full, of which one is needed at a time.

    Args:
        denoiser: quantised; what is not in its blocks is as in full.
        full_blocks: the same blocks in full, in order.
        inputs: of the denoiser.
    """
    quantised = denoiser(*inputs)
    compare = _Comparison(full_blocks)
    with ExitStack() as stack:
        for block in denoiser.blocks():
            stack.enter_context(block.register_forward_hook(compare, with_kwargs=True))
        full = denoiser(*inputs)
    return Rounding(tuple(compare.errors), _distance(quantised, full))


def stream_blocks(base: Base, device: torch.device) -> Iterator[nn.Module]:
    """Read a base's blocks in full one after another; each is emptied before the next one."""
    denoiser = base.empty_denoiser()
    names = {module: name for name, module in denoiser.named_modules()}
    for block in denoiser.blocks():
        own = [f"{names[block]}.{name}" for name, _ in block.named_parameters()]
        for name, value in base.parameters(own):
            assign(denoiser, name, value.to(device))
        yield block.eval()
        block.to("meta")


def first_inputs(data: ShardData, objective: Objective, seed: int, device: torch.device) -> Inputs:
    """Make what the denoiser is given for the first clip of a run, no condition dropped.

    Args:
        data: prepared for the run; its loader does not move.
        objective: mixes the noise.
        seed: of the run.
        device: where the denoiser is.
    """
    loader = data.train_dataloader()
    batch = loader.collate([loader.dataset[0, 0]])
    recorder = _Recorder()
    objective.losses(recorder, data.transfer_batch_to_device(batch, device, 0), seed)
    return recorder.inputs


class _Comparison:
    """Takes the place of each block in turn: lets it compute, and hands on what it is in full."""

    def __init__(self, full_blocks: Iterable[nn.Module]) -> None:
        self.errors: list[BlockError] = []
        self._full_blocks = iter(full_blocks)
        self._accumulated: Tensor | None = None

    def __call__(
        self, block: nn.Module, given: tuple[Tensor], context: dict[str, Any], alone: Tensor
    ) -> Tensor:
        """See a block's output; what is returned, the next block gets. [B, N, D]"""
        (tokens,) = given
        before = tokens if self._accumulated is None else self._accumulated
        # Not called like a module, which would come back here.
        self._accumulated = block.forward(before, **context)
        full: Tensor = next(self._full_blocks)(tokens, **context)
        errors = (_distance(alone, full), _distance(self._accumulated, full))
        self.errors.append(BlockError(len(self.errors), *errors))
        return full


class _Recorder(nn.Module):
    """Stands where the denoiser does and keeps what it is given."""

    inputs: Inputs

    def forward(self, noisy: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        self.inputs = noisy, sigma, conditions
        return torch.zeros_like(noisy)


def _distance(some: Tensor, full: Tensor) -> float:
    return float((some.float() - full.float()).norm() / full.float().norm())
