"""What a training step takes on one device: bytes by part, and work.

A denoiser of many equal blocks is not run as a whole: a few of them and a few more show what each
takes, forward and backward, and the rest follows on a line. What is held all the time is counted
over all of its parameters.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kit.adapters.full import Full
from kit.adapters.lora import Lora, trained_parameters
from kit.batch import Batch, Conditions
from kit.models.base import Denoiser
from kit.objectives.base import Objective
from kit.planning.batches import imagined_batch
from kit.planning.network import Excerpt, Holding, imagine_denoiser, num_bytes
from kit.planning.tally import Tally, imagining
from kit.training.optim import OptimizerSettings
from kit.training.task import total
from kit.training.trainer import Training

Network = Callable[[], Denoiser]
"""Builds a denoiser on the meta device."""


class Pass(NamedTuple):
    """What one pass through the network and back takes.

    Attributes:
        forward: most bytes on the way to the loss, beside all that is held.
        backward: most bytes on the way back, its gradients among them.
        kept: bytes that wait between the two.
        flops: of both.
    """

    forward: int
    backward: int
    kept: int
    flops: int


class Update(NamedTuple):
    """What the optimiser takes.

    Attributes:
        state: bytes that it holds.
        working: most bytes of a step beside them.
    """

    state: int
    working: int


@dataclass(frozen=True)
class Setup:
    """A fine-tuning run as far as its memory depends on it."""

    network: Network
    holding: Holding
    adapter: Lora | Full
    objective: Objective
    optimizer: OptimizerSettings
    training: Training

    def denoiser(self) -> Denoiser:
        """Build the denoiser as it trains, on the meta device."""
        denoiser = self.network()
        self.holding.apply(denoiser)
        with torch.device("meta"):
            self.adapter.inject(denoiser, seed=0)
        denoiser.checkpoint_activations(self.training.checkpoint_blocks)
        return denoiser.train()


@dataclass(frozen=True)
class Counts:
    """Parameters, and the bytes of those that are frozen and of those that train.

    Attributes:
        block: bytes of the largest block, frozen and trained.
        rest: bytes of what is in no block.
    """

    parameters: int
    trained: int
    frozen_bytes: int
    trained_bytes: int
    block: int
    rest: int


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process in the moment of a step when they are most.

    Attributes:
        device: by part; on a processor, everything.
        host: by part, what a GPU's process keeps outside of it.
        moment: when that is.
    """

    device: Mapping[str, int]
    host: Mapping[str, int]
    moment: str

    @property
    def total(self) -> int:
        """All parts on the device together."""
        return sum(self.device.values())


def count(setup: Setup) -> Counts:
    """Count the parameters of a run and what they take on one device."""
    denoiser = setup.denoiser()
    trained = trained_parameters(denoiser).values()
    frozen = [p for p in denoiser.parameters() if not p.requires_grad]
    blocks = [sum(map(num_bytes, block.parameters())) for block in denoiser.blocks()]
    every = sum(map(num_bytes, denoiser.parameters()))
    return Counts(
        parameters=sum(p.numel() for p in frozen) + sum(p.numel() for p in trained),
        trained=sum(p.numel() for p in trained),
        frozen_bytes=sum(map(num_bytes, frozen)),
        trained_bytes=sum(map(num_bytes, trained)),
        block=max(blocks),
        rest=every - sum(blocks),
    )


