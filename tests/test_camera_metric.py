"""Measured cameras: known motion is found from pixels alone, beside a face that talks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kit.errors import InputError
from kit.metrics.camera import Motion, camera_error, measured_motion, requested_motion
from kit.studio.scenes import World
from kit.studio.views import View, depth_of, draw_view, lenses, paint_view
from kit.studio.voices import Corpus

VOICES = Path(__file__).parents[1] / "data" / "sample" / "voices"
NUM_FRAMES = 17


@pytest.fixture(scope="module")
def view() -> View:
    return draw_view(World("test"), 3, NUM_FRAMES, Corpus(VOICES, "test"))


def way(right: float, down: float, forwards: float) -> Tensor:
    """Go there evenly. w2c [T, 4, 4]"""
    w2c = torch.eye(4).repeat(NUM_FRAMES, 1, 1)
    share = torch.linspace(0, 1, NUM_FRAMES)[:, None]
    w2c[:, :3, 3] = -share * torch.tensor([right, down, forwards])
    return w2c


def wall_of(view: View, depth: Tensor) -> Tensor:
    return depth > view.layers[0].distance * 0.99


@pytest.mark.parametrize(
    "goal", [(0.2, 0.0, 0.0), (-0.1, 0.15, 0.0), (0.0, 0.0, 0.35), (0.1, 0.0, -0.3), (0, 0, 0)]
)
def test_drawn_motion_is_found(view: View, goal: tuple[float, float, float]) -> None:
    intrinsics, w2c = view.intrinsics.expand(NUM_FRAMES, 3, 3), way(*goal)
    seen = lenses(intrinsics, w2c)
    frames = torch.from_numpy(np.stack(list(paint_view(view, seen))))
    depth = depth_of(view, seen[0])
    wall = wall_of(view, depth)
    requested = requested_motion(depth, wall, intrinsics, w2c)
    error = camera_error(measured_motion(frames, wall), requested)
    assert error.pixels < 0.4 and error.scale < 0.015
    still = camera_error(measured_motion(frames[:1].expand_as(frames), wall), requested)
    assert still.pixels + 30 * still.scale > 1 or goal == (0, 0, 0)


def test_requested_motion_in_closed_form(view: View) -> None:
    intrinsics, focal = view.intrinsics.expand(NUM_FRAMES, 3, 3), float(view.intrinsics[0, 0])
    depth, region = torch.full((64, 64), 2.0), torch.zeros(64, 64, dtype=torch.bool)
    region[16:48, 16:48] = True  # around the optical axis, so that going nearer shifts nothing
    motion = requested_motion(depth, region, intrinsics, way(0.1, -0.2, 0.5))
    assert motion.scale[-1].item() == pytest.approx(2 / 1.5)
    expected = [-focal * 0.1 / 1.5, focal * 0.2 / 1.5]
    assert motion.shift[-1].tolist() == pytest.approx(expected, abs=1e-4)


def test_errors_are_means_over_the_frames_behind_the_first() -> None:
    shift, scale = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]), torch.tensor([1, 1, 1.1])
    still = Motion(torch.zeros(3, 2), torch.ones(3), seen=torch.ones(3))
    error = camera_error(Motion(shift, scale, still.seen), still)
    assert error.pixels == pytest.approx(2.5)
    assert error.scale == pytest.approx(np.log(1.1) / 2)


def test_frames_count_in_which_half_of_the_part_was_to_stay() -> None:
    still = Motion(torch.zeros(3, 2), torch.ones(3), seen=torch.tensor([1.0, 0.6, 0.4]))
    shift = torch.tensor([[0.0, 0.0], [3.0, 4.0], [90.0, 0.0]])
    assert camera_error(still._replace(shift=shift), still).pixels == pytest.approx(5)
    with pytest.raises(InputError, match="the part leaves the picture"):
        camera_error(still, still._replace(seen=torch.tensor([1.0, 0.4, 0.4])))


@pytest.mark.parametrize("region", [torch.zeros(64, 64).bool(), torch.eye(64).bool()])
def test_a_region_without_pixels_is_refused(region: Tensor) -> None:
    with pytest.raises(InputError, match="region"):
        measured_motion(torch.zeros(2, 64, 64, 3), region)


def test_a_region_without_edges_is_refused() -> None:
    with pytest.raises(InputError, match="region: nothing is drawn in it"):
        measured_motion(torch.zeros(2, 64, 64, 3), torch.ones(64, 64).bool())
