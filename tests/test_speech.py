"""Speech features around video frames, and their continuation behind the end."""

import pytest
import torch
from torch import Tensor

from kit.speech import mirror_end, speech_windows


def numbered(num_frames: int, num_speakers: int = 1) -> Tensor:
    """Features that are their own frame numbers; those of the second speaker are 100 more."""
    frames = torch.arange(num_frames).float() + 100 * torch.arange(num_speakers)[:, None]
    return frames[..., None, None]  # [S, T, 1, 1]


def listed(features: Tensor) -> list[float]:
    return [float(value) for value in features.flatten()]


def test_each_frame_sees_two_on_either_side() -> None:
    windows = speech_windows(numbered(20, 2), start=5, num_frames=9)
    assert windows.shape == (2, 9, 5, 1, 1)
    for frame in range(9):
        assert listed(windows[0, frame]) == [frame + 3 + i for i in range(5)]
        assert listed(windows[1, frame]) == [frame + 103 + i for i in range(5)]


def test_windows_repeat_the_ends() -> None:
    windows = speech_windows(numbered(6), start=0, num_frames=8)
    assert listed(windows[0, 0]) == [0, 0, 0, 1, 2]
    assert listed(windows[0, 1]) == [0, 0, 1, 2, 3]
    assert listed(windows[0, 5]) == [3, 4, 5, 5, 5]
    assert listed(windows[0, 7]) == [5, 5, 5, 5, 5]


@pytest.mark.parametrize(
    ("length", "expected"),
    [(3, [0, 1, 2]), (4, [0, 1, 2, 2]), (6, [0, 1, 2, 2, 1, 0]), (8, [0, 1, 2, 2, 1, 0, 0, 1])],
)
def test_the_end_is_mirrored(length: int, expected: list[float]) -> None:
    assert listed(mirror_end(numbered(3), length)) == expected


def test_speakers_are_mirrored_alike() -> None:
    assert listed(mirror_end(numbered(2, 2), 3)) == [0, 1, 1, 100, 101, 101]
