"""Whether a character stays the same: by known colours, or by features of a trained network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from kit.errors import InputError
from kit.metrics.chunks import split_chunks

Features = Callable[[Tensor], Tensor]
"""Maps pictures, 0 to 1, [N, 3, height, width], to a vector each, [N, D]."""

NEAR = 40.0
"""RGB distance, of 255, at which a pixel counts exp(-1/2) as one of a colour."""

_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class ColorIdentity:
    """How far the colours of a character are from the reference picture, frame by frame.

    Attributes:
        share_error: difference in the share of the picture, relative to the reference and at
            most 1; mean over the colours. [T]
        distance: RGB distance, of 255, from a colour to as many of the nearest pixels as the
            reference has of it; mean over the colours. [T]
    """

    share_error: Tensor
    distance: Tensor


def color_identity(
    frames: Tensor, reference: Tensor, colors: Mapping[str, tuple[int, int, int]]
) -> ColorIdentity:
    """Compare a character's known colours with the reference picture.

    A turned head or a moved camera changes shares too; the distance tells paint from pose.

    Args:
        frames: pixels. [T, height, width, 3]
        reference: pixels of the character as it should be. [height, width, 3]
        colors: RGB of each part by its name, such as hair.

    Raises:
        InputError: a colour is nowhere in the reference.
    """
    curves = [_compare(frames, reference, name, color) for name, color in colors.items()]
    shares, distances = zip(*curves, strict=True)
    return ColorIdentity(torch.stack(shares).mean(0), torch.stack(distances).mean(0))


def feature_identity(
    frames: Tensor,
    reference: Tensor,
    model: Features,
    chunk_starts: Sequence[int],
    frames_per_chunk: int = 4,
) -> Tensor:
    """Compare chunks with a reference picture by the features of a network.

    Args:
        frames: pixels. [T, height, width, 3]
        reference: pixels of the character as it should be. [height, width, 3]
        model: what makes features, such as `load_features` returns.
        chunk_starts: first frame of each chunk, the first 0.
        frames_per_chunk: frames looked at, spread evenly over a chunk.

    Returns:
        Mean cosine similarity, 1 for the same features. [chunks]
    """
    target = model(_to_unit(reference[None]))
    chunks = [_spread(chunk, frames_per_chunk) for chunk in split_chunks(frames, chunk_starts)]
    scores = [F.cosine_similarity(model(_to_unit(chunk)), target).mean() for chunk in chunks]
    return torch.stack(scores)


def load_features(folder: Path) -> Features:
    """Load an image network such as DINOv2 in timm's layout; nothing is downloaded.

    Args:
        folder: holds `config.json` and `model.safetensors`, as timm saves and publishes them.

    Raises:
        InputError: a file is missing, or timm cannot read them.
    """
    missing = [name for name in ("config.json", _WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: {' and '.join(missing)} missing; give a folder saved by timm")
    import timm  # takes a second, which most runs need not wait for

    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    except (RuntimeError, TypeError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{folder}: timm cannot load this network: {error}") from error
    return _prepared(model.eval().requires_grad_(False))


def _compare(
    frames: Tensor, reference: Tensor, name: str, color: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    target = _nearness(reference, color)
    count = int((target > 0.5).sum())
    if not count:
        raise InputError(f"colors.{name}: no pixel of the reference is near {color}")
    # As numbers: small tensors left between large ones keep memory from being used again.
    share = torch.tensor([_nearness(frame, color).mean().item() for frame in frames])
    distances = torch.tensor([_nearest(frame, color, count) for frame in frames])
    return (share / target.mean().item() - 1).abs().clamp(max=1), distances


def _nearest(frame: Tensor, color: tuple[int, int, int], count: int) -> float:
    """Mean distance of the nearest pixels from a colour."""
    return _distances(frame, color).flatten().topk(count, largest=False).values.mean().item()


def _nearness(picture: Tensor, color: tuple[int, int, int]) -> Tensor:
    """Weight of each pixel, 1 at the colour. [height, width]"""
    return torch.exp(_distances(picture, color).square() / (-2 * NEAR**2))


def _distances(picture: Tensor, color: tuple[int, int, int]) -> Tensor:
    distances: Tensor = (picture.float() - torch.tensor(color, device=picture.device)).norm(dim=-1)
    return distances


def _prepared(model: nn.Module) -> Features:
    from timm.data.config import resolve_model_data_config

    data = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    size = data["input_size"][-2:]

    def features(pictures: Tensor) -> Tensor:
        resized = F.interpolate(pictures, size, mode="bicubic", antialias=True).clamp(0, 1)
        vectors: Tensor = model((resized - mean) / std)
        return vectors

    return features


def _spread(chunk: Tensor, count: int) -> Tensor:
    return chunk[torch.linspace(0, len(chunk) - 1, min(count, len(chunk))).round().long()]


def _to_unit(pictures: Tensor) -> Tensor:
    """Pixels to the form a network reads. [N, height, width, 3] to [N, 3, height, width]"""
    return pictures.movedim(-1, 1).float() / 255
