"""What making a video takes on one device, by the stage of the work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kit.batch import Batch, Conditions
from kit.guidance import branches
from kit.models.base import Denoiser
from kit.planning.batches import imagined_batch
from kit.planning.network import Excerpt, Holding, imagine_denoiser, num_bytes
from kit.planning.tally import Tally, imagining
from kit.sampling.pipeline import Remembering, TalkSampler


class Evaluation(NamedTuple):
    """What one denoising step takes.

    Attributes:
        working: most bytes, beside the weights and what is remembered.
        remembered: bytes that all steps of a chunk share.
        flops: of all branches.
    """

    working: int
    remembered: int
    flops: int


@dataclass(frozen=True)
class Weights:
    """Bytes of networks.

    Attributes:
        denoiser: with its adapter.
        gathered: of the denoiser when its blocks come one by one.
        encoders: by part.
    """

    denoiser: int
    gathered: int
    encoders: Mapping[str, int]


def weigh(denoiser: Denoiser, encoders: Mapping[str, int]) -> Weights:
    """Count the bytes of a denoiser on the meta device; two of its blocks may be there at once."""
    blocks = [sum(map(num_bytes, block.parameters())) for block in denoiser.blocks()]
    every = sum(map(num_bytes, denoiser.parameters()))
    return Weights(every, every - sum(blocks) + 2 * max(blocks), encoders)


def stages(
    sampler: TalkSampler, weights: Weights, step: Evaluation, decoding: int
) -> dict[str, int]:
    """Add up the bytes of each stage.

    Args:
        sampler: its settings count.
        weights: of the networks.
        step: of denoising.
        decoding: bytes beside the weights.
    """
    resident = weights.gathered if sampler.offload == "blocks" else weights.denoiser
    waiting = 0 if sampler.offload == "turns" else resident
    pictures = sum(weights.encoders.get(name, 0) for name in ("vae", "image_encoder"))
    words = sum(weights.encoders.get(name, 0) for name in ("text_encoder", "audio_encoder"))
    return {
        "reading text and speech": waiting + words,
        "denoising": resident + pictures + step.working + step.remembered,
        "decoding": waiting + pictures + decoding,
    }


def measure_evaluation(
    network: Callable[[], Denoiser], holding: Holding, sampler: TalkSampler, batch: Batch
) -> Evaluation:
    """Find what a denoising step takes, by computing it in a few blocks without numbers.

    Args:
        network: builds the denoiser on the meta device.
        holding: of its weights.
        sampler: its guidance and memory count.
        batch: of one; real tensors, of which only the shapes count.
    """
    denoiser = network()
    holding.apply(denoiser)
    depth, few, more = len(denoiser.blocks()), 2, 3
    with imagining(batch.conditions.audio.shape[1]) as tally, torch.no_grad():
        imagine_denoiser(denoiser.eval())
        given = imagined_batch(batch)
        if depth <= more:
            return _evaluate(denoiser, sampler, given, depth, tally)
        low, high = (_evaluate(denoiser, sampler, given, n, tally) for n in (few, more))
    return Evaluation(*(a + (depth - few) * (b - a) for a, b in zip(low, high, strict=True)))


def _evaluate(
    denoiser: Denoiser, sampler: TalkSampler, batch: Batch, num_blocks: int, tally: Tally
) -> Evaluation:
    """Evaluate all branches once, and a second time with what the first left."""
    excerpt = Excerpt(num_blocks, is_fused=True)
    asked = branches(
        batch.conditions, batch.null_text, sampler.text_scale, sampler.audio_scale
    ).values()
    rows = [Conditions.cat(list(asked))] if sampler.together else list(asked)
    remembers = sampler.remember and isinstance(denoiser, Remembering)
    predict = denoiser.remembering() if remembers else denoiser  # type: ignore[operator]
    held = tally.begin()
    for _ in range(2):
        before = tally.live
        tally.peak, tally.flops = before, 0
        for conditions in rows:
            count = len(conditions.text)
            noisy = batch.latents.expand(count, *batch.latents.shape[1:])
            velocity = predict(noisy, torch.empty(count), conditions, excerpt)
            del velocity
    return Evaluation(tally.peak - before, tally.live - held, tally.flops)
