"""The recipe's `measure` section: what is known of a video, so that more of it can be measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from kit.data.buckets import fit_mask
from kit.data.video_reader import open_image
from kit.errors import InputError
from kit.metrics.mouth import box_regions
from kit.recipe import ExistingFile, ExistingFolder


def _four_numbers(region: str | tuple[float, ...]) -> str | tuple[float, ...]:
    if not isinstance(region, str) and len(region) != 4:
        raise ValueError(
            f"{list(region)} is not left, top, right, bottom in pixels, nor the path of a mask"
        )
    return region


Region = Annotated[str | tuple[float, ...], AfterValidator(_four_numbers)]
"""Left, top, right and bottom in pixels of the video, or the path of a mask picture."""

Level = Annotated[int, Field(ge=0, le=255)]
Color = tuple[Level, Level, Level]
"""Red, green and blue, 0 to 255."""

_WHITE = 127


class MeasureSettings:
    """What is known of a video beside its pixels and sound; all of it may be left out.

    Args:
        region: where the mouth is: left, top, right, bottom in pixels of the video, or a mask
            picture, white at the mouth, that is fitted to the video as the portrait is. Without
            it the mouth may be anywhere.
        mouth_color: RGB inside the mouth; without it the mouth is read from motion.
        full_opening: share of the picture that the inside of the mouth covers wide open; without
            it, the 95th percentile of each video.
        closed_opening: share that a closed mouth seems to cover, where dark lips count in part.
        reference: picture of the character; without it, the portrait or the source video's first
            frame.
        colors: RGB of the character's parts by name, all of them in the reference picture.
        features: folder of an image network saved by timm, to compare with the reference picture.
    """

    def __init__(
        self,
        *,
        region: Region | None = None,
        mouth_color: Color | None = None,
        full_opening: Annotated[float, Field(gt=0, le=1)] | None = None,
        closed_opening: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        reference: ExistingFile | None = None,
        colors: Mapping[str, Color] = {},
        features: ExistingFolder | None = None,
    ) -> None:
        self.region = region
        self.mouth_color = mouth_color
        self.full_opening = full_opening
        self.closed_opening = closed_opening
        self.reference = reference
        self.colors = colors
        self.features = features

    def problems(self) -> list[str]:
        """List what does not go together, in words."""
        full, closed = self.full_opening, self.closed_opening
        if self.mouth_color is None:
            areas = {"full_opening": full, "closed_opening": closed}
            return [
                f"{name}: {value} is an area of the mouth's colour; give mouth_color too"
                for name, value in areas.items()
                if value
            ]
        if full is not None and closed >= full:
            return [f"closed_opening: {closed} is not below full_opening, {full}"]
        return []

    def load_region(self, height: int, width: int) -> Tensor | None:
        """Load where the mouth is in a video of this size, True inside. [height, width]

        Raises:
            InputError: the box is not inside the picture, or the mask cannot be read or is empty.
        """
        if self.region is None:
            return None
        if isinstance(self.region, str):
            return _load_mask(Path(self.region), height, width)
        return _draw_box(self.region, height, width)


def _load_mask(path: Path, height: int, width: int) -> Tensor:
    with open_image(path) as image:
        grey = np.asarray(image.convert("L"))
    mask = torch.from_numpy(fit_mask(grey, height, width) > _WHITE)
    if not mask.any():
        raise InputError(
            f"{path} is white nowhere in the picture of {width}x{height} pixels; paint the mouth "
            "white and the rest black"
        )
    return mask


def _draw_box(box: tuple[float, ...], height: int, width: int) -> Tensor:
    left, top, right, bottom = box
    mask = box_regions(torch.tensor(box), height, width)
    is_inside = 0 <= left < right <= width and 0 <= top < bottom <= height
    if not is_inside or not mask.any():
        numbers = ", ".join(f"{number:g}" for number in box)
        raise InputError(
            f"[{numbers}] is not left, top, right, bottom of a box inside the picture of "
            f"{width}x{height} pixels"
        )
    return mask
