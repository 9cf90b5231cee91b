"""Uni3C's cameras, renders and depth: parity with the release, and closed forms."""

import importlib
import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DepthProConfig,
    DepthProForDepthEstimation,
    DepthProImageProcessor,
    Dinov2Config,
    DPTImageProcessor,
)

from kit.draws import draw_normal
from kit.errors import InputError

cameras = importlib.import_module("kit.plugins.uni3c.cameras")
points = importlib.import_module("kit.plugins.uni3c.points")
depths = importlib.import_module("kit.plugins.uni3c.depth")

REFERENCE = Path(__file__).parents[2] / "shared" / "fixtures" / "uni3c"
CPU = torch.device("cpu")
ROUTES = dict(cameras.PRESETS) | {
    "custom": cameras.Trajectory(
        elevation=-10,
        azimuth=30,
        distance=1.2,
        x_offset=0.1,
        y_offset=-0.05,
        z_offset=0.2,
        zoom=1.3,
    )
}
INTRINSICS = cameras.intrinsic_matrix(40.0, 24, 32)


def reference(name: str) -> dict[str, Tensor]:
    path = REFERENCE / f"{name}.safetensors"
    if not path.exists():
        pytest.skip("the reference outputs are not beside the checkout")
    return load_file(path)


@pytest.mark.parametrize("name", ROUTES)
def test_courses_equal_the_release(name: str) -> None:
    expected = reference("cameras")
    found = cameras.follow(ROUTES[name], 9, expected["K"], radius=2.5)
    assert torch.equal(found.w2c, expected[f"{name}.w2c"])
    torch.testing.assert_close(found.intrinsics, expected[f"{name}.K"], rtol=2e-7, atol=0)


def test_rays_equal_the_release() -> None:
    expected = reference("cameras")
    w2c = expected["custom.w2c"]
    poses = cameras.normalise_poses(w2c)
    torch.testing.assert_close(poses, expected["custom.normalised_w2c"], rtol=0, atol=1e-6)
    rays = cameras.plucker(expected["K"], w2c, 48, 64)
    torch.testing.assert_close(rays, expected["custom.plucker"][0], rtol=0, atol=1e-6)