def step_memory(setup: Setup, counts: Counts, passed: Pass, update: Update) -> StepMemory:
    """Put together what one process holds when it holds most, once all averages exist.

    Args:
        setup: the run.
        counts: of its parameters.
        passed: of its largest batch.
        update: of its optimiser.
    """
    training = setup.training
    shares = training.world if training.is_sharded else 1
    trained = counts.trained_bytes // shares
    held = {
        "frozen weights": counts.frozen_bytes // (1 if setup.holding.is_packed else shares),
        "trained weights": trained,
        "average of them": trained,
        "optimiser": update.state // shares,
        "gradients": trained,
    }
    working, moment = _working(setup, passed, update, trained, shares)
    parts = {"activations": working}
    if training.is_sharded:
        # One block works while the next is on its way; what is in no block stays together.
        parts["gathered weights"] = 2 * counts.block + counts.rest
    host = held if training.is_offloaded else {}
    if training.has_activations_on_host:
        host = {**host, "activations": passed.kept // training.split_frames}
    if not training.uses_gpu:
        parts |= {f"{name} (offloaded)" if name in parts else name: n for name, n in host.items()}
        host = {}
    return StepMemory(parts if training.is_offloaded else {**held, **parts}, host, moment)


def _working(
    setup: Setup, passed: Pass, update: Update, trained: int, shares: int
) -> tuple[int, str]:
    """Find what is most beside all that is held, gradients included, and when.

    Gradients of the step before are there until the way back begins, and throughout where they are
    being added up. A GPU's optimiser takes all tensors at once and copies as much.
    """
    training = setup.training
    away = passed.kept if training.has_activations_on_host else 0
    own_gradients = 0 if training.accumulate > 1 else trained
    moments = {
        "forward": (passed.forward - away) // training.split_frames,
        "backward": (passed.backward - away) // training.split_frames - own_gradients,
        "the optimiser's step": update.working // shares + (trained if training.uses_gpu else 0),
        "writing the adapter": trained,
    }
    moment = max(moments, key=lambda name: moments[name])
    return moments[moment], moment


def measure_pass(setup: Setup, batch: Batch) -> Pass:
    """Find what a batch takes, by computing it in a few blocks without numbers.

    Args:
        setup: the run.
        batch: real tensors, of which only the shapes count.
    """
    period = max(setup.training.checkpoint_blocks, 1)
    few, more, depth = period + 1, 2 * period + 1, len(setup.network().blocks())
    if depth <= more:
        return measure_whole_pass(setup, batch)
    low, high = _measure_passes(setup, batch, (few, more))
    steps = (depth - few) / period
    return Pass(*(round(a + steps * (b - a)) for a, b in zip(low, high, strict=True)))


def measure_whole_pass(setup: Setup, batch: Batch) -> Pass:
    """Find the same in all blocks, which takes as much longer as there are more of them."""
    (whole,) = _measure_passes(setup, batch, (None,))
    return whole


def measure_update(setup: Setup) -> Update:
    """Find what the optimiser takes, by stepping one parameter of each shape without numbers."""
    alike = Counter(
        (tuple(p.shape), p.dtype) for p in trained_parameters(setup.denoiser()).values()
    )
    state = working = 0
    for (shape, dtype), number in alike.items():
        with imagining() as tally:
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype))
            optimizer = setup.optimizer.optimizer({"one": parameter})
            parameter.grad = torch.empty_like(parameter)
            held = tally.begin()
            optimizer.step()
            state += number * (tally.live - held)
            working = max(working, tally.peak - tally.live)
            del parameter, optimizer
    return Update(state, working)


def _measure_passes(setup: Setup, batch: Batch, depths: Sequence[int | None]) -> list[Pass]:
    """Measure passes through so many of the first blocks."""
    denoiser = setup.denoiser()
    with imagining(batch.conditions.audio.shape[1]) as tally:
        imagine_denoiser(denoiser)
        given = imagined_batch(batch)
        return [_pass(setup, denoiser, given, depth, tally) for depth in depths]


class _Excerpted(nn.Module):
    """Asks a denoiser of which only some blocks run."""

    def __init__(self, denoiser: Denoiser, excerpt: Excerpt) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.excerpt = excerpt

    def forward(self, noisy: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        velocity: Tensor = self.denoiser(noisy, sigma, conditions, self.excerpt)
        return velocity


def _pass(
    setup: Setup, denoiser: Denoiser, batch: Batch, num_blocks: int | None, tally: Tally
) -> Pass:
    excerpt = Excerpt(num_blocks, is_fused=setup.training.uses_gpu)
    network, is_mixed = _Excerpted(denoiser, excerpt), setup.training.precision == "bf16-mixed"
    held = tally.begin()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        loss = total(setup.objective.losses(network, batch, seed=0))
    forward, kept = tally.peak - held, tally.live - held
    tally.peak = tally.live
    loss.backward()  # type: ignore[no-untyped-call]
    backward = tally.peak - held
    del loss
    denoiser.zero_grad()
    return Pass(forward, backward, kept, tally.flops)
