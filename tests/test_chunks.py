"""Chunks cover a video exactly, and end as InfiniteTalk's do."""

import pytest
import torch

from kit.sampling.chunks import Chunk, plan_chunks, show, speech_frames_needed
from kit.speech import mirror_end, speech_windows

LENGTHS = [*range(82, 90), 152, 153, 154, 155, 224, 225, 226, 300, 369, 370, 441, 997, 1000]


def reference_chunks(length: int) -> tuple[list[int], list[int]]:
    """Follow the released loop: starts of its chunks, and the speech that its last one reads.

    After a chunk, if the next one would end at or behind the speech, it is the last one, and the
    speech is continued backwards by `end - length + 3` frames.
    """
    starts, speech, is_last = [0], list(range(length)), False
    while not is_last:
        starts.append(starts[-1] + 72)
        end = starts[-1] + 81
        if end >= length:
            missing = end - length + 3
            speech, is_last = speech + speech[-missing:][::-1], True
    return starts, speech


@pytest.mark.parametrize("length", LENGTHS)
def test_ends_as_the_reference_does(length: int) -> None:
    starts, speech = reference_chunks(length)
    chunks = plan_chunks(length, 81, 9)
    assert [chunk.start for chunk in chunks] == starts
    features = torch.arange(length).float()[None, :, None, None]
    ours = mirror_end(features, speech_frames_needed(chunks))
    assert ours.flatten().tolist() == speech
    continued = torch.tensor(speech).float()[None, :, None, None]
    for start in starts:
        # The reference cuts all chunks but the last from the speech as it is.
        source = continued if start == starts[-1] else features
        assert torch.equal(speech_windows(ours, start, 81), speech_windows(source, start, 81))


@pytest.mark.parametrize(
    ("length", "count"), [(1, 1), (80, 1), (81, 1), (82, 2), (153, 2), (154, 3), (225, 3), (226, 4)]
)
def test_number_of_chunks(length: int, count: int) -> None:
    assert len(plan_chunks(length, 81, 9)) == count


@pytest.mark.parametrize(("num_frames", "context"), [(81, 9), (9, 5), (17, 1), (33, 29)])
@pytest.mark.parametrize("length", [1, 8, 9, 10, 33, 34, 100, 163])
def test_every_frame_is_shown_once(length: int, num_frames: int, context: int) -> None:
    chunks = plan_chunks(length, num_frames, context)
    shown = [
        chunk.start + chunk.num_context + i for chunk in chunks for i in range(chunk.num_shown)
    ]
    assert shown == list(range(length))
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert all(chunk.num_frames == num_frames for chunk in chunks)


def test_context_repeats_the_end_of_the_chunk_before() -> None:
    first, second, third = plan_chunks(200, 81, 9)
    assert (first.num_context, first.num_shown) == (0, 81)
    assert (second.start, second.num_context, second.num_shown) == (72, 9, 72)
    assert (third.start, third.num_context, third.num_shown) == (144, 9, 47)


def test_speech_shorter_than_a_chunk_is_mirrored_to_fill_it() -> None:
    (chunk,) = plan_chunks(30, 81, 9)
    assert (chunk.start, chunk.num_shown) == (0, 30)
    features = torch.arange(30).float()[None, :, None, None]
    speech = mirror_end(features, speech_frames_needed([chunk])).flatten().tolist()
    assert len(speech) == 84
    assert speech[29:33] == [29, 29, 28, 27]


def join(windows: list[tuple[Chunk, torch.Tensor]], crossfade_frames: int) -> torch.Tensor:
    waiting, parts = None, []
    for chunk, pixels in windows:
        fades = 0 if chunk is windows[-1][0] else crossfade_frames
        shown, waiting = show(chunk, pixels, waiting, fades)
        parts.append(shown)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("crossfade_frames", [0, 1, 8, 9])
@pytest.mark.parametrize("length", [1, 30, 33, 34, 57, 58, 100])
def test_windows_of_one_video_join_to_that_video(length: int, crossfade_frames: int) -> None:
    chunks = plan_chunks(length, 33, 9)
    video = torch.rand(3, chunks[-1].start + 33, 2, 2)
    windows = [(chunk, video[:, chunk.start : chunk.start + 33]) for chunk in chunks]
    torch.testing.assert_close(join(windows, crossfade_frames), video[:, :length])


def test_a_crossfade_spreads_a_jump_over_the_shared_frames() -> None:
    first, second = plan_chunks(57, 33, 9)
    windows = [(first, torch.zeros(3, 33, 1, 1)), (second, torch.ones(3, 33, 1, 1))]
    hard, soft = (join(windows, count)[0, :, 0, 0] for count in (0, 8))
    assert hard.diff().max() == 1 and hard[32] == 0 and hard[33] == 1
    assert soft.diff().max() < 0.12 and soft[24] == 0 and soft[33] == 1
