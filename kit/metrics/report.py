"""All measures of one talking video, by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kit.metrics.drift import color_drift, motion_energy, seam_ratio
from kit.metrics.identity import Features, color_identity, feature_identity
from kit.metrics.mouth import opening_by_color, opening_by_motion
from kit.metrics.sync import cross_talk, lip_sync, silence_opening, speech_envelope

Report = dict[str, float | None]


@dataclass(frozen=True)
class Known:
    """What is known of a video beside its pixels and sound; all of it may be missing.

    Attributes:
        region: where the mouth is, see `kit.metrics.mouth`.
        mouth_color: RGB inside the mouth; without it the mouth is read from motion.
        full_opening: what `opening_by_color` says of the mouth wide open; without it, the 95th
            percentile of this clip, so that a mouth that never moves seems open in silence.
        closed_opening: what it says of the closed mouth; more than 0 where dark lips count in part.
        reference: pixels of the character as it should be. [height, width, 3]
        colors: RGB of the character's parts by name, all of them in the reference.
        other_speech: track of another speaker, at 16 kHz. [samples]
    """

    region: Tensor | None = None
    mouth_color: tuple[int, int, int] | None = None
    full_opening: float | None = None
    closed_opening: float = 0.0
    reference: Tensor | None = None
    colors: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    other_speech: Tensor | None = None


def talking_report(
    frames: Tensor,
    waveform: Tensor,
    fps: float,
    chunk_starts: Sequence[int],
    known: Known,
    features: Features | None = None,
) -> Report:
    """Measure one speaker of a video.

    Args:
        frames: pixels. [T, height, width, 3]
        waveform: the speaker's track, at 16 kHz and -23 LUFS. [samples]
        fps: frames per second of the video.
        chunk_starts: first frame of each chunk, the first 0.
        known: what else is known.
        features: makes features of pictures, for `feature_identity`.

    Returns:
        Numbers by name, always the same names; None for what this video cannot tell, such as
        `sync_r` without speech, `silence_opening` without silence, `seam_ratio` of one chunk.

    Raises:
        InputError: the region is empty, or a colour is nowhere in the reference.
    """
    return {
        **_speech(frames, waveform, fps, known),
        **_picture(frames, chunk_starts),
        **_identity(frames, chunk_starts, known, features),
    }


def _speech(frames: Tensor, waveform: Tensor, fps: float, known: Known) -> Report:
    opening = _opening(frames, known)
    envelope = speech_envelope(waveform, fps, len(frames))
    sync = lip_sync(opening, envelope) if envelope.any() else None
    talk = None
    # Who speaks too moves the mouth for a reason of their own.
    if known.other_speech is not None and not envelope.any():
        talk = cross_talk(opening, speech_envelope(known.other_speech, fps, len(frames)))
    return {
        "sync_r": sync.r if sync else None,
        "lag_frames": float(sync.lag_frames) if sync and sync.r else None,
        "silence_opening": silence_opening(opening, envelope, full_opening=1.0),
        "cross_talk": talk,
    }


def _opening(frames: Tensor, known: Known) -> Tensor:
    """The opening of each frame, 0 closed to 1 wide open; beyond 1 where wider than known."""
    if known.mouth_color is None:
        return opening_by_motion(frames, known.region)
    opening = opening_by_color(frames, known.region, known.mouth_color)
    full = known.full_opening or opening.quantile(0.95).item()
    return (opening - known.closed_opening) / max(full - known.closed_opening, 1e-6)


def _picture(frames: Tensor, chunk_starts: Sequence[int]) -> Report:
    has_seams = len(chunk_starts) > 1
    drift = color_drift(frames, chunk_starts)
    return {
        "seam_ratio": seam_ratio(frames, chunk_starts[1:]),
        "color_drift": drift.max().item() if has_seams else None,
        "motion_energy": motion_energy(frames),
    }


def _identity(
    frames: Tensor, chunk_starts: Sequence[int], known: Known, features: Features | None
) -> Report:
    colors = similarity = None
    if known.reference is not None and known.colors:
        colors = color_identity(frames, known.reference, known.colors)
    if known.reference is not None and features is not None:
        with torch.inference_mode():
            similarity = feature_identity(frames, known.reference, features, chunk_starts)
    return {
        "color_share_error": colors.share_error.mean().item() if colors else None,
        "color_distance": colors.distance.mean().item() if colors else None,
        "feature_identity": similarity.min().item() if similarity is not None else None,
    }
