"""From one picture and its depth to what a camera elsewhere would see of it.

P is the number of points, n that of frames, H and W are the size of the picture in pixels.

Source: the released code of Uni3C; its points are drawn by PyTorch3D's rasteriser and alpha
compositor, which `splat` computes by their definition.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Cameras

FAR = 8.0
"""Medians of the depth behind which it is contracted."""

EDGE_SHARPNESS, EDGE_THRESHOLD = 10.0, 0.35
RADIUS, LAYERS = 0.008, 8
MIN_PIXELS = 1.5
"""Radius of a disc below which those of neighbouring pixels leave gaps when the camera moves."""

SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])


class Cloud(NamedTuple):
    """Coloured points.

    Attributes:
        places: in the world. [P, 3]
        colors: as in the picture. [P, 3]
    """

    places: Tensor
    colors: Tensor


class Render(NamedTuple):
    """A video of a cloud.

    Attributes:
        pixels: in the range of the picture; 0, which is grey, where there is no point.
            [3, n, H, W]
        holes: 1 where there is no point. [1, n, H, W]
    """

    pixels: Tensor
    holes: Tensor


def contract_depth(depth: Tensor, far: float = FAR) -> Tensor:
    """Draw what lies beyond `far` medians towards twice that depth at most. [H, W]"""
    limit = far * depth.median()
    return torch.where(depth > limit, 2 * limit - limit**2 / (depth + 1e-6), depth)


def find_edges(depth: Tensor, threshold: float = EDGE_THRESHOLD) -> Tensor:
    """Find pixels where depth jumps, whose points would hang in the air.

    Args:
        depth: metres, or any unit. [H, W]
        threshold: 0 finds none, 1 all that are not quite flat.

    Returns:
        True at edges. [H, W]
    """
    disparity = 1 / (depth + 1e-7)
    low, high = disparity.min(), disparity.max()
    scaled = ((disparity - low) / (high - low + 1e-6))[None, None]
    kernels = torch.stack([SOBEL, SOBEL.mT])[:, None].to(depth)
    gradient = F.conv2d(F.pad(scaled, (1, 1, 1, 1), mode="replicate"), kernels)[0]  # [2, H, W]
    return torch.exp(-EDGE_SHARPNESS * gradient.norm(dim=0)) < threshold


def lift(image: Tensor, depth: Tensor, intrinsics: Tensor, w2c: Tensor) -> Cloud:
    """Put each pixel of a picture where it is in the world; pixels at edges are left out.

    Args:
        image: the picture. [3, H, W]
        depth: in units of the world; see `contract_depth`. [H, W]
        intrinsics: of its camera. [3, 3]
        w2c: from the world to its camera. [4, 4]
    """
    height, width = depth.shape
    rows, columns = torch.arange(height).to(depth) + 0.5, torch.arange(width).to(depth) + 0.5
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], dim=-1) @ torch.linalg.inv(intrinsics).mT
    seen = F.pad(rays * depth[..., None], (0, 1), value=1.0)  # [H, W, 4]
    kept = ~find_edges(depth)
    places = seen[kept] @ torch.linalg.inv(w2c).mT
    return Cloud(places[:, :3], image.permute(1, 2, 0)[kept])


def splat(
    cloud: Cloud,
    intrinsics: Tensor,
    w2c: Tensor,
    size: tuple[int, int],
    radius: float = RADIUS,
    layers: int = LAYERS,
) -> tuple[Tensor, Tensor]:
    """Draw a cloud as discs that fade from their middles, the nearest before others.

    Args:
        cloud: what to draw.
        intrinsics: of the camera. [3, 3]
        w2c: from the world to the camera. [4, 4]
        size: height and width of the picture.
        radius: of the discs; 1 is half of the picture's shorter side.
        layers: discs that are looked at in one pixel.

    Returns:
        Pixels [3, H, W] and holes [1, H, W].
    """
    reach, num_pixels = radius * min(size) / 2, size[0] * size[1]
    places, colors = _project(cloud, intrinsics, w2c)
    pixel, point, distance = _covered(places, size, reach)
    touching = pixel.bincount(minlength=num_pixels)
    before = touching.cumsum(0) - touching
    layer = torch.arange(len(pixel), device=pixel.device) - before[pixel]
    top = layer < layers
    pixel, layer, point = pixel[top], layer[top], point[top]
    alpha = distance.new_zeros(num_pixels, layers)
    alpha[pixel, layer] = 1 - distance[top] / reach**2
    weight = (alpha * _transmittance(alpha))[pixel, layer]
    drawn = colors.new_zeros(num_pixels, 3).index_add(0, pixel, colors[point] * weight[:, None])
    return drawn.T.reshape(3, *size), (touching == 0).to(drawn).view(1, *size)


def render(
    image: Tensor,
    depth: Tensor,
    cameras: Cameras,
    *,
    radius: float | None = None,
    keep_first: bool = True,
) -> Render:
    """Show a picture from a camera that moves.

    Args:
        image: -1 to 1. [3, H, W]
        depth: in the unit of the cameras' places. [H, W]
        cameras: the first one is the picture's.
        radius: of the discs, see `splat`; if absent the release's, or more in small pictures.
        keep_first: the first frame is the picture itself, without holes, as the controller saw it
            in training.
    """
    cloud = lift(image, contract_depth(depth), cameras.intrinsics[0], cameras.w2c[0])
    filmed = film(cloud, cameras, (depth.shape[0], depth.shape[1]), radius)
    return begin_with(image, filmed) if keep_first else filmed


def film(
    cloud: Cloud, cameras: Cameras, size: tuple[int, int], radius: float | None = None
) -> Render:
    """Show a cloud from a camera that moves; see `render`."""
    radius = radius or max(RADIUS, 2 * MIN_PIXELS / min(size))
    frames = [splat(cloud, *camera, size, radius) for camera in zip(*cameras, strict=True)]
    pixels, holes = zip(*frames, strict=True)
    return Render(torch.stack(pixels, dim=1), torch.stack(holes, dim=1))


def begin_with(image: Tensor, filmed: Render) -> Render:
    """Put a picture without holes in the place of the first frame. [3, H, W]"""
    pixels = torch.cat([image[:, None], filmed.pixels[:, 1:]], dim=1)
    return Render(pixels, F.pad(filmed.holes[:, 1:], (0, 0, 0, 0, 1, 0)))


def _project(cloud: Cloud, intrinsics: Tensor, w2c: Tensor) -> tuple[Tensor, Tensor]:
    """Find where points before the camera are seen, and their colours; the nearest first."""
    seen = F.pad(cloud.places, (0, 1), value=1.0) @ w2c[:3].mT  # [P, 3]
    nearest = seen[:, 2].argsort(stable=True)
    nearest = nearest[seen[nearest, 2] > 0]
    seen, colors = seen[nearest], cloud.colors[nearest]
    return (seen @ intrinsics.mT)[:, :2] / seen[:, 2:], colors


def _transmittance(alpha: Tensor) -> Tensor:
    """Say what share of light comes through to each layer from those before it. [..., layers]"""
    passed = (1 - alpha).cumprod(dim=-1).roll(1, dims=-1)
    passed[..., 0] = 1
    return passed


def _covered(places: Tensor, size: tuple[int, int], reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """List which pixels' centres lie within reach of which points.

    Returns:
        Numbers of pixel and point, and squared distance; by pixel, then by point. [M] each
    """
    height, width = size
    steps = torch.arange(math.floor(2 * reach) + 1, device=places.device)
    first = (places - 0.5 - reach).ceil()
    x, y = (first[:, axis, None] + steps for axis in (0, 1))  # [P, K]
    across, down = (x + 0.5 - places[:, :1]) ** 2, (y + 0.5 - places[:, 1:]) ** 2
    squared = down[:, :, None] + across[:, None, :]  # [P, K, K]
    inside_x, inside_y = (x >= 0) & (x < width), (y >= 0) & (y < height)
    hit = (squared < reach**2) & inside_y[:, :, None] & inside_x[:, None, :]
    where = hit.flatten().nonzero()[:, 0]
    # index_select is several times as fast as indexing, for millions of numbers.
    pixels = y.long()[:, :, None] * width + x.long()[:, None, :]
    pixel, order = pixels.flatten().index_select(0, where).sort(stable=True)
    where = where.index_select(0, order)
    return pixel, where // len(steps) ** 2, squared.flatten().index_select(0, where)
