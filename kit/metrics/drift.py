"""What long videos lose: colours that drift, jumps between chunks, and movement."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kit.metrics.chunks import split_chunks


def color_drift(frames: Tensor, chunk_starts: Sequence[int]) -> Tensor:
    """Compare the mean colour of each chunk with that of the first.

    Args:
        frames: pixels. [T, height, width, 3]
        chunk_starts: first frame of each chunk, the first 0.

    Returns:
        Mean over R, G and B of the absolute difference, of 255; 0 first. [chunks]
    """
    # As numbers: small tensors left between large ones keep memory from being used again.
    means_of_frames = [frame.double().mean((0, 1)).tolist() for frame in frames]
    colors = torch.tensor(means_of_frames, dtype=torch.float64)  # [T, 3]
    means = torch.stack([part.mean(0) for part in split_chunks(colors, chunk_starts)])
    return (means - means[0]).abs().mean(1).float()


def frame_changes(frames: Tensor) -> Tensor:
    """Compare each frame with the one before: mean absolute difference, of 255. [T - 1]"""
    pairs = zip(frames[1:], frames[:-1], strict=True)
    changes = [(after.float() - before.float()).abs().mean().item() for after, before in pairs]
    return torch.tensor(changes)


def seam_ratio(frames: Tensor, seams: Sequence[int]) -> float | None:
    """Measure how much more a video changes at seams than between them.

    Args:
        frames: pixels. [T, height, width, 3]
        seams: first frame behind each seam, 1 to T - 1.

    Returns:
        Mean change at seams over the median change elsewhere: 1 where a seam is like any frame;
        None without seams, or where nothing moves elsewhere.
    """
    changes = frame_changes(frames)
    at_seam = torch.zeros(len(changes), dtype=torch.bool)
    at_seam[torch.tensor(seams, dtype=torch.long) - 1] = True
    if not at_seam.any() or at_seam.all():
        return None
    usual = changes[~at_seam].median().item()
    return changes[at_seam].mean().item() / usual if usual > 0 else None


def motion_energy(frames: Tensor) -> float:
    """Measure how much a video moves: mean change from frame to frame, of 255; 0 for a still."""
    changes = frame_changes(frames)
    return changes.mean().item() if len(changes) else 0.0
