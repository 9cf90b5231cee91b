"""Picture sizes: which one a picture gets, and how it is brought to it."""

from collections.abc import Mapping, Sequence
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from kit.errors import InputError

SIZE_MULTIPLE = 16

Buckets = Mapping[float, tuple[int, int]]
"""Shape label, height / width, to (height, width)."""

TABLES: Mapping[str, Buckets] = {
    "480": {
        0.26: (320, 1216),
        0.38: (384, 1024),
        0.50: (448, 896),
        0.67: (512, 768),
        0.82: (576, 704),
        1.00: (640, 640),
        1.22: (704, 576),
        1.50: (768, 512),
        1.86: (832, 448),
        2.00: (896, 448),
        2.50: (960, 384),
        2.83: (1088, 384),
        3.60: (1152, 320),
        3.80: (1216, 320),
        4.00: (1280, 320),
    },
    "720": {
        0.22: (448, 2048),
        0.29: (512, 1792),
        0.36: (576, 1600),
        0.45: (640, 1408),
        0.55: (704, 1280),
        0.63: (768, 1216),
        0.76: (832, 1088),
        0.88: (896, 1024),
        1.00: (960, 960),
        1.14: (1024, 896),
        1.31: (1088, 832),
        1.50: (1152, 768),
        1.58: (1216, 768),
        1.82: (1280, 704),
        1.91: (1344, 704),
        2.20: (1408, 640),
        2.30: (1472, 640),
        2.67: (1536, 576),
        2.89: (1664, 576),
        3.62: (1856, 512),
        3.75: (1920, 512),
    },
}
"""Source: InfiniteTalk's two tables. Labels are rounded."""


def parse_buckets(spec: int | str | Sequence[str]) -> Buckets:
    """Turn the name of a table, or sizes such as `["640x640", "448x896"]`, into buckets.

    Raises:
        InputError: no such table, or a size is not HEIGHTxWIDTH in multiples of 16.
    """
    spec = str(spec) if isinstance(spec, int) else spec
    if isinstance(spec, str) and spec in TABLES:
        return TABLES[spec]
    sizes = spec.split(",") if isinstance(spec, str) else spec
    if not sizes:
        raise InputError("buckets: the list is empty; give '480', '720' or sizes such as 640x640")
    parsed = [_parse_size(size) for size in sizes]
    return {height / width: (height, width) for height, width in parsed}


def nearest_bucket(height: int, width: int, buckets: Buckets) -> tuple[int, int]:
    """Choose the (height, width) whose label is nearest to the picture's height / width.

    Source: InfiniteTalk, which compares the quotients themselves, not their logarithms.
    """
    label = min(buckets, key=lambda label: abs(label - height / width))
    return buckets[label]


def fit(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize a picture until it covers the size, and cut out its middle.

    Args:
        image: RGB. [H, W, 3]
        height: of the result.
        width: of the result.

    Returns:
        [height, width, 3]

    Source: InfiniteTalk: the new size is rounded up, and pixels come from PIL's bilinear filter.
    """
    new_height, new_width = _covering_size(image, height, width)
    bilinear = Image.Resampling.BILINEAR
    resized = Image.fromarray(image).resize((new_width, new_height), bilinear)
    return _cut_middle(np.asarray(resized), height, width)


def fit_mask(mask: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Bring a mask to a size as `fit` does its picture, without new values. [height, width]

    Source: InfiniteTalk takes torch's `nearest`; PIL's differs from it by half a pixel.
    """
    new_size = _covering_size(mask, height, width)
    resized = interpolate(torch.tensor(mask)[None, None], size=new_size, mode="nearest")
    return _cut_middle(resized[0, 0].numpy(), height, width)


def _covering_size(image: NDArray[np.uint8], height: int, width: int) -> tuple[int, int]:
    old_height, old_width = image.shape[:2]
    scale = max(height / old_height, width / old_width)
    return ceil(scale * old_height), ceil(scale * old_width)


def _cut_middle(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    # Halves go to the even neighbour, as in torchvision's CenterCrop.
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width].copy()


def _parse_size(size: str) -> tuple[int, int]:
    parts = size.strip().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(
            f"buckets: '{size}' is no size; valid: {', '.join(sorted(TABLES))}, "
            "or HEIGHTxWIDTH such as 640x640"
        )
    height, width = map(int, parts)
    if not height or not width or height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
        raise InputError(f"buckets: '{size}' must be multiples of {SIZE_MULTIPLE}, above 0")
    return height, width
