"""Train without some conditions, so that guidance has a branch without them."""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kit.batch import Batch, Conditions
from kit.draws import draw_uniform
from kit.guidance import drop_audio, drop_image, drop_reference, drop_text, pad_text

Share = Annotated[float, Field(ge=0, le=1)]


class ConditionDropout:
    """Drops conditions of each sample on its own, each with its own probability.

    Args:
        text: share of samples that see the negative text instead of their caption.
        audio: share that see one silent stream instead of their speech.
        image: share whose image features are zero.
        reference: share without a reference frame: zero latents, and the mask says so.

    The one clean frame of a first chunk is its reference too, so both go, with its image
    features: such a sample trains video from text and speech alone. A still picture is its own
    reference, so it always trains without it and its image features: it would only learn to copy.

    Source: shares of public InfiniteTalk trainers; InfiniteTalk's guidance drops text and audio.
    """

    def __init__(
        self,
        *,
        text: Share = 0.1,
        audio: Share = 0.1,
        image: Share = 0.1,
        reference: Share = 0.05,
    ) -> None:
        self.shares = {"text": text, "audio": audio, "image": image, "reference": reference}

    def drop(self, batch: Batch, seed: int) -> Batch:
        """Drop conditions of a batch, decided by (seed, epoch, sample)."""
        dropped = {name: self._draw(name, batch, seed) for name in self.shares}
        if batch.latents.shape[2] == 1:
            dropped["reference"] = dropped["image"] = torch.ones_like(dropped["reference"])
        is_bare = dropped["reference"] & (batch.num_context == 1)
        dropped["image"] |= is_bare
        conditions = _same_length(batch.conditions, batch.null_text)
        without = {
            "text": drop_text(conditions, batch.null_text),
            "audio": drop_audio(conditions),
            "image": drop_image(conditions),
            "reference": drop_reference(conditions),
        }
        for name, fields in _FIELDS.items():
            changed = {
                field: _choose(
                    dropped[name], getattr(without[name], field), getattr(conditions, field)
                )
                for field in fields
            }
            conditions = replace(conditions, **changed)
        num_context = batch.num_context.masked_fill(is_bare, 0)
        return replace(batch, conditions=conditions, num_context=num_context)

    def _draw(self, name: str, batch: Batch, seed: int) -> Tensor:
        share = self.shares[name]
        draws = [draw_uniform(seed, *d, "drop", name) < share for d in batch.draws.tolist()]
        return torch.tensor(draws, device=batch.latents.device)


_FIELDS = {
    "text": ("text",),
    "audio": ("audio", "num_speakers"),
    "image": ("image",),
    "reference": ("reference", "reference_mask"),
}


def _same_length(conditions: Conditions, null_text: Tensor) -> Conditions:
    return replace(conditions, text=pad_text(conditions.text, null_text.shape[1]))


def _choose(dropped: Tensor, without: Tensor, present: Tensor) -> Tensor:
    return torch.where(dropped.view(-1, *[1] * (present.ndim - 1)), without, present)
