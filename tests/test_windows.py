"""Which frames a sample shows: windows, reference frames, context."""

from collections import Counter

import pytest

from kit.data.windows import ReferenceStrategy, Window, WindowPlan, choose, plan_windows

STRATEGIES: list[ReferenceStrategy] = ["first", "m0", "m1", "m2", "m3"]


def make_plan(references: ReferenceStrategy, **sizes: int) -> WindowPlan:
    values = {"window_frames": 81, "windows_per_clip": 4, "references_per_window": 3, **sizes}
    return WindowPlan(references=references, **values)


def candidates(references: ReferenceStrategy, num_frames: int = 600) -> list[tuple[Window, int]]:
    """Pair windows with their reference frames, over many clips."""
    plan = make_plan(references)
    return [
        (window, frame)
        for clip in range(30)
        for window in plan_windows(f"clip{clip}", num_frames, plan)
        for frame in window.references[1:]
    ]


@pytest.mark.parametrize(
    ("num_frames", "starts"),
    [(81, [0]), (82, [0, 1]), (84, [0, 1, 2, 3]), (381, [0, 100, 200, 300])],
)
def test_windows_are_spread_evenly(num_frames: int, starts: list[int]) -> None:
    windows = plan_windows("clip", num_frames, make_plan("m1"))
    assert [window.start for window in windows] == starts
    assert all(window.num_frames == 81 for window in windows)


def test_one_window_starts_at_the_beginning() -> None:
    (window,) = plan_windows("clip", 300, make_plan("m0", windows_per_clip=1))
    assert window.start == 0


@pytest.mark.parametrize("references", STRATEGIES)
def test_references_lie_in_the_clip_behind_the_first_frame(references: ReferenceStrategy) -> None:
    for window in plan_windows("clip", 600, make_plan(references)):
        assert window.references[0] == window.start
        assert len(set(window.references[1:])) == len(window.references) - 1 <= 3
        assert all(0 <= frame < 600 for frame in window.references)
        assert window.has_strategy_frames


def test_m0_lies_inside_the_window() -> None:
    distances = {frame - window.start for window, frame in candidates("m0")}
    assert distances <= set(range(81))
    assert len(distances) > 60


def test_m1_is_first_or_last() -> None:
    assert {frame - window.start for window, frame in candidates("m1")} == {0, 80}


def test_m2_is_more_than_five_seconds_away() -> None:
    for window, frame in candidates("m2"):
        assert frame < window.start - 125 or frame > window.start + 80 + 125


def test_m3_is_near_but_outside() -> None:
    pairs = candidates("m3")
    for window, frame in pairs:
        assert 1 <= window.start - frame <= 25 or 1 <= frame - (window.start + 80) <= 25
    assert {frame < window.start for window, frame in pairs} == {True, False}


@pytest.mark.parametrize(("references", "num_frames"), [("m2", 200), ("m3", 81)])
def test_short_clips_fall_back_and_say_so(references: ReferenceStrategy, num_frames: int) -> None:
    for window in plan_windows("clip", num_frames, make_plan(references)):
        assert not window.has_strategy_frames
        assert set(window.references) <= {window.start, window.start + 80}


def test_plans_depend_on_the_clip_alone() -> None:
    plan = make_plan("m3")
    assert plan_windows("a", 600, plan) == plan_windows("a", 600, plan)
    assert plan_windows("a", 600, plan) != plan_windows("b", 600, plan)


def test_a_still_has_one_window_of_one_frame() -> None:
    windows = plan_windows("still", 1, make_plan("m3"))
    assert windows == (Window(0, 1, (0,), has_strategy_frames=True),)
    choice = choose(windows, first_chunk=0.0, context_frames=9, path=(0, 0, 0))
    assert (choice.window, choice.reference, choice.num_context_frames) == (0, 0, 0)


def test_clips_shorter_than_a_window_are_refused() -> None:
    with pytest.raises(ValueError, match="clip: 80 frames are fewer than 81"):
        plan_windows("clip", 80, make_plan("m3"))


def test_choices_are_as_frequent_as_asked() -> None:
    windows, count = plan_windows("clip", 600, make_plan("m3")), 2000
    chosen = [
        choose(windows, first_chunk=0.2, context_frames=9, path=(0, epoch, 3))
        for epoch in range(count)
    ]
    first = [choice for choice in chosen if choice.num_context_frames == 1]
    later = [choice for choice in chosen if choice.num_context_frames == 9]
    assert len(first) + len(later) == count
    assert len(first) / count == pytest.approx(0.2, abs=0.03)
    assert {choice.reference for choice in first} == {0}
    places = Counter(choice.window for choice in chosen)
    assert all(places[number] / count == pytest.approx(0.25, abs=0.04) for number in range(4))
    for number, window in enumerate(windows):
        used = Counter(choice.reference for choice in later if choice.window == number)
        assert set(used) == set(range(1, len(window.references)))
        assert max(used.values()) < 1.4 * min(used.values())


def test_choices_depend_on_their_path_alone() -> None:
    windows = plan_windows("clip", 600, make_plan("m3"))

    def draw(*path: int) -> list[object]:
        return [
            choose(windows, first_chunk=0.5, context_frames=9, path=(*path, i)) for i in range(20)
        ]

    assert draw(1, 2) == draw(1, 2)
    assert draw(1, 2) != draw(1, 3)
    assert draw(1, 2) != draw(2, 2)


@pytest.mark.parametrize(("share", "frames"), [(0.0, {9}), (1.0, {1})])
def test_shares_of_nothing_and_all(share: float, frames: set[int]) -> None:
    windows = plan_windows("clip", 600, make_plan("m0"))
    chosen = [
        choose(windows, first_chunk=share, context_frames=9, path=(0, 0, i)) for i in range(50)
    ]
    assert {choice.num_context_frames for choice in chosen} == frames