def test_renders_equal_the_release() -> None:
    expected = reference("render")
    image, depth = expected["image"][0], expected["depth"][0, 0]
    contracted = points.contract_depth(depth)
    assert torch.equal(contracted, expected["depth_contracted"][0, 0])
    assert torch.equal(points.find_edges(contracted), expected["boundary"][0, 0].bool())
    path = cameras.Cameras(expected["K"], expected["w2c"])
    found = points.render(image, depth, path, radius=float(expected["radius"]))
    assert torch.equal(found.holes, expected["mask"].transpose(0, 1))
    torch.testing.assert_close(found.pixels, expected["rgb"].transpose(0, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_frames", [1, 2, 5])
@pytest.mark.parametrize("name", ROUTES)
def test_courses_begin_at_the_picture(name: str, num_frames: int) -> None:
    found = cameras.follow(ROUTES[name], num_frames, INTRINSICS, radius=3.0, start_elevation=0)
    expected = torch.eye(4)
    expected[2, 3] = 3
    assert found.w2c.shape == (num_frames, 4, 4)
    torch.testing.assert_close(found.w2c[0], expected)
    assert torch.equal(found.intrinsics[0], INTRINSICS)


def test_an_orbit_keeps_its_distance_and_looks_at_the_centre() -> None:
    found = cameras.follow(cameras.PRESETS["orbit"], 13, INTRINSICS, radius=2.0)
    centre = found.w2c[:, :3, 3]
    torch.testing.assert_close(centre, torch.tensor([0.0, 0.0, 2.0]).expand(13, 3))
    torch.testing.assert_close(found.w2c[-1], found.w2c[0], rtol=0, atol=1e-5)


def test_exact_rays_of_a_camera_at_rest() -> None:
    w2c = torch.eye(4).expand(3, 4, 4)
    rays = cameras.plucker(INTRINSICS, w2c, 24, 32, centre=(0.5, 0.5), product="right")
    assert rays.shape == (6, 3, 24, 32)
    assert rays[3:].abs().max() == 0
    torch.testing.assert_close(rays[:3].norm(dim=0), torch.ones(3, 24, 32))
    middle = rays[:3, 0, 11:13, 15:17].mean((1, 2))
    torch.testing.assert_close(middle / middle.norm(), torch.tensor([0.0, 0.0, 1.0]))


def test_the_first_camera_stands_at_distance_two() -> None:
    found = cameras.follow(cameras.PRESETS["free1"], 9, INTRINSICS, radius=7.0)
    for product in ("left", "right"):
        place = torch.linalg.inv(cameras.normalise_poses(found.w2c, product))[0, :3, 3]
        assert float(place.norm()) == pytest.approx(2, rel=1e-5)


def test_right_products_make_poses_relative_to_the_first() -> None:
    """Where the world begins does not matter to them; to the release's it does."""
    w2c = cameras.follow(cameras.PRESETS["free1"], 9, INTRINSICS, radius=7.0).w2c
    elsewhere = w2c @ cameras.follow(ROUTES["custom"], 2, INTRINSICS, radius=1.0).w2c[1]
    found = [cameras.normalise_poses(some, "right") for some in (w2c, elsewhere)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    released = [cameras.normalise_poses(some) for some in (w2c, elsewhere)]
    assert (released[0] - released[1]).abs().max() > 0.1


def test_far_depth_is_contracted_and_near_depth_is_not() -> None:
    depth = torch.ones(5, 5)
    depth[0] = torch.tensor([7.9, 8.0, 16.0, 1e3, 1e9])
    found = points.contract_depth(depth)
    torch.testing.assert_close(found[0], torch.tensor([7.9, 8.0, 12.0, 15.936, 16.0]))
    assert torch.equal(found[1:], depth[1:])


def test_edges_lie_where_depth_jumps() -> None:
    depth = torch.ones(6, 8)
    depth[:, 4:] = 3
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[:, 3:5] = True
    assert torch.equal(points.find_edges(depth), expected)
    assert not points.find_edges(torch.ones(6, 8)).any()


def one_point(place: tuple[float, float, float], color: float = 0.5) -> Any:
    return points.Cloud(torch.tensor([place]), torch.full((1, 3), color))


def test_a_point_is_a_disc_that_fades() -> None:
    # Radius 0.25 of half of 24 pixels is 3 pixels; the point lies on the centre of pixel 11, 15.
    cloud = one_point((-0.5 / 40, -0.5 / 40, 1.0))
    pixels, holes = points.splat(cloud, INTRINSICS, torch.eye(4), (24, 32), radius=0.25)
    y, x = torch.meshgrid(torch.arange(24) - 11, torch.arange(32) - 15, indexing="ij")
    squared = (x**2 + y**2).float()
    expected = 0.5 * (1 - squared / 9).clamp(min=0)
    torch.testing.assert_close(pixels, expected.expand(3, -1, -1), rtol=0, atol=1e-5)
    assert torch.equal(holes[0] == 1, squared >= 9)


def test_the_nearer_point_hides_the_farther_one() -> None:
    near, far = one_point((0.0, 0.0, 1.0), 1.0), one_point((0.0, 0.0, 2.0), -1.0)
    both = points.Cloud(*(torch.cat(parts) for parts in zip(far, near, strict=True)))
    pixels, _ = points.splat(both, INTRINSICS, torch.eye(4), (24, 32), radius=0.25)
    alpha = 1 - 0.5 / 9
    torch.testing.assert_close(pixels[0, 11, 15], torch.tensor(alpha - (1 - alpha) * alpha))
    nearest, _ = points.splat(both, INTRINSICS, torch.eye(4), (24, 32), radius=0.25, layers=1)
    torch.testing.assert_close(nearest[0, 11, 15], torch.tensor(alpha))


def test_points_behind_the_camera_are_not_seen() -> None:
    pixels, holes = points.splat(one_point((0.0, 0.0, -1.0)), INTRINSICS, torch.eye(4), (24, 32))
    assert pixels.abs().max() == 0
    assert holes.min() == 1


def test_a_render_begins_with_the_picture_and_follows_the_camera() -> None:
    """A flat wall seen from half of its distance is twice as large."""
    image, depth = draw_normal((3, 48, 64), 1), torch.full((48, 64), 2.0)
    intrinsics = cameras.intrinsic_matrix(60.0, 48, 64)
    route = cameras.Trajectory(distance=0.5)
    path = cameras.follow(route, 3, intrinsics, radius=2.0, start_elevation=0)
    found = points.render(image, depth, path)
    assert torch.equal(found.pixels[:, 0], image)
    assert found.holes[:, 0].max() == 0
    coarse = torch.nn.functional.interpolate(image[None, :, 12:36, 16:48], scale_factor=2)[0]
    seen = found.holes[0, -1] == 0
    together = torch.stack([found.pixels[0, -1][seen], coarse[0][seen]])
    assert float(torch.corrcoef(together)[0, 1]) > 0.95
    unkept = points.render(image, depth, path, keep_first=False)
    assert not torch.equal(unkept.pixels[:, 0], image)


def test_a_small_camera_move_leaves_no_gaps() -> None:
    image, depth = draw_normal((3, 64, 64), 1), torch.full((64, 64), 2.0)
    route = cameras.Trajectory(azimuth=4, elevation=2)
    path = cameras.follow(route, 2, cameras.intrinsic_matrix(60.0, 64, 64), 2.0, start_elevation=0)
    holes = points.render(image, depth, path).holes[0, -1]
    assert holes[8:-8, 8:-8].max() == 0


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_depth_from_files(tmp_path: Path, suffix: str) -> None:
    file, depth = tmp_path / f"depth{suffix}", draw_normal((4, 6), 1).abs() + 1
    match suffix:
        case ".npy":
            np.save(file, depth.numpy())
        case ".npz":
            np.savez(file, depth=depth.numpy(), focallength_px=90.0)
        case _:
            save_file({"depth": depth[None], "focallength_px": torch.tensor(90.0)}, file)
    found = depths.load_depth(file, (8, 12))
    assert found.focal == (None if suffix == ".npy" else 180)
    assert torch.equal(found.depth[::2, ::2], depth)
    assert set(found.depth.flatten().tolist()) == set(depth.flatten().tolist())


def test_depth_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    bad = {
        "3 axes": np.ones((2, 3, 4)),
        "zero": np.zeros((3, 4)),
        "nan": np.full((3, 4), math.nan),
        "objects": np.array([{}]),
    }
    words = [r"shape \(2, 3, 4\)", "not above 0", "no numbers", "cannot be read"]
    for (name, array), word in zip(bad.items(), words, strict=True):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(InputError, match=word):
            depths.load_depth(tmp_path / f"{name}.npy", (3, 4))
    np.savez(tmp_path / "other.npz", dept=np.ones((3, 4)))
    for file, word in {
        "other.npz": "has no 'depth'",
        "x.exr": "valid: .npy",
        "x.npy": "read",
    }.items():
        with pytest.raises(InputError, match=word):
            depths.load_depth(tmp_path / file, (3, 4))


@pytest.fixture
def depth_anything(tmp_path: Path) -> Path:
    """A tiny Depth Anything as transformers saves it, with drawn weights."""
    backbone = cast(Any, Dinov2Config)(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        out_features=["stage1", "stage2"],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=8,
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    DepthAnythingForDepthEstimation(config).save_pretrained(tmp_path)
    DPTImageProcessor(
        size={"height": 28, "width": 28}, keep_aspect_ratio=True, ensure_multiple_of=14
    ).save_pretrained(tmp_path)
    return tmp_path


def test_depth_from_a_network(depth_anything: Path) -> None:
    image = draw_normal((3, 32, 48), 1).clamp(-1, 1)
    found = depths.estimate_depth(str(depth_anything), image, CPU)
    assert found.depth.shape == (32, 48)
    assert found.focal is None
    assert found.depth.min() == 1
    assert 1 < found.depth.max() <= 20


@pytest.fixture
def depth_pro(tmp_path: Path) -> Path:
    """A tiny Depth Pro as transformers saves it, with drawn weights."""
    vision = {
        "model_type": "dinov2",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = DepthProConfig(
        fusion_hidden_size=8,
        patch_size=16,
        intermediate_hook_ids=[1, 0],
        intermediate_feature_dims=[8, 8],
        scaled_images_feature_dims=[8, 8, 8],
        image_model_config=vision,
        patch_model_config=vision,
        fov_model_config=vision,
        use_fov_model=True,
        num_fov_head_layers=0,
    )
    torch.manual_seed(0)
    network = DepthProForDepthEstimation(config)
    # Whatever it sees, it sees 90 degrees of it.
    last = cast(Any, network.fov_model).head.layers[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, 90)
    network.save_pretrained(tmp_path)
    DepthProImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    return tmp_path


def test_depth_and_focal_length_from_a_network(depth_pro: Path) -> None:
    found = depths.estimate_depth(str(depth_pro), draw_normal((3, 32, 48), 1).clamp(-1, 1), CPU)
    assert found.depth.shape == (32, 48)
    assert (found.depth > 0).all()
    assert found.focal == pytest.approx(24, rel=1e-5)


def test_other_networks_are_refused(depth_anything: Path, tmp_path: Path) -> None:
    file = depth_anything / "config.json"
    file.write_text(json.dumps({"model_type": "zoedepth"}))
    with pytest.raises(InputError, match=r"'zoedepth'.* valid: .*depth_pro"):
        depths.estimate_depth(str(depth_anything), torch.zeros(3, 32, 48), CPU)
    with pytest.raises(InputError, match=r"no folder"):
        depths.estimate_depth(str(tmp_path / "absent" / "folder"), torch.zeros(3, 32, 48), CPU)


def test_disparity_and_field_of_view() -> None:
    disparity = torch.tensor([4.0, 2.0, 0.0])
    assert depths.from_disparity(disparity, far=10).tolist() == [1, 2, 10]
    assert depths.focal_length(90, 64) == pytest.approx(32)
