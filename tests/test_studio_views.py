"""Views of the drawn world: every point moves as its distance and the camera say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kit.studio.characters import MOUTH
from kit.studio.scenes import World
from kit.studio.views import (
    View,
    depth_of,
    draw_view,
    first_lens,
    homography,
    lenses,
    mouth_boxes,
    paint_view,
    save_depth,
)
from kit.studio.voices import Corpus

VOICES = Path(__file__).parents[1] / "data" / "sample" / "voices"
NUM_FRAMES = 9


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(VOICES, "test")


@pytest.fixture(scope="module")
def view(corpus: Corpus) -> View:
    return draw_view(World("test"), 1, NUM_FRAMES, corpus)


def moved(right: float = 0.0, forwards: float = 0.0, degrees: float = 0.0) -> Tensor:
    """Place a camera by a way from the first, and turn it to the right. w2c [4, 4]"""
    angle = np.radians(degrees)
    turn = np.array(
        [[np.cos(angle), 0, -np.sin(angle)], [0, 1, 0], [np.sin(angle), 0, np.cos(angle)]]
    )
    w2c = torch.eye(4, dtype=torch.float64)
    w2c[:3, :3] = torch.from_numpy(turn)
    w2c[:3, 3] = -w2c[:3, :3] @ torch.tensor([right, 0, forwards], dtype=torch.float64)
    return w2c.float()


def pair(view: View, second: Tensor) -> tuple[Tensor, Tensor]:
    """Intrinsics and w2c of the first camera and another one."""
    return view.intrinsics.expand(2, 3, 3), torch.stack([torch.eye(4), second])


def test_a_view_is_a_function_of_world_split_and_index(view: View, corpus: Corpus) -> None:
    again = draw_view(World("test"), 1, NUM_FRAMES, corpus)
    lens = [first_lens(view)]
    assert (next(paint_view(view, lens)) == next(paint_view(again, lens))).all()
    other = draw_view(World("test"), 2, NUM_FRAMES, corpus)
    assert (next(paint_view(view, lens)) != next(paint_view(other, lens))).any()


def test_a_point_moves_by_focal_length_times_way_over_distance(view: View) -> None:
    focal, way = float(view.intrinsics[0, 0]), 0.15
    lens = lenses(*pair(view, moved(right=way)))[1]
    for distance in (1.0, view.layers[1].distance, view.layers[0].distance):
        x, y, w = homography(view, distance, lens) @ [20.0, 30.0, 1.0]
        assert (x / w, y / w) == pytest.approx((20 - focal * way / distance, 30))


def test_nearer_is_larger(view: View) -> None:
    lens = lenses(*pair(view, moved(forwards=0.25)))[1]
    middle, aside = (homography(view, 1.0, lens) @ [x, 32.0, 1.0] for x in (32.0, 42.0))
    assert aside[0] / aside[2] - middle[0] / middle[2] == pytest.approx(10 / 0.75)


def test_homographies_agree_with_lifting_and_projecting(view: View) -> None:
    second = moved(right=0.1, forwards=-0.2, degrees=12)
    intrinsics, w2c = pair(view, second)
    lens = lenses(intrinsics, w2c)[1]
    pixel = torch.tensor([11.5, 40.5, 1.0])
    distance = view.layers[0].distance
    world = torch.linalg.inv(intrinsics[0]) @ pixel * distance
    seen = intrinsics[1] @ (second[:3, :3] @ world + second[:3, 3])
    expected = (seen[:2] / seen[2]).tolist()
    x, y, w = homography(view, distance, lens) @ pixel.numpy()
    assert (x / w, y / w) == pytest.approx(expected, abs=1e-4)


def test_cameras_count_from_the_first_wherever_the_world_begins(view: View) -> None:
    elsewhere = moved(right=2, forwards=-3, degrees=30)
    intrinsics, w2c = pair(view, moved(right=0.1, degrees=5))
    here, there = (lenses(intrinsics, w2c @ world)[1] for world in (torch.eye(4), elsewhere))
    np.testing.assert_allclose(here.from_first, there.from_first, atol=1e-5)


def test_depth_tells_the_distances_of_layers(view: View) -> None:
    depth = depth_of(view, first_lens(view))
    found = sorted(set(depth.flatten().tolist()))
    assert found == pytest.approx([1.0, view.layers[1].distance, view.layers[0].distance])
    height, width = depth.shape
    face = depth[height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4]
    assert (face == 1).all()


def test_depth_follows_the_camera(view: View) -> None:
    near = depth_of(view, lenses(*pair(view, moved(forwards=0.25)))[1])
    assert near.min() == pytest.approx(0.75)
    assert near.max() == pytest.approx(view.layers[0].distance - 0.25)
    turned = depth_of(view, lenses(*pair(view, moved(degrees=10)))[1])
    ray, angle = 31.5 / float(view.intrinsics[0, 0]), np.radians(10)
    wall, distance = turned[0, [0, -1]], view.layers[0].distance
    oblique = [np.cos(angle) + np.sin(angle) * ray, np.cos(angle) - np.sin(angle) * ray]
    assert wall.tolist() == pytest.approx([distance / share for share in oblique], rel=1e-5)


def test_the_character_talks_where_the_boxes_say(view: View, corpus: Corpus) -> None:
    speaking = next(
        found
        for index in range(9)
        if (found := draw_view(World("test"), index, 33, corpus)).take.speaking == "one"
        and found.part.mouth.opening.max() > 0.8
    )
    frame = int(speaking.part.mouth.opening.argmax())
    lens = lenses(*pair(speaking, moved(right=0.1, forwards=0.1)))[1]
    picture = next(paint_view(speaking, [lens], frame)).astype(float)
    left, top, right, bottom = mouth_boxes(speaking, [lens], frame)[0].tolist()
    rows, columns = np.nonzero(np.linalg.norm(picture - np.array(MOUTH), axis=-1) < 20)
    assert len(rows) > 3
    assert rows.min() >= top - 1 and rows.max() <= bottom + 1
    assert columns.min() >= left - 1 and columns.max() <= right + 1


def test_depth_is_saved_with_the_focal_length(view: View, tmp_path: Path) -> None:
    save_depth(view, tmp_path / "depth.npz")
    with np.load(tmp_path / "depth.npz") as found:
        assert found["focallength_px"] == view.intrinsics[0, 0]
        assert (found["depth"] == depth_of(view, first_lens(view)).numpy()).all()
