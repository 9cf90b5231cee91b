"""Where the camera goes: courses around the scene, presets, and the rays of cameras.

Cameras look along z, x points right, y down. The first one looks at the centre of the scene, which
is the origin, from `radius` away; angles are in degrees, n is the number of frames.

Source: the released code of Uni3C.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor

X, Y, Z = range(3)
FIRST_CAMERA_DISTANCE = 2.0
OUTLIER_QUANTILE, OUTLIER_FACTOR = 0.97, 10
NEAR_ZERO = 1e-5


class Course(NamedTuple):
    """Where the camera is at each frame; all float64.

    Attributes:
        elevation: negative is up. [n]
        azimuth: negative is to the right. [n]
        distance: factor of the distance. [n]
        offset: in units of the radius, before `distance`. [n, 3]
        zoom: factor of the focal length. [n]
    """

    elevation: Tensor
    azimuth: Tensor
    distance: Tensor
    offset: Tensor
    zoom: Tensor


class Route(Protocol):
    """Something that plans a course."""

    def course(self, num_frames: int) -> Course:
        """Plan a course, which begins at the first camera."""


@dataclass(frozen=True)
class Trajectory:
    """An even way from the first camera to a last one. Ranges are those of the release.

    Attributes:
        elevation: degrees at the end; negative is up, -90 to 30.
        azimuth: degrees at the end; negative is to the right, -360 to 360.
        distance: factor of the distance at the end, 0.25 to 2.5; below 1 is nearer.
        x_offset: shift to the right, in units of the radius, -0.5 to 0.5.
        y_offset: shift downwards, likewise.
        z_offset: shift forwards, likewise.
        zoom: factor of the focal length, 0.25 to 2.5.
    """

    elevation: float = 0.0
    azimuth: float = 0.0
    distance: Annotated[float, Field(gt=0)] = 1.0
    x_offset: float = 0.0
    y_offset: float = 0.0
    z_offset: float = 0.0
    zoom: Annotated[float, Field(gt=0)] = 1.0

    # Else recipes could misspell what they set.
    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    def course(self, num_frames: int) -> Course:
        """Plan the course; offsets and zoom stop one frame short of their ends, as released."""
        steps = torch.arange(num_frames, dtype=torch.float64)
        whole, short = steps / max(num_frames - 1, 1), steps / num_frames
        offset = torch.tensor([self.x_offset, self.y_offset, self.z_offset], dtype=torch.float64)
        return Course(
            elevation=whole * self.elevation,
            azimuth=whole * self.azimuth,
            distance=whole * self.distance + (1 - whole),
            offset=short[:, None] * offset,
            zoom=self.zoom * short + (1 - short),
        )


class Spline(NamedTuple):
    """A cubic spline over 0 to 1.

    Attributes:
        powers: coefficients of 1, u, u^2 and u^3.
        knots: coefficient of (u - knot)^3 behind each knot.
    """

    powers: tuple[float, ...]
    knots: tuple[tuple[float, float], ...] = ()

    def __call__(self, u: Tensor) -> Tensor:
        """Evaluate at places in 0 to 1."""
        curve = sum(factor * u**power for power, factor in enumerate(self.powers))
        bends = sum(factor * (u - knot).clamp(min=0) ** 3 for knot, factor in self.knots)
        return torch.as_tensor(curve + bends)


@dataclass(frozen=True)
class Swing:
    """A way back and forth.

    Attributes:
        elevation: degrees over the way.
        azimuth: degrees over the way.
        distance: factor of the distance over the way.
    """

    elevation: Spline
    azimuth: Spline
    distance: Spline

    def course(self, num_frames: int) -> Course:
        """Plan the course; the released one is a frame late, and so never comes to its end."""
        u = torch.arange(num_frames - 1, dtype=torch.float64) / max(num_frames - 1, 1)
        late = torch.ones(num_frames, dtype=torch.float64)
        elevation, azimuth, distance = late * 0, late * 0, late.clone()
        elevation[2:], azimuth[2:] = self.elevation(u)[1:], self.azimuth(u)[1:]
        distance[1:] = self.distance(u)
        return Course(elevation, azimuth, distance, late[:, None].expand(-1, 3) * 0, late)


PRESETS: Mapping[str, Route] = {
    "free1": Trajectory(elevation=-15, azimuth=45, distance=1.6),
    "free2": Trajectory(azimuth=-60, x_offset=-0.05),
    "free3": Trajectory(distance=1.7, x_offset=-0.25),
    "free4": Trajectory(elevation=-15, azimuth=-60, distance=0.75),
    "free5": Trajectory(elevation=-15, azimuth=-120, distance=1.6),
    "orbit": Trajectory(azimuth=-360),
    "swing1": Swing(
        elevation=Spline(
            (-0.16188502292289064, -83.1812198213019, -23.35423279800048, 197.36434843903757),
            (
                (1 / 6, 1595.3862803835314),
                (1 / 4, -2687.7791892777327),
                (1 / 2, 956.8882681095882),
            ),
        ),
        azimuth=Spline(
            (0.4674261544527303, 35.30936675404386, -609.0408260817655, 862.8818738141109),
            ((1 / 3, -747.8988097226816), (1 / 2, -544.815665297235)),
        ),
        distance=Spline((1.0, 0.2)),
    ),
    "swing2": Swing(
        elevation=Spline(
            (0.1548497894392158, 23.085948902283395, -800.8773340121303, 2020.453280807723),
            (
                (1 / 8, -529.0173730005365),
                (1 / 4, -2432.0182627481645),
                (1 / 2, 1139.2380546498011),
                (3 / 4, -309.48312002538285),
            ),
        ),
        azimuth=Spline(
            (-0.27150624164530374, -55.37358560164078, 734.0181507324756, -1050.8455418909434),
            ((1 / 3, 1159.548638334157), (1 / 2, 233.52938868796758)),
        ),
        distance=Spline((1.009285714285715, -0.2683333333333383, -0.57, 0.84)),
    ),
}
"""The release's courses. Swings are its lists of angles after scipy's `UnivariateSpline(k=3)`."""


class Cameras(NamedTuple):
    """Cameras of the frames of a video, in float32.

    Attributes:
        intrinsics: focal lengths and centre, in pixels. [n, 3, 3]
        w2c: from the world to each camera. [n, 4, 4]
    """

    intrinsics: Tensor
    w2c: Tensor


def intrinsic_matrix(focal: float, height: int, width: int) -> Tensor:
    """Describe a camera whose axis goes through the centre of its picture. [3, 3]

    Args:
        focal: focal length in pixels.
        height: of the picture.
        width: of the picture.
    """
    return torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def follow(
    route: Route,
    num_frames: int,
    intrinsics: Tensor,
    radius: float,
    *,
    start_elevation: float = 5.0,
) -> Cameras:
    """Send a camera along a route.

    Args:
        route: where to.
        num_frames: 1 or more.
        intrinsics: of the first camera. [3, 3]
        radius: distance between the first camera and the centre of the scene.
        start_elevation: degrees by which the first camera stands above the centre.
    """
    course = route.course(num_frames)
    first = _first_camera(radius, start_elevation)
    c2w = _turn(course.azimuth, Z, X) @ _turn(course.elevation, Y, Z) @ first  # [n, 4, 4]
    c2w[:, :3, 3] += (radius * course.offset).float()
    c2w[:, :3, 3] *= course.distance[:, None].float()
    zoomed = intrinsics.repeat(num_frames, 1, 1)
    zoomed[:, :2, :2] *= course.zoom[:, None, None].float()
    return Cameras(zoomed, torch.linalg.inv(c2w))


def plucker(
    intrinsics: Tensor,
    w2c: Tensor,
    height: int,
    width: int,
    *,
    centre: tuple[float, float] = (-0.5, 0.5),
    product: Literal["left", "right"] = "left",
) -> Tensor:
    """Describe the ray of each pixel: its direction, then origin x direction.

    The defaults are what the released controller was trained with, slips included.

    Args:
        intrinsics: in pixels; the release gives those before any zoom. [3, 3] or [n, 3, 3]
        w2c: from the world to each camera. [n, 4, 4]
        height: of the picture in pixels.
        width: of the picture in pixels.
        centre: x and y of the first pixel's centre; (0.5, 0.5) is where it is.
        product: on which side of the cameras the inverse of the first one stands; `right` makes
            poses relative to the first camera.

    Returns:
        [6, n, height, width]
    """
    c2w = torch.linalg.inv(normalise_poses(w2c, product))
    columns = torch.arange(width, device=w2c.device) + centre[0]
    rows = torch.arange(height, device=w2c.device) + centre[1]
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], dim=-1).flatten(0, 1)  # [HW, 3]
    seen = pixels @ torch.linalg.inv(intrinsics).mT
    direction = F.normalize(seen @ c2w[:, :3, :3].mT, dim=-1)  # [n, HW, 3]
    origin = c2w[:, None, :3, 3].expand_as(direction)
    rays = torch.cat([direction, torch.linalg.cross(origin, direction)], dim=-1)
    return rays.permute(2, 0, 1).reshape(6, -1, height, width)


def normalise_poses(w2c: Tensor, product: Literal["left", "right"] = "left") -> Tensor:
    """Make poses relative to the first, centre the cameras, put the first at distance 2.

    Cameras far from the rest do not count for the centre. Where the first camera stands in the
    centre, all distances are doubled.

    Args:
        w2c: from the world to each camera. [n, 4, 4]
        product: see `plucker`.
    """
    first = torch.linalg.inv(w2c[0])
    c2w = torch.linalg.inv(first @ w2c if product == "left" else w2c @ first)
    spread = (c2w[:, :3, 3] - c2w[:, :3, 3].median(0).values).norm(dim=-1)
    near = spread <= OUTLIER_FACTOR * spread.quantile(OUTLIER_QUANTILE)
    c2w[:, :3, 3] -= c2w[near, :3, 3].mean(0)
    away = float(c2w[0, :3, 3].norm())
    centred: Tensor = torch.linalg.inv(c2w)
    centred[:, :3, 3] *= FIRST_CAMERA_DISTANCE / (away if away > NEAR_ZERO else 1)
    return centred


def _turn(degrees: Tensor, one: int, other: int) -> Tensor:
    """Turn one axis towards another. [...] to float32 [..., 4, 4]"""
    angle = torch.deg2rad(degrees)
    turn = torch.eye(4, dtype=degrees.dtype).repeat(*degrees.shape, 1, 1)
    turn[..., one, one] = turn[..., other, other] = angle.cos()
    turn[..., other, one], turn[..., one, other] = angle.sin(), -angle.sin()
    return turn.float()


def _first_camera(radius: float, elevation: float) -> Tensor:
    """Stand before the origin, above it by an angle in degrees, and look at it. [4, 4]"""
    back = torch.eye(4)
    back[2, 3] = -radius
    return _turn(torch.tensor(-elevation, dtype=torch.float64), Y, Z) @ back
