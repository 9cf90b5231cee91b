"""How far a mouth is open in each frame, read from pixels.

A `region` says where the mouth is: a mask for the whole clip or one for each frame. It may come
from a drawing, from boxes or from a detector.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.errors import InputError

COLOR_WIDTH = 40.0
"""Distance in RGB, of 255, from the mixtures of mouth and surroundings at which a pixel counts
exp(-1/2). On drawn mouths at 64 pixels, narrower bells lost openings to a codec's noise and wider
ones counted dark outlines."""

_CLOSED_SHARE, _OPEN_SHARE = 0.05, 0.95
_MEDIAN_FRAMES = 16

# Rows and columns that motion is read from: a minute of large pictures in floating point would not
# fit in memory, and a mouth moves more than a few pixels there.
_MOTION_SIZE = 96

# Of 255; a mean of grey values differs by less only through rounding.
_LEAST_CHANGE = 1e-2


def box_regions(boxes: Tensor, height: int, width: int, margin: float = 0.0) -> Tensor:
    """Turn boxes into regions.

    Args:
        boxes: left, top, right, bottom in pixels; one or one for each frame. [4] or [T, 4]
        height: rows of the picture.
        width: columns of the picture.
        margin: pixels added on each side.

    Returns:
        True inside. [height, width] or [T, height, width]
    """
    left, top, right, bottom = boxes.float().unbind(-1)
    rows = torch.arange(height) + 0.5
    columns = torch.arange(width) + 0.5
    inside_rows = _between(rows, top - margin, bottom + margin)[..., :, None]
    return inside_rows & _between(columns, left - margin, right + margin)[..., None, :]


def opening_by_color(
    frames: Tensor,
    region: Tensor | None,
    color: tuple[int, int, int],
    width: float = COLOR_WIDTH,
) -> Tensor:
    """Measure the area of a mouth whose inside has a colour of its own.

    A pixel is taken as a mixture of that colour and of the surroundings, the region's median
    colour, and counts as much as the mixture holds of the mouth: blur moves this area but keeps
    its sum. One at distance d from all mixtures counts exp(-d^2 / (2 width^2)) of that. The share
    is of the whole picture, so a region that follows the mouth does not change it.

    Args:
        frames: pixels. [T, height, width, 3]
        region: where to look; None is everywhere. [height, width] or [T, height, width]
        color: RGB inside the mouth, 0 to 255.
        width: of that bell, in RGB, of 255.

    Returns:
        Share of the picture, 0 to 1. [T]

    Raises:
        InputError: the region is empty in some frame, has another size than the frames, or holds
            nothing but the mouth's colour.
    """
    regions = _regions(frames, region)
    mouth = torch.tensor(color, device=frames.device).float()
    surroundings = _surroundings(frames, regions, mouth, width)
    size = frames.shape[1] * frames.shape[2]
    # One frame at a time and only numbers kept: a minute of video in floating point does not fit
    # in memory, and small tensors left between large ones keep theirs from being used again.
    areas = [
        _share_of_mouth(frame[inside].float(), mouth, surroundings, width).sum().item()
        for frame, inside in zip(frames, regions, strict=True)
    ]
    return torch.tensor(areas, device=frames.device) / size


def opening_by_motion(frames: Tensor, region: Tensor | None) -> Tensor:
    """Measure an opening in any video: how the region's pixels move together, darker is wider.

    This is the first principal component of the grey values in a window of fixed size around the
    region. The 5th percentile of the clip counts as closed and the 95th as open, so it says when
    a mouth moves but not how far, and a clip without speech shows noise. Where the head moves,
    the region must follow it: under a fixed one, the head's movement is the larger. Windows of
    more than 96 rows or columns are averaged down to that.

    Args:
        frames: pixels. [T, height, width, 3]
        region: as in `opening_by_color`.

    Returns:
        0 to 1; 0 throughout where nothing moves. [T]

    Raises:
        InputError: the region is empty in some frame or has another size than the frames.
    """
    windows = frames if region is None else _windows(frames, _regions(frames, region))
    grey = _grey(windows)
    centred = grey - grey.mean(0)  # [T, pixels]
    if centred.abs().max() < _LEAST_CHANGE:
        return torch.zeros(len(frames))
    vectors = torch.linalg.eigh((centred @ centred.T).double()).eigenvectors
    scores = vectors[:, -1].float()
    brighter = scores @ centred.mean(1)
    return _stretch(-scores if brighter > 0 else scores)


def _surroundings(frames: Tensor, regions: Tensor, mouth: Tensor, width: float) -> Tensor:
    """Median colour of what is not mouth, from frames spread over the clip. [3]"""
    step = max(1, len(frames) // _MEDIAN_FRAMES)
    pixels = frames[::step][regions[::step]].float()  # [pixels, 3]
    others = pixels[(pixels - mouth).norm(dim=-1) > width]
    if not len(others):
        near = tuple(int(value) for value in mouth)
        raise InputError(f"region: it holds nothing but colours near the mouth's, {near}")
    return others.median(0).values


def _share_of_mouth(pixels: Tensor, mouth: Tensor, surroundings: Tensor, width: float) -> Tensor:
    """Part of each pixel that is mouth, 0 to 1. [pixels, 3] to [pixels]"""
    way = mouth - surroundings
    share = ((pixels - surroundings) @ way / way.square().sum()).clamp(0, 1)
    apart = pixels - surroundings - share[:, None] * way
    return share * torch.exp(apart.square().sum(-1) / (-2 * width**2))


def _between(positions: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (positions >= low[..., None]) & (positions < high[..., None])


def _regions(frames: Tensor, region: Tensor | None) -> Tensor:
    """One mask for each frame. [T, height, width]"""
    size = frames.shape[:3]
    if region is None:
        return torch.ones(size[1:], dtype=torch.bool, device=frames.device).expand(size)
    if tuple(region.shape) not in {tuple(size), tuple(size[1:])}:
        raise InputError(f"region: its size is {list(region.shape)}; the frames are {list(size)}")
    regions = (region > 0).to(frames.device).expand(size)
    empty = (~regions.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        where = "the picture" if region.ndim == 2 else f"frame {empty[0]}"
        raise InputError(f"region: it covers nothing of {where}")
    return regions


def _windows(frames: Tensor, regions: Tensor) -> list[Tensor]:
    """Cut windows of equal size around the regions, pushed back inside the picture."""
    top, num_rows = _spans(regions.any(2))
    left, num_columns = _spans(regions.any(1))
    return [
        picture[row : row + num_rows, column : column + num_columns]
        for picture, row, column in zip(frames, top, left, strict=True)
    ]


def _grey(windows: Tensor | list[Tensor]) -> Tensor:
    """Grey values of windows of equal size, averaged where they are large. [T, pixels]"""
    rows, columns = (min(length, _MOTION_SIZE) for length in windows[0].shape[:2])
    grey = torch.empty(len(windows), rows * columns, device=windows[0].device)
    for row, window in zip(grey, windows, strict=True):
        small = F.adaptive_avg_pool2d(window.float().mean(-1)[None], (rows, columns))
        row.copy_(small.flatten())
    return grey


def _spans(inside: Tensor) -> tuple[list[int], int]:
    """Start of each frame's span, and the length of the longest. [T, size]"""
    size = inside.shape[1]
    first = inside.int().argmax(1)
    last = size - 1 - inside.flip(1).int().argmax(1)
    length = int((last - first).max()) + 1
    starts = ((first + last + 1 - length) // 2).clamp(0, size - length)
    return starts.tolist(), length


def _stretch(scores: Tensor) -> Tensor:
    marks = torch.tensor((_CLOSED_SHARE, _OPEN_SHARE), device=scores.device)
    closed, opened = scores.quantile(marks)
    stretched: Tensor = ((scores - closed) / (opened - closed).clamp(min=1e-12)).clamp(0, 1)
    return stretched
