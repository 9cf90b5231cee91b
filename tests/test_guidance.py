"""Guidance: which branches are needed, what they see, and how they are combined."""

import pytest
import torch
from safetensors.torch import load_file

from kit.batch import Conditions
from kit.draws import draw_normal
from kit.guidance import (
    Projection,
    branches,
    combine,
    combine_projected,
    drop_audio,
    drop_text,
    pad_text,
)
from kit.reference import first_frame_mask
from tests.outside import reference

NULL_TEXT = draw_normal((1, 4, 8), "null")
CONDITIONS = Conditions(
    text=draw_normal((1, 6, 8), "text"),
    image=draw_normal((1, 3, 8), "image"),
    reference=draw_normal((1, 16, 2, 4, 4), "reference"),
    reference_mask=first_frame_mask(1, 2),
    audio=draw_normal((1, 2, 5, 5, 3, 8), "audio"),
    num_speakers=torch.tensor([2]),
    speaker_masks=torch.ones(1, 2, 4, 4),
)


@pytest.mark.parametrize(
    ("text_scale", "audio_scale", "expected"),
    [
        (1.0, 1.0, {"full"}),
        (1.0, 4.0, {"full", "no_audio"}),
        (5.0, 1.0, {"full", "no_text"}),
        (5.0, 4.0, {"full", "no_text", "none"}),
        (0.0, 0.0, {"full", "no_text", "none"}),
    ],
)
def test_branches(text_scale: float, audio_scale: float, expected: set[str]) -> None:
    assert branches(CONDITIONS, NULL_TEXT, text_scale, audio_scale).keys() == expected


def test_what_each_branch_sees() -> None:
    asked = branches(CONDITIONS, NULL_TEXT, 5.0, 4.0)
    text, null_text = CONDITIONS.text, pad_text(NULL_TEXT, 6)
    assert torch.equal(asked["full"].text, text)
    assert torch.equal(asked["full"].audio, CONDITIONS.audio)
    for name in ("no_text", "none"):
        assert torch.equal(asked[name].text, null_text)
    assert torch.equal(asked["no_text"].audio, CONDITIONS.audio)
    assert not asked["none"].audio.any()
    assert all(torch.equal(branch.image, CONDITIONS.image) for branch in asked.values())


def test_silence_is_one_stream() -> None:
    silent = drop_audio(CONDITIONS)
    assert silent.num_speakers.tolist() == [1]
    assert silent.audio.shape == CONDITIONS.audio.shape
    assert not silent.audio.any()
    assert torch.equal(silent.text, CONDITIONS.text)


@pytest.mark.parametrize("length", [2, 4, 9])
def test_branches_fit_on_one_batch_axis(length: int) -> None:
    null_text = draw_normal((1, length, 8), "other")
    together = Conditions.cat(list(branches(CONDITIONS, null_text, 5.0, 4.0).values()))
    assert together.text.shape == (3, max(length, 6), 8)
    assert together.num_speakers.tolist() == [2, 2, 1]


def test_text_is_padded_with_zeros() -> None:
    dropped = drop_text(CONDITIONS, NULL_TEXT).text
    assert torch.equal(dropped[:, :4], NULL_TEXT)
    assert not dropped[:, 4:].any()
    assert torch.equal(pad_text(NULL_TEXT, 2), NULL_TEXT)


def test_formulas_on_numbers() -> None:
    full, no_text, no_audio, none = (torch.tensor([value]) for value in (8.0, 5.0, 3.0, 1.0))
    three = {"full": full, "no_text": no_text, "none": none}
    assert combine(three, 5.0, 4.0).item() == 1 + 5 * (8 - 5) + 4 * (5 - 1)
    assert combine({"full": full, "no_audio": no_audio}, 1.0, 4.0).item() == 3 + 4 * (8 - 3)
    assert combine({"full": full}, 1.0, 1.0).item() == 8


def test_combining_at_scale_one_changes_nothing() -> None:
    full, no_text, none = draw_normal((3, 2, 2), "v")
    three = {"full": full, "no_text": no_text, "none": none}
    torch.testing.assert_close(combine(three, 1.0, 1.0), full)
    torch.testing.assert_close(combine({"full": full, "no_audio": none}, 1.0, 1.0), full)


VELOCITY = draw_normal((1, 4, 2, 4, 4), "velocity")
DIFFERENCE = draw_normal((1, 4, 2, 4, 4), "difference")


def test_projected_differences_lead_aside_and_are_limited() -> None:
    projected = Projection()("text", 1000 * DIFFERENCE, VELOCITY)
    assert abs((projected * VELOCITY).sum()) < 1e-2
    assert 50 < projected.norm() <= 55
    small = 0.01 * DIFFERENCE
    parallel = (small * VELOCITY).sum() / VELOCITY.square().sum() * VELOCITY
    torch.testing.assert_close(Projection()("text", small, VELOCITY), small - parallel)


def test_projection_remembers_each_kind_by_itself() -> None:
    project, fresh = Projection(momentum=-0.5), Projection()
    first = project("text", 0.01 * DIFFERENCE, VELOCITY)
    torch.testing.assert_close(project("text", 0.01 * DIFFERENCE, VELOCITY), first / 2)
    assert torch.equal(
        project("audio", 0.01 * DIFFERENCE, VELOCITY), fresh("audio", 0.01 * DIFFERENCE, VELOCITY)
    )


@pytest.mark.parametrize(("text_scale", "audio_scale"), [(1.0, 4.0), (5.0, 1.0), (5.0, 4.0)])
def test_projected_guidance_needs_the_branches_of_plain_guidance(
    text_scale: float, audio_scale: float
) -> None:
    names = branches(CONDITIONS, NULL_TEXT, text_scale, audio_scale)
    same = dict.fromkeys(names, VELOCITY)
    combined = combine_projected(same, text_scale, audio_scale, Projection())
    torch.testing.assert_close(combined, VELOCITY)
    given = {name: draw_normal((1, 4, 2, 4, 4), name) for name in names}
    off = combine_projected(given, 1.0, 1.0, Projection())
    torch.testing.assert_close(off, given["full"])
    on = combine_projected(given, text_scale, audio_scale, Projection())
    assert not torch.allclose(on, given["full"], atol=0.1)


def test_projection_is_that_of_the_reference() -> None:
    tensors, project = load_file(reference("utils.safetensors")), Projection()
    for step in range(3):
        difference, full = tensors[f"inputs/apg.diff{step}"], tensors[f"inputs/apg.cond{step}"]
        expected = tensors[f"outputs/apg.out{step}"]
        torch.testing.assert_close(project("text", difference, full), expected)
