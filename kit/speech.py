"""Speech features around each video frame, cut alike for training and sampling."""

import torch
from torch import Tensor

from kit.batch import AUDIO_WINDOW


def speech_windows(features: Tensor, start: int, num_frames: int) -> Tensor:
    """Give each video frame the features of its neighbours; beyond the ends the last one repeats.

    Args:
        features: one feature stack for each video frame. [S, T, M, D]
        start: first video frame.
        num_frames: how many.

    Returns:
        [S, num_frames, 5, M, D]

    Source: InfiniteTalk: entries i - 2 to i + 2, clamped to the track.
    """
    reach = AUDIO_WINDOW // 2
    frames = torch.arange(start, start + num_frames)[:, None]
    neighbours = frames + torch.arange(-reach, reach + 1)  # [T, 5]
    return features[:, neighbours.clamp(0, features.shape[1] - 1)]


def mirror_end(features: Tensor, num_frames: int) -> Tensor:
    """Continue a track to num_frames by playing it backwards, then forwards again, and so on.

    The first frame added repeats the last one. [S, T, M, D] -> [S, num_frames, M, D]

    Source: InfiniteTalk fills its last chunk with the reversed end of the speech features.
    """
    there, back = features, features.flip(1)
    pieces = [there]
    while sum(piece.shape[1] for piece in pieces) < num_frames:
        pieces.append(back if len(pieces) % 2 else there)
    return torch.cat(pieces, dim=1)[:, :num_frames]
