"""Dropped conditions: how often, for whom, and what stands in their place."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kit.batch import Batch
from kit.guidance import pad_text
from kit.training.dropout import ConditionDropout

NEVER = {"text": 0.0, "audio": 0.0, "image": 0.0, "reference": 0.0}


def repeated(batch: Batch, count: int) -> Batch:
    """Take the first sample again and again, as of other epochs."""
    conditions = replace(
        batch.conditions,
        **{
            name: value[:1].expand(count, *value.shape[1:])
            for name, value in vars(batch.conditions).items()
        },
    )
    return replace(
        batch,
        draws=torch.tensor([(epoch, 0) for epoch in range(count)]),
        latents=batch.latents[:1].expand(count, *batch.latents.shape[1:]),
        conditions=conditions,
        null_text=batch.null_text[:1].expand(count, *batch.null_text.shape[1:]),
        num_context=batch.num_context[:1].expand(count),
    )


def changed_samples(before: Batch, after: Batch, name: str) -> Tensor:
    old, new = getattr(before.conditions, name), getattr(after.conditions, name)
    changed: Tensor = (old != new).reshape(len(old), -1).any(dim=1)
    return changed


def test_without_shares_nothing_changes(batch: Batch) -> None:
    kept = ConditionDropout(**NEVER).drop(batch, seed=0)
    for name, value in vars(batch.conditions).items():
        assert torch.equal(getattr(kept.conditions, name), value)


@pytest.mark.parametrize("name", ["text", "audio", "image", "reference"])
def test_a_share_drops_its_condition_alone(batch: Batch, name: str) -> None:
    dropped = ConditionDropout(**{**NEVER, name: 1.0}).drop(batch, seed=0)
    affected = {
        other for other in vars(batch.conditions) if changed_samples(batch, dropped, other).any()
    }
    # The first sample is a first chunk: without its reference it has no image features either.
    also = {"audio": {"num_speakers"}, "reference": {"reference_mask", "image"}}
    assert affected == {name} | also.get(name, set())
    image = changed_samples(batch, dropped, "image")
    assert image.tolist() == {"image": [True] * 3, "reference": [True, False, False]}.get(
        name, [False] * 3
    )


def test_what_stands_in_the_place(batch: Batch) -> None:
    dropped = ConditionDropout(text=1, audio=1, image=1, reference=1).drop(batch, 0).conditions
    assert torch.equal(dropped.text, pad_text(batch.null_text, dropped.text.shape[1]))
    assert dropped.num_speakers.tolist() == [1, 1, 1]
    for value in (dropped.audio, dropped.image, dropped.reference, dropped.reference_mask):
        assert not value.any()


def test_shares_and_independence(batch: Batch) -> None:
    many = repeated(batch, 1000)
    dropout = ConditionDropout(text=0.1, audio=0.3, image=0.2, reference=0.05)
    after = dropout.drop(many, seed=0)
    changed = {name: changed_samples(many, after, name).float() for name in dropout.shares}
    for name, share in dropout.shares.items():
        assert changed[name].mean() == pytest.approx(share, abs=0.04)
    both = (changed["audio"] * changed["image"]).mean()
    assert both == pytest.approx(0.06, abs=0.03)


def test_decisions_depend_on_seed_and_sample_alone(batch: Batch) -> None:
    many, dropout = repeated(batch, 100), ConditionDropout(**{**NEVER, "audio": 0.5})
    first = changed_samples(many, dropout.drop(many, seed=0), "audio")
    assert torch.equal(changed_samples(many, dropout.drop(many, seed=0), "audio"), first)
    assert not torch.equal(changed_samples(many, dropout.drop(many, seed=1), "audio"), first)
    half = repeated(batch, 50)
    assert torch.equal(changed_samples(half, dropout.drop(half, seed=0), "audio"), first[:50])


def test_a_still_never_sees_itself(batch: Batch) -> None:
    conditions = replace(
        batch.conditions,
        reference=batch.conditions.reference[:, :, :1],
        reference_mask=batch.conditions.reference_mask[:, :, :1],
    )
    still = replace(batch, latents=batch.latents[:, :, :1], conditions=conditions)
    seen = ConditionDropout(**NEVER).drop(still, seed=0).conditions
    assert not seen.reference.any()
    assert not seen.reference_mask.any()
    assert not seen.image.any()
    assert torch.equal(seen.audio, batch.conditions.audio)


def test_a_first_chunk_without_reference_has_no_clean_frame(batch: Batch) -> None:
    assert batch.num_context.tolist() == [1, 2, 2]
    dropped = ConditionDropout(**{**NEVER, "reference": 1.0}).drop(batch, seed=0)
    assert dropped.num_context.tolist() == [0, 2, 2]
