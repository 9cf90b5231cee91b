"""What the controller will be shown, seen before a run: no base is loaded."""

from functools import partial
from pathlib import Path

import torch

from kit.data.buckets import nearest_bucket, parse_buckets
from kit.data.media import VideoWriter, load_image
from kit.models.base import Geometry
from kit.sampling.chunks import Chunk
from kit.sampling.frames import StillSource, to_pictures

from .cameras import Route
from .depth import measure_depth
from .renders import TravellingCamera


def preview(
    portrait: Path,
    out: Path,
    *,
    route: Route,
    depth: str,
    num_frames: int = 81,
    buckets: str = "480",
    field_of_view: float = 50.0,
    radius: float | None = None,
) -> None:
    """Write the render of a portrait beside its holes, which are white.

    Args:
        portrait: picture, fitted as `kit sample` does.
        out: mp4.
        route: of the camera.
        depth: file, or folder or repository of a network.
        num_frames: of the course.
        buckets: sizes of videos, as in a recipe.
        field_of_view: as of the plugin.
        radius: as of the plugin.

    Raises:
        InputError: a file cannot be read or does not fit.
    """
    picture = load_image(portrait)
    size = nearest_bucket(picture.shape[0], picture.shape[1], parse_buckets(buckets))
    camera = TravellingCamera(
        StillSource(picture, size).frame(0),
        partial(measure_depth, depth),
        route,
        num_frames,
        field_of_view=field_of_view,
        radius=radius,
    )
    fps = Geometry().fps
    with VideoWriter(out, fps=fps, height=size[0], width=2 * size[1]) as writer:
        for start in range(0, num_frames, fps):
            chunk = Chunk(start // fps, start, min(fps, num_frames - start), 0, 0)
            pixels, guide = camera.show(chunk)
            holes = (2 * guide[:1] - 1).expand_as(pixels)
            both = torch.cat([pixels, holes], dim=-1)  # [3, T, height, 2 * width]
            writer.write(to_pictures(both.transpose(0, 1)))
