"""Which frames of a clip one training sample shows: its window, reference and context.

A *window* is what the denoiser sees at once. The clip's windows and the candidates for their
reference frame are a pure function of the clip, so they can be encoded ahead of time; which of
them a step uses is a pure function of (seed, epoch, clip number).
"""

from dataclasses import dataclass
from typing import Literal

from kit.draws import draw_index, draw_uniform, seed_of
from kit.errors import InputError

ReferenceStrategy = Literal["first", "ends", "m0", "m1", "m2", "m3"]

DISTANT_SECONDS = 5
NEAR_SECONDS = 1


@dataclass(frozen=True)
class WindowPlan:
    """How clips are cut into windows.

    Attributes:
        window_frames: video frames in a window, 4n + 1.
        windows_per_clip: windows in a clip at most, spread evenly from its start to its end.
        references: where the reference frame comes from. `first` is the window's first frame,
            `m0` any frame of the window, `m1` its first or last, `m2` one more than 5 s away,
            `m3` one outside the window, within 1 s of it; `ends` shows its first and its last
            frame, each in its place.
        references_per_window: reference candidates of a window, beside its first frame.
        fps: frames per second of the clips.
    """

    window_frames: int
    windows_per_clip: int
    references: ReferenceStrategy
    references_per_window: int
    fps: int = 25

    def shows_last(self, num_frames: int) -> bool:
        """Tell whether a window of so many frames shows its last one beside the reference."""
        return self.references == "ends" and num_frames > 1


@dataclass(frozen=True)
class Window:
    """Frames of one window, counted from the clip's start.

    Attributes:
        start: first frame.
        num_frames: how many, 4n + 1.
        references: candidate frames; the first is `start` itself.
        has_strategy_frames: False where the clip is too short for the strategy, so that the
            candidates come from `m1` instead.
    """

    start: int
    num_frames: int
    references: tuple[int, ...]
    has_strategy_frames: bool


@dataclass(frozen=True)
class Choice:
    """What one training sample uses of its clip.

    Attributes:
        window: number of the window.
        reference: number of the candidate in `Window.references`.
        num_context_frames: leading video frames given clean: 1 in a first chunk, else the plan's.
    """

    window: int
    reference: int
    num_context_frames: int


def plan_windows(key: str, num_frames: int, plan: WindowPlan) -> tuple[Window, ...]:
    """List the windows of a clip; a single frame has one window of one frame.

    Raises:
        InputError: the clip is shorter than a window and not a still picture.
    """
    if num_frames == 1:
        return (Window(0, 1, (0,), has_strategy_frames=True),)
    last_start = num_frames - plan.window_frames
    if last_start < 0:
        raise InputError(f"{key}: {num_frames} frames are fewer than {plan.window_frames}")
    count = min(plan.windows_per_clip, last_start + 1)
    starts = [round(i * last_start / max(count - 1, 1)) for i in range(count)]
    return tuple(_window(key, start, num_frames, plan) for start in starts)


def choose(
    windows: tuple[Window, ...], *, first_chunk: float, context_frames: int, path: tuple[int, ...]
) -> Choice:
    """Choose window, reference and context of one sample.

    Args:
        windows: the clip's windows.
        first_chunk: probability of training the first chunk of a video, 0 to 1: its reference is
            the window's first frame, and only that frame is given clean.
        context_frames: clean frames of a continuation, 4n + 1.
        path: (seed, epoch, clip number), which decides everything.

    Source:
        InfiniteTalk: first chunks pin one latent frame, later chunks the last 9 frames.
    """
    number = draw_index(len(windows), *path, "window")
    window = windows[number]
    if window.num_frames == 1:
        return Choice(number, 0, num_context_frames=0)
    if draw_uniform(*path, "first_chunk") < first_chunk:
        return Choice(number, 0, num_context_frames=1)
    candidates = len(window.references) - 1
    reference = 1 + draw_index(candidates, *path, "reference") if candidates else 0
    return Choice(number, reference, context_frames)


def _window(key: str, start: int, num_frames: int, plan: WindowPlan) -> Window:
    pool = _frames_for(plan.references, start, num_frames, plan)
    usable = pool or _frames_for("m1", start, num_frames, plan)
    draws = [
        usable[seed_of(key, start, plan.references, number) % len(usable)]
        for number in range(plan.references_per_window)
    ]
    distinct = tuple(dict.fromkeys(draws))
    return Window(start, plan.window_frames, (start, *distinct), has_strategy_frames=bool(pool))


def _frames_for(
    strategy: ReferenceStrategy, start: int, num_frames: int, plan: WindowPlan
) -> list[int]:
    stop = start + plan.window_frames
    near, distant = NEAR_SECONDS * plan.fps, DISTANT_SECONDS * plan.fps
    pools = {
        "first": [start],
        "ends": [start],
        "m0": list(range(start, stop)),
        "m1": [start, stop - 1],
        "m2": [f for f in range(num_frames) if f < start - distant or f >= stop + distant],
        "m3": [f for f in range(start - near, stop + near) if not start <= f < stop],
    }
    return [frame for frame in pools[strategy] if 0 <= frame < num_frames]
