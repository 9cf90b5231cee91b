"""How far away each pixel of a picture is: from a file, or from a network of transformers."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kit.errors import InputError, did_you_mean
from kit.models.repositories import is_remote, resolve

DEPTH, FOCAL = "depth", "focallength_px"
"""Names in files, as Depth Pro's own program writes them."""

FAR = 20.0
MODEL_FILES = ("*.json", "*.safetensors")


class Depth(NamedTuple):
    """What is known of the third dimension of a picture.

    Attributes:
        depth: along the camera's axis, in metres or any unit; above 0. [H, W]
        focal: focal length in pixels; None if nobody says.
    """

    depth: Tensor
    focal: float | None


def focal_length(field_of_view: float, width: int) -> float:
    """Turn the horizontal field of view, in degrees, into a focal length in pixels."""
    return width / (2 * math.tan(math.radians(field_of_view) / 2))


def load_depth(file: Path, size: tuple[int, int]) -> Depth:
    """Read the depth of a picture.

    Args:
        file: `.npy`; or `.npz` or `.safetensors` with `depth`, and `focallength_px` if known.
        size: height and width of the picture as the video shows it; the depth map is enlarged and
            cut as a portrait is, without mixing what is near with what is far.

    Raises:
        InputError: it cannot be read, or holds no depth.
    """
    if file.suffix not in READERS:
        raise InputError(f"depth '{file}'{did_you_mean(file.suffix, READERS)}")
    try:
        found = READERS[file.suffix](file)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"depth '{file}' cannot be read: {error}") from error
    if DEPTH not in found:
        raise InputError(f"'{file}' has no '{DEPTH}'{did_you_mean(DEPTH, found)}")
    shape = tuple(found[DEPTH].shape)
    depth = found[DEPTH].float().squeeze()
    if depth.dim() != 2:
        raise InputError(f"depth '{file}' has the shape {shape}; valid: height, width")
    if not (depth.isfinite() & (depth > 0)).all():
        raise InputError(f"depth '{file}' holds numbers that are not above 0, or no numbers")
    scale = max(size[0] / depth.shape[0], size[1] / depth.shape[1])
    focal = float(found[FOCAL]) * scale if FOCAL in found else None
    return Depth(_fit(depth, scale, size), focal)


def _fit(depth: Tensor, scale: float, size: tuple[int, int]) -> Tensor:
    """Enlarge until the size is covered, and cut out the middle; as `kit.data.buckets.fit`."""
    covering = [math.ceil(scale * length) for length in depth.shape]
    enlarged = F.interpolate(depth[None, None], covering, mode="nearest-exact")[0, 0]
    top, left = (round((old - new) / 2) for old, new in zip(covering, size, strict=True))
    return enlarged[top : top + size[0], left : left + size[1]]


def measure_depth(path: str, image: Tensor) -> Depth:
    """Read the depth of a picture from a file, or ask a network for it.

    Args:
        path: see `load_depth` and `estimate_depth`.
        image: -1 to 1. [3, H, W]
    """
    file, (height, width) = Path(path), image.shape[1:]
    if file.is_file():
        return load_depth(file, (height, width))
    return estimate_depth(path, image, image.device)


def require_depth(path: str, size: tuple[int, int]) -> None:
    """Check what can tell depth before it is needed; repositories on the hub are not looked at.

    Raises:
        InputError: it is no file with the depth of a picture, and no network.
    """
    if Path(path).is_file():
        load_depth(Path(path), size)
    elif not is_remote(path):
        _kind(resolve(path, "depth", MODEL_FILES))


def _load_npy(file: Path) -> dict[str, Tensor]:
    return {DEPTH: torch.from_numpy(np.load(file, allow_pickle=False))}


def _load_npz(file: Path) -> dict[str, Tensor]:
    with np.load(file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}


READERS: Mapping[str, Callable[[Path], dict[str, Tensor]]] = {
    ".npy": _load_npy,
    ".npz": _load_npz,
    ".safetensors": load_file,
}


def estimate_depth(path: str, image: Tensor, device: torch.device) -> Depth:
    """Estimate the depth of a picture; the network is gone afterwards.

    Depth Pro tells metres and the focal length. Depth Anything tells metres, or only what is nearer
    than what: the nearest is then at 1, the farthest at 20. Depth Pro's weights are for research
    only.

    Args:
        path: folder as transformers saves it, or such a repository on the hub.
        image: -1 to 1. [3, H, W]
        device: where to compute.

    Raises:
        InputError: it holds no network of these kinds.
    """
    # transformers takes seconds to import, and depth from a file does without it.
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    folder = resolve(path, "depth", MODEL_FILES)
    kind = _kind(folder)
    load_processor: Callable[..., Any] = AutoImageProcessor.from_pretrained
    try:
        processor = load_processor(folder, local_files_only=True)
        network = AutoModelForDepthEstimation.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise InputError(f"depth '{path}' cannot be loaded: {error}") from error
    size = (image.shape[1], image.shape[2])
    seen = processor(images=(image + 1) / 2, do_rescale=False, return_tensors="pt").to(device)
    with torch.inference_mode():
        output = network.to(device).eval()(**seen)
        told = processor.post_process_depth_estimation(output, target_sizes=[size])[0]
    return NETWORKS[kind](told)


def _kind(folder: Path) -> str:
    """Say which network a folder holds."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"depth '{folder}': no config.json that can be read: {error}") from error
    kind = str(config.get("model_type"))
    if kind == "depth_anything":
        kind = f"{kind} ({config.get('depth_estimation_type', 'relative')})"
    if kind not in NETWORKS:
        raise InputError(f"depth '{folder}' is '{kind}'{did_you_mean(kind, NETWORKS)}")
    return kind


def _metric(told: Mapping[str, Any]) -> Depth:
    focal = told.get("focal_length")
    return Depth(told["predicted_depth"].float(), None if focal is None else float(focal))


def _relative(told: Mapping[str, Any]) -> Depth:
    return Depth(from_disparity(told["predicted_depth"].float()), None)


def from_disparity(disparity: Tensor, far: float = FAR) -> Tensor:
    """Turn the inverse of depth, up to a factor, into depth from 1 to `far`."""
    return 1 / (disparity / disparity.max()).clamp(min=1 / far)


NETWORKS: Mapping[str, Callable[[Mapping[str, Any]], Depth]] = {
    "depth_pro": _metric,
    "depth_anything (metric)": _metric,
    "depth_anything (relative)": _relative,
}
"""What the networks tell, by kind."""
