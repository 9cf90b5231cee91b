"""How far a camera went: motion of a part of the picture, asked for and measured from pixels.

The part should be what stands still in the world, such as the wall behind a talking character. Its
motion is a shift and a scale of each frame against the first; small turns of a camera look like
shifts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.errors import InputError

REACH = 2
"""Steps of the search to either side."""

FIRST_STEP = (1.5, 1.5, 0.03)
"""Step of the search in pixels right and down and in the logarithm of scale; halved six times."""

HALVINGS = 6
LARGEST_DIFFERENCE = 40.0
"""Of 255: what differs more is hidden or new, and counts no more than this."""

FAINTEST = 0.05
"""Share of the sharpest edge below which a pixel tells nothing of motion."""

LEAST_SEEN = 0.1
"""Share of the part that must be in the picture where its motion is searched for."""

LEAST_ASKED = 0.5
"""Share of the part that must stay in the picture for a frame to count."""


class Motion(NamedTuple):
    """How a part of the picture moves, each frame against the first.

    Attributes:
        shift: of the part's middle, right and down, in pixels. [T, 2]
        scale: above 1 is larger. [T]
        seen: share of the part that is in the picture, 0 to 1. [T]
    """

    shift: Tensor
    scale: Tensor
    seen: Tensor


class _Part(NamedTuple):
    """What is looked for in each frame.

    Attributes:
        middle: of the part, in pixels. [2]
        around: places of its pixels, from there. [P, 2]
        colors: 0 to 255. [3, P]
        weight: how much each pixel tells of motion; 1 together. [P]
    """

    middle: Tensor
    around: Tensor
    colors: Tensor
    weight: Tensor


class CameraError(NamedTuple):
    """How far a motion is from the one asked for.

    It is the average over the frames behind the first in which at least half of the part was asked
    to stay in the picture.

    Attributes:
        pixels: length of the difference of shifts.
        scale: of the logarithms of scales; 0.01 is one percent.
    """

    pixels: float
    scale: float


def requested_motion(depth: Tensor, region: Tensor, intrinsics: Tensor, w2c: Tensor) -> Motion:
    """Tell how a part of the first picture moves when the camera does.

    Args:
        depth: of the first picture, in units of the cameras' places. [H, W]
        region: the part. bool [H, W]
        intrinsics: of each camera, in pixels. [T, 3, 3]
        w2c: from the world to each camera. [T, 4, 4]

    Raises:
        InputError: the region holds no pixels.
    """
    places = _pixels(region)  # [P, 2]
    rays = F.pad(places, (0, 1), value=1.0) @ torch.linalg.inv(intrinsics[0]).mT
    seen = F.pad(rays * depth[region][:, None], (0, 1), value=1.0)
    world = seen @ torch.linalg.inv(w2c[0]).mT
    projected = (world @ w2c[:, :3].mT) @ intrinsics.mT  # [T, P, 3]
    moved = projected[..., :2] / projected[..., 2:]
    around, middles = places - places.mean(0), moved.mean(1)
    scale = (around * (moved - middles[:, None])).sum((1, 2)) / around.square().sum()
    return Motion(middles - places.mean(0), scale, _inside(moved, region.shape).mean(1))


def measured_motion(frames: Tensor, region: Tensor) -> Motion:
    """Measure how a part of the first picture moves, from pixels alone.

    Each frame is compared with the first one: the motion is searched for around that of the frame
    before, in steps that become smaller, and what differs much, such as what walks before it,
    hardly counts.

    Args:
        frames: pixels, 0 to 255. [T, H, W, 3]
        region: the part. bool [H, W]

    Raises:
        InputError: the region holds no pixels, or nothing is drawn in it.
    """
    smooth = _blurred(frames.movedim(-1, 1).float())  # [T, 3, H, W]
    # Blurred borders of the part hold something of what is beside it.
    inner = -F.max_pool2d(-region[None].float(), 5, stride=1, padding=2)[0] > 0
    edges = _edges(smooth[0]) * inner
    drawn = edges > edges.max() * FAINTEST
    middle = _pixels(region).mean(0)
    if not drawn.any():
        raise InputError("region: nothing is drawn in it whose motion could be seen")
    part = _Part(
        middle, _pixels(drawn) - middle, smooth[0][:, drawn], edges[drawn] / edges[drawn].sum()
    )
    motion, found = torch.zeros(3), []
    for frame in smooth:
        step = torch.tensor(FIRST_STEP)
        for _ in range(HALVINGS):
            motion = _best_near(motion, step, part, frame)
            step = step / 2
        found.append(motion)
    motions = torch.stack(found)
    seen = (_inside(_moved(motions, part), region.shape) * part.weight).sum(1)
    return Motion(motions[:, :2], motions[:, 2].exp(), seen)


def camera_error(measured: Motion, requested: Motion) -> CameraError:
    """Compare two motions of the same part and length.

    Raises:
        InputError: there is no frame that counts.
    """
    counts = requested.seen >= LEAST_ASKED
    counts[0] = False
    if not counts.any():
        raise InputError("the part leaves the picture at once; take a smaller motion or another")
    apart = (measured.shift - requested.shift).norm(dim=1)[counts]
    ratio = (measured.scale / requested.scale).log().abs()[counts]
    return CameraError(apart.mean().item(), ratio.mean().item())


def _best_near(motion: Tensor, step: Tensor, part: _Part, frame: Tensor) -> Tensor:
    """Go to the best motion around, until that is in the middle. [3]"""
    reach = torch.arange(-REACH, REACH + 1)
    around = torch.cartesian_prod(reach, reach, reach)  # [K, 3]
    # The middle comes first and wins a tie.
    around = around[around.abs().sum(1).argsort(stable=True)]
    while True:
        candidates = motion + around * step
        best = int(_difference(candidates, part, frame).argmin())
        motion = candidates[best]
        if around[best].abs().max() < REACH:
            return motion


def _difference(motions: Tensor, part: _Part, frame: Tensor) -> Tensor:
    """Compare what a part was with what is where it would have gone. [K, 3] to [K]"""
    moved = _moved(motions, part)
    size = torch.tensor([frame.shape[2], frame.shape[1]])
    sampled = F.grid_sample(
        frame.expand(len(motions), -1, -1, -1),
        (2 * moved / size - 1)[:, None],
        align_corners=False,
        padding_mode="border",
    )[:, :, 0]  # [K, 3, P]
    weight = part.weight * _inside(moved, frame.shape[1:])
    apart = (sampled - part.colors).abs().mean(1).clamp(max=LARGEST_DIFFERENCE)
    share = weight.sum(1)
    return ((apart * weight).sum(1) / share.clamp(min=LEAST_SEEN)).masked_fill(
        share < LEAST_SEEN, torch.inf
    )


def _moved(motions: Tensor, part: _Part) -> Tensor:
    """Tell where the pixels of a part would go. [K, 3] to [K, P, 2]"""
    return part.middle + motions[:, None, :2] + part.around * motions[:, None, 2:].exp()


def _inside(places: Tensor, size: tuple[int, ...]) -> Tensor:
    """Mark places inside of a picture of some height and width by 1. [..., 2] to [...]"""
    limit = torch.tensor([size[1], size[0]])
    return ((places > 0) & (places < limit)).all(-1).float()


def _pixels(region: Tensor) -> Tensor:
    """List the centres of a region's pixels: x and y. [P, 2]"""
    if not region.any():
        raise InputError("region: it covers nothing of the picture")
    return region.nonzero().flip(1) + 0.5


def _edges(picture: Tensor) -> Tensor:
    """Measure how fast colours change at each pixel. [3, H, W] to [H, W]"""
    down, right = torch.gradient(picture, dim=(1, 2))
    edges: Tensor = (down.square() + right.square()).sum(0).sqrt()
    return edges


def _blurred(pictures: Tensor) -> Tensor:
    """Blur so that differences grow evenly with motion. [T, 3, H, W]"""
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    weight = torch.outer(kernel, kernel).expand(3, 1, 5, 5)
    return F.conv2d(F.pad(pictures, (2, 2, 2, 2), mode="replicate"), weight, groups=3)
