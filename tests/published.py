"""What a stranger can compare: small inputs, and a few numbers of what comes out.

The numbers in `reference/infinitetalk.json` are those of the public InfiniteTalk code for the tiny
base's weights under its own names; `benchmarks/infinitetalk_facts.py` asks it for them.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kit.batch import Conditions
from kit.draws import draw_normal, generator
from kit.reference import first_frame_mask

SEED = 11
FACTS = Path(__file__).parent / "reference" / "infinitetalk.json"
SAMPLES = 24
TEXT = "A woman in a red coat speaks; behind her it snows."
SPEAKERS = {"one speaker": 1, "two speakers": 2, "silence": 0}
CACHES = {"TeaCache 480p": "infinitetalk-480", "TeaCache 720p": "infinitetalk-720"}
"""What the public code calls the sizes that it has coefficients for."""


def digest(output: Tensor) -> dict[str, Any]:
    """Take a few numbers of an output: its shape, mean, spread, and values at drawn places."""
    flat = output.detach().double().flatten()
    places = torch.randint(len(flat), (SAMPLES,), generator=generator("places", len(flat)))
    return {
        "shape": list(output.shape),
        "mean": flat.mean().item(),
        "spread": flat.std().item(),
        "values": flat[places].tolist(),
    }


def facts() -> dict[str, Any]:
    """Read the public code's numbers by the names of what was computed."""
    read: dict[str, Any] = json.loads(FACTS.read_text())
    return read


def assert_agrees(output: Tensor, expected: dict[str, Any], limit: float) -> None:
    """Compare an output with what was taken of the public one; the limit is relative to spread."""
    found = digest(output)
    assert found["shape"] == expected["shape"]
    for name in ("mean", "spread", "values"):
        difference = torch.tensor(found[name]).sub(torch.tensor(expected[name])).abs().max().item()
        assert difference <= limit * expected["spread"], (name, difference, expected["spread"])


def noisy_latents() -> tuple[Tensor, Tensor]:
    """Draw what a denoiser is asked about. [1, 16, 3, 8, 8] and sigma [1]"""
    return draw_normal((1, 16, 3, 8, 8), SEED, "noisy"), torch.tensor([0.6])


def conditions(speakers: int) -> Conditions:
    """Draw what steers a denoiser; 0 speakers are one who is silent."""
    count = max(speakers, 1)
    masks = torch.zeros(1, count, 8, 8)
    for speaker in range(count):
        masks[0, speaker, 2:6, 4 * speaker : 4 * speaker + 3] = 1
    audio = draw_normal((1, count, 9, 5, 3, 32), SEED, "audio")
    return Conditions(
        text=draw_normal((1, 7, 32), SEED, "text"),
        image=draw_normal((1, 257, 32), SEED, "image"),  # the public code counts on 257
        reference=draw_normal((1, 16, 3, 8, 8), SEED, "reference"),
        reference_mask=first_frame_mask(1, 3),
        audio=audio if speakers else torch.zeros_like(audio),
        num_speakers=torch.tensor([count]),
        speaker_masks=masks,
    )


def cached_levels() -> Tensor:
    """Draw levels, near each other: drawn weights tell levels apart much better than trained ones.

    The modulation changes by 0 to 0.08 from one to the next, which is where public polynomials are
    small and where they are large. [40]
    """
    steps = torch.rand(40, generator=generator("levels", SEED))
    return 0.6 - 0.0002 * steps.cumsum(0)


def cached_noisy(step: int) -> Tensor:
    """Draw what a denoiser is asked about in a step. [1, 16, 3, 8, 8]"""
    return draw_normal((1, 16, 3, 8, 8), SEED, "noisy", step)


def cached_branches() -> dict[str, Conditions]:
    """Draw the branches of guidance, in the public order."""
    given = conditions(1)
    other = replace(given, text=draw_normal((1, 3, 32), SEED, "null text"))
    silent = replace(other, audio=torch.zeros_like(given.audio))
    return {"full": given, "no_text": other, "none": silent}


def video() -> Tensor:
    """Draw a video. [1, 3, 9, 32, 48]"""
    return draw_normal((1, 3, 9, 32, 48), SEED, "video").clamp(-1, 1)


def latents() -> Tensor:
    """Draw latents to decode. [1, 16, 3, 4, 6]"""
    return draw_normal((1, 16, 3, 4, 6), SEED, "latents")


def picture() -> Tensor:
    """Draw a picture. [1, 3, 40, 32]"""
    return draw_normal((1, 3, 40, 32), SEED, "picture").clamp(-1, 1)


def speech() -> Tensor:
    """Draw a second of sound. [1, 16000]"""
    return 0.1 * draw_normal((1, 16_000), SEED, "speech")
