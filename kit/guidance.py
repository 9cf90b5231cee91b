"""Classifier-free guidance over text and audio.

Branches: `full` has text and audio, `no_text` the negative text and audio, `no_audio` text and
silent audio, `none` the negative text and silent audio.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kit.batch import Conditions

Combine = Callable[[Mapping[str, Tensor], float, float], Tensor]
"""(velocities of `branches`, text scale, audio scale) -> velocity."""


def drop_text(conditions: Conditions, null_text: Tensor) -> Conditions:
    """Put the negative prompt's states in the place of the text. null_text: [B, L, D]."""
    return replace(conditions, text=pad_text(null_text, conditions.text.shape[1]))


def pad_text(text: Tensor, length: int) -> Tensor:
    """Append zero rows up to a length; longer text stays as it is. [B, L, D]."""
    missing = max(length - text.shape[1], 0)
    return torch.nn.functional.pad(text, (0, 0, 0, missing))


def drop_audio(conditions: Conditions) -> Conditions:
    """Put one silent stream in the place of all speakers.

    Zero features are not a zero condition: the audio projector has biases.

    Source: InfiniteTalk runs its branches without audio on a single zero stream.
    """
    return replace(
        conditions,
        audio=torch.zeros_like(conditions.audio),
        num_speakers=torch.ones_like(conditions.num_speakers),
    )


def drop_image(conditions: Conditions) -> Conditions:
    """Put zeros in the place of the reference frame's image features."""
    return replace(conditions, image=torch.zeros_like(conditions.image))


def drop_reference(conditions: Conditions) -> Conditions:
    """Take the reference frame away; the mask says that it is gone."""
    return replace(
        conditions,
        reference=torch.zeros_like(conditions.reference),
        reference_mask=torch.zeros_like(conditions.reference_mask),
    )


def branches(
    conditions: Conditions, null_text: Tensor, text_scale: float, audio_scale: float
) -> dict[str, Conditions]:
    """Name the evaluations that these scales need: one, two or three; a scale of 1 costs none.

    Args:
        conditions: the full conditions.
        null_text: states of the negative prompt. [B, L, D]
        text_scale: how far to go from the negative prompt to the text; 1 is off.
        audio_scale: how far to go from silence to the audio; 1 is off.
    """
    length = max(conditions.text.shape[1], null_text.shape[1])
    full = replace(conditions, text=pad_text(conditions.text, length))
    chosen = {"full": full}
    if _is_off(text_scale):
        if not _is_off(audio_scale):
            chosen["no_audio"] = drop_audio(full)
        return chosen
    chosen["no_text"] = drop_text(full, null_text)
    if not _is_off(audio_scale):
        chosen["none"] = drop_audio(chosen["no_text"])
    return chosen


def combine(velocities: Mapping[str, Tensor], text_scale: float, audio_scale: float) -> Tensor:
    """Combine the velocities of `branches` into one.

    Source: InfiniteTalk: v = u + gt (c - dt) + ga (dt - u), and v = da + ga (c - da) where the
    text scale is 1; c full, dt no_text, da no_audio, u none, which cancels at audio scale 1.
    """
    full = velocities["full"]
    if "none" in velocities:
        no_text, none = velocities["no_text"], velocities["none"]
        return none + text_scale * (full - no_text) + audio_scale * (no_text - none)
    if "no_text" in velocities:
        no_text = velocities["no_text"]
        return no_text + text_scale * (full - no_text)
    if "no_audio" in velocities:
        no_audio = velocities["no_audio"]
        return no_audio + audio_scale * (full - no_audio)
    return full


def combine_projected(
    velocities: Mapping[str, Tensor], text_scale: float, audio_scale: float, project: "Projection"
) -> Tensor:
    """Combine the velocities of `branches`, keeping of each difference what leads aside.

    Args:
        velocities: as for `combine`.
        text_scale: as for `combine`.
        audio_scale: as for `combine`.
        project: of this chunk; it remembers earlier steps.

    Source: adaptive projected guidance (Sadat et al. 2024) as InfiniteTalk uses it:
    v = c + (gt - 1) p(c - dt) + (ga - 1) p(dt - u), and v = c + (ga - 1) p(c - da).
    """
    full = velocities["full"]
    without_text = velocities.get("no_text", full)
    without_audio = velocities.get("none", velocities.get("no_audio", without_text))
    text = project("text", full - without_text, full)
    audio = project("audio", without_text - without_audio, full)
    return full + (text_scale - 1) * text + (audio_scale - 1) * audio


class Projection:
    """The part of guidance that is orthogonal to the prediction, over the steps of one chunk.

    What is parallel to it only makes the picture glaring.

    Args:
        momentum: share of the earlier differences that is added; negative pushes away from them.
        threshold: largest norm of a difference over a whole video.
        eta: share of the parallel part that is kept all the same.

    Source: Sadat et al. 2024; the numbers are InfiniteTalk's.
    """

    def __init__(self, momentum: float = -0.75, threshold: float = 55.0, eta: float = 0.0) -> None:
        self.momentum = momentum
        self.threshold = threshold
        self.eta = eta
        self._running: dict[str, Tensor] = {}

    def __call__(self, kind: str, difference: Tensor, full: Tensor) -> Tensor:
        """Project a difference of one kind; each call is a step. [1, C, F, H, W]"""
        running = difference + self.momentum * self._running.get(kind, torch.zeros(()).to(full))
        self._running[kind] = running
        limited = running * (self.threshold / running.norm()).clamp(max=1)
        direction = full.double() / full.double().norm()
        along = (limited.double() * direction).sum() * direction
        kept: Tensor = limited.double() - (1 - self.eta) * along
        return kept.to(full.dtype)


def combine_plainly() -> Combine:
    """Make `combine` for a chunk."""
    return combine


def combine_by_projection() -> Combine:
    """Make `combine_projected` for a chunk, with nothing to remember yet."""
    return partial(combine_projected, project=Projection())


GUIDANCES: dict[str, Callable[[], Combine]] = {
    "plain": combine_plainly,
    "projected": combine_by_projection,
}
"""How the branches of a chunk are combined."""


def _is_off(scale: float) -> bool:
    return math.isclose(scale, 1.0)
