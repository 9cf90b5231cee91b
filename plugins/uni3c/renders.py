"""What the controller is shown of each chunk: a picture along a course, or a driving video.

T is the number of frames of a chunk, H and W are the size of the video in pixels.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kit.sampling.chunks import Chunk
from kit.sampling.frames import Clips
from kit.sampling.scene import Source

from .cameras import Cameras, Route, follow, intrinsic_matrix, plucker
from .depth import Depth, focal_length
from .points import Cloud, begin_with, contract_depth, film, lift

GUIDE_CHANNELS = 7
"""One for holes, six for the rays of cameras."""


class Shown(NamedTuple):
    """What the controller is shown of a chunk.

    Attributes:
        pixels: the render, -1 to 1. [3, T, H, W]
        guide: 1 where it has holes, then the cameras' rays. [7, T, H, W]
    """

    pixels: Tensor
    guide: Tensor


class Renders(Protocol):
    """Where renders come from."""

    def show(self, chunk: Chunk, picture: Tensor | None = None) -> Shown:
        """Give what is shown of a chunk.

        Args:
            chunk: which one.
            picture: its first frame, if the render is to begin anew from it. [3, H, W]
        """


class DrivingVideo:
    """A video in the place of the render, without holes; where its cameras are is not told.

    Args:
        source: at the video's size.
    """

    def __init__(self, source: Source) -> None:
        self._clips = Clips(source)

    def show(self, chunk: Chunk, picture: Tensor | None = None) -> Shown:
        """Give the frames of the chunk's time."""
        pixels = self._clips.window(chunk.start, chunk.num_frames)
        return Shown(pixels, pixels.new_zeros(GUIDE_CHANNELS, *pixels.shape[1:]))


class TravellingCamera:
    """Renders of a picture along one course of cameras, which all chunks share.

    The unit of length is the distance of the first camera from the centre of the scene.

    Args:
        picture: what the first camera sees, -1 to 1. [3, H, W]
        measure: tells the depth of a picture.
        route: of the camera.
        num_frames: in which it goes there; then it stays.
        field_of_view: degrees across the picture, if `measure` knows no focal length.
        radius: distance of the centre in the unit of the depth; if absent, the centre is what
            stands in the middle of the picture.
    """

    def __init__(
        self,
        picture: Tensor,
        measure: Callable[[Tensor], Depth],
        route: Route,
        num_frames: int,
        *,
        field_of_view: float,
        radius: float | None = None,
    ) -> None:
        found, (height, width) = measure(picture), picture.shape[1:]
        focal = found.focal or focal_length(field_of_view, width)
        course = follow(route, num_frames, intrinsic_matrix(focal, height, width), radius=1.0)
        self.cameras = Cameras(*(part.to(picture.device) for part in course))
        self._measure, self._radius = measure, radius
        self._picture, self._size = picture, (height, width)
        self._cloud = self._lift(picture, found, 0)

    def show(self, chunk: Chunk, picture: Tensor | None = None) -> Shown:
        """Render the chunk's part of the course, of the first picture or of a new one."""
        frames = torch.arange(chunk.start, chunk.start + chunk.num_frames)
        frames = frames.clamp(max=len(self.cameras.w2c) - 1)
        cameras, cloud = Cameras(*(part[frames] for part in self.cameras)), self._cloud
        if picture is not None:
            picture = picture.to(self._picture)
            cloud = self._lift(picture, self._measure(picture), int(frames[0]))
        filmed = film(cloud, cameras, self._size)
        # The controller was trained with renders that begin with the picture itself.
        first = self._picture if chunk.index == 0 else picture
        if first is not None:
            filmed = begin_with(first, filmed)
        rays = plucker(self.cameras.intrinsics[0], cameras.w2c, *self._size)
        return Shown(filmed.pixels, torch.cat([filmed.holes, rays]))

    def _lift(self, picture: Tensor, found: Depth, frame: int) -> Cloud:
        """Put a picture into the world, seen by the camera of a frame."""
        intrinsics, w2c = self.cameras.intrinsics[frame], self.cameras.w2c[frame]
        depth = found.depth.to(picture)
        # What stands in the middle is as far from this camera as the centre of the scene.
        unit = self._radius or _middle(depth) / w2c[2, 3]
        return lift(picture, contract_depth(depth / unit), intrinsics, w2c)


def _middle(depth: Tensor) -> Tensor:
    """Give the median depth in the middle of a picture, a quarter of its area. []"""
    height, width = depth.shape
    return depth[height // 4 : -(height // 4), width // 4 : -(width // 4)].median()
