"""What the studio's video codec alone leaves of drawn truth: the ceiling of everything else.

Run: python benchmarks/studio/codec.py
Drawn videos are encoded and decoded in chunks that share frames, as the sampler joins them.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence

import numpy as np
import torch
from filming import Film, Studio, open_studio
from scenes import known, takes
from torch import Tensor

from kit.data.encode import to_video
from kit.metrics.drift import seam_ratio
from kit.metrics.identity import color_identity
from kit.metrics.mouth import opening_by_color
from kit.metrics.report import Known
from kit.metrics.sync import lip_sync, speech_envelope
from kit.sampling.chunks import show
from kit.sampling.frames import to_pictures
from kit.studio.drawing import paint_frames
from kit.studio.mouth import FPS

NUM_FRAMES = 81
GUEST = "mika"


def main(words: Sequence[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure the studio's video codec alone.")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("overrides", nargs="*", help="of recipes/studio/talk.yaml")
    options = parser.parse_args(words)
    studio = open_studio(tuple(options.overrides))
    rows = [measure(studio, index) for index in range(options.clips)]
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"{name:<24}{statistics.mean(values):8.3f}  ({statistics.pstdev(values):.3f})")


def measure(studio: Studio, index: int) -> dict[str, float]:
    """Compare one drawn video, and one of the guest, with what the codec makes of them."""
    take = list(takes(("one",), index + 1, NUM_FRAMES))[-1]
    truth = torch.from_numpy(np.stack(list(paint_frames(take.scene))))
    hard, soft = (through_codec(studio, truth, fades) for fades in (0, 8))
    envelope, facts = speech_envelope(take.tracks[0], FPS, NUM_FRAMES), known(take, 0)
    guest = list(takes(("one",), index + 1, NUM_FRAMES, guest=GUEST))[-1]
    drawn = torch.from_numpy(np.stack(list(paint_frames(guest.scene))))
    colors = known(guest, 0, colors=("hair", "eyes", "clothes"))
    return {
        "sync r, drawn": lip_sync(_opening(truth, facts), envelope).r,
        "sync r, codec": lip_sync(_opening(soft.frames, facts), envelope).r,
        "mean error, of 255": (soft.frames.float() - truth.float()).abs().mean().item(),
        "seams, hard": seam_ratio(hard.frames, hard.chunk_starts[1:]) or float("nan"),
        "seams, crossfaded": seam_ratio(soft.frames, soft.chunk_starts[1:]) or float("nan"),
        "guest's colours, drawn": _distance(drawn, colors),
        "guest's colours, codec": _distance(through_codec(studio, drawn, 8).frames, colors),
    }


def through_codec(studio: Studio, frames: Tensor, crossfade_frames: int) -> Film:
    """Encode and decode in chunks. uint8 [T, height, width, 3]"""
    chunks, waiting, made = studio.sampler.plan(len(frames)), None, []
    for chunk in chunks:
        numbers = torch.arange(chunk.start, chunk.start + chunk.num_frames).clamp(
            max=len(frames) - 1
        )
        pixels = to_video(frames[numbers].numpy())[None]
        decoded = studio.encoders.decode_video(studio.encoders.encode_video(pixels))[0]
        fades = 0 if chunk is chunks[-1] else crossfade_frames
        shown, waiting = show(chunk, decoded, waiting, fades)
        made.append(to_pictures(shown.transpose(0, 1)))
    return Film(torch.from_numpy(np.concatenate(made)), [c.first_shown for c in chunks])


def _opening(frames: Tensor, facts: Known) -> Tensor:
    assert facts.mouth_color is not None
    return opening_by_color(frames, facts.region, facts.mouth_color)


def _distance(frames: Tensor, facts: Known) -> float:
    assert facts.reference is not None
    return color_identity(frames, facts.reference, facts.colors).distance.mean().item()


if __name__ == "__main__":
    main(sys.argv[1:])
