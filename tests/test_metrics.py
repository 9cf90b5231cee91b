"""Measures of talking video: closed forms on drawn pictures and made sounds."""

import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import Tensor

from kit.batch import SAMPLE_RATE
from kit.draws import draw_normal
from kit.errors import InputError
from kit.metrics.drift import color_drift, frame_changes, motion_energy, seam_ratio
from kit.metrics.identity import color_identity, feature_identity, load_features
from kit.metrics.mouth import box_regions, opening_by_color, opening_by_motion
from kit.metrics.report import Known, talking_report
from kit.metrics.sync import (
    CEILING_DB,
    FLOOR_DB,
    cross_talk,
    lip_sync,
    silence_opening,
    speech_envelope,
)

FPS, SIZE = 25, 64
MOUTH, SKIN, HAIR, SHIRT = (130, 20, 40), (250, 220, 190), (90, 140, 220), (40, 160, 90)
REGION = box_regions(torch.tensor([16, 32, 48, 56]), SIZE, SIZE)


def face(half_height: float, shift: float = 0.0) -> Tensor:
    """Draw hair, skin, a shirt and a mouth whose height follows the opening. [H, W, 3]"""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    picture = torch.tensor(SKIN).float().expand(SIZE, SIZE, 3).clone()
    picture[rows < 16], picture[rows >= 58] = torch.tensor([HAIR, SHIRT]).float()
    inside = (half_height - (rows - 44).abs()).clamp(0, 1) * ((columns - 32 - shift).abs() < 9)
    return torch.lerp(picture, torch.tensor(MOUTH).float(), inside[..., None].float())


def talk(opening: Tensor, shift: float = 0.0) -> Tensor:
    """Draw a clip; a mouth opens 5 pixels up and down. [T, H, W, 3]"""
    frames = [face(5 * float(value), shift * number) for number, value in enumerate(opening)]
    return torch.stack(frames).round().to(torch.uint8)


def blurred(frames: Tensor) -> Tensor:
    """Halve the size and double it again, as a codec halves colour."""
    pixels = frames.movedim(-1, 1).float()
    small = F.interpolate(pixels, scale_factor=0.5, mode="bilinear", antialias=True)
    back = F.interpolate(small, size=(SIZE, SIZE), mode="bilinear")
    return back.movedim(1, -1).round().clamp(0, 255).to(torch.uint8)


def drawn_opening(num_frames: int, seed: int = 0) -> Tensor:
    """Draw an opening from 0 to 1 with rests. [T]"""
    smooth = F.avg_pool1d(draw_normal((1, num_frames + 4), seed), 5, stride=1)[0]
    return (0.2 + smooth).clamp(0, 1)


def speech(envelope: Tensor) -> Tensor:
    """Make a square wave that has this envelope. [samples]"""
    level = FLOOR_DB + envelope * (CEILING_DB - FLOOR_DB)
    amplitude = torch.where(envelope > 0, 10 ** (level / 20), torch.zeros_like(level))
    wave = torch.tensor([1.0, -1.0]).repeat(SAMPLE_RATE // FPS // 2)
    return (amplitude[:, None] * wave).flatten()


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])


def test_box_regions() -> None:
    region = box_regions(torch.tensor([[2, 1, 4, 3], [0, 0, 1, 1]]), 4, 6, margin=1)
    assert region.shape == (2, 4, 6)
    assert region[0].nonzero().tolist() == [
        [row, column] for row in range(4) for column in range(1, 5)
    ]
    assert region[1].sum() == 4


def test_the_area_of_a_mouth_is_its_share_of_the_picture() -> None:
    share = opening_by_color(talk(torch.tensor([0.0, 0.6, 1.0])), REGION, MOUTH)
    # At 0.6 five rows of 17 columns are filled, at 1 nine.
    expected = torch.tensor([0, 5 * 17, 9 * 17]) / SIZE**2
    torch.testing.assert_close(share, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("change", [lambda frames: frames, blurred], ids=["sharp", "blurred"])
def test_the_opening_can_be_read_by_color_and_by_motion(change) -> None:  # type: ignore[no-untyped-def]
    opening = drawn_opening(60)
    frames = change(talk(opening))
    assert correlation(opening_by_color(frames, REGION, MOUTH), opening) > 0.97
    assert correlation(opening_by_color(frames, None, MOUTH), opening) > 0.97
    assert correlation(opening_by_motion(frames, REGION), opening) > 0.97


def test_a_region_may_follow_the_mouth() -> None:
    opening = drawn_opening(60)
    frames, left = talk(opening, shift=0.25), 16 + 0.25 * torch.arange(60)
    rows = torch.full((60,), 32)
    boxes = torch.stack([left, rows, left + 32, rows + 24], 1)
    regions = box_regions(boxes, SIZE, SIZE)
    assert correlation(opening_by_color(frames, regions, MOUTH), opening) > 0.97
    assert correlation(opening_by_motion(frames, regions), opening) > 0.9


def test_motion_needs_no_color_and_ignores_the_rest_of_the_picture() -> None:
    opening = drawn_opening(60)
    frames = talk(opening).float().mean(-1, keepdim=True).expand(-1, -1, -1, 3).clone()
    frames[:, :10] = 255 * drawn_opening(60, seed=1)[:, None, None, None]
    assert correlation(opening_by_motion(frames.to(torch.uint8), REGION), opening) > 0.97


def test_a_still_mouth_has_no_motion() -> None:
    assert opening_by_motion(talk(torch.full((6,), 0.5)), REGION).tolist() == [0] * 6


@pytest.mark.parametrize("measure", ["color", "motion"])
def test_bad_regions_are_refused(measure: str) -> None:
    frames = talk(torch.zeros(3))

    def read(region: Tensor) -> Tensor:
        if measure == "color":
            return opening_by_color(frames, region, MOUTH)
        return opening_by_motion(frames, region)

    with pytest.raises(InputError, match="region: it covers nothing of the picture"):
        read(torch.zeros(SIZE, SIZE))
    regions = REGION.expand(3, -1, -1).clone()
    regions[1] = False
    with pytest.raises(InputError, match="region: it covers nothing of frame 1"):
        read(regions)
    with pytest.raises(InputError, match=r"region: its size is \[8, 8\]"):
        read(torch.ones(8, 8))


def test_a_region_that_is_all_mouth_is_refused() -> None:
    frames = talk(torch.ones(2))
    inside = box_regions(torch.tensor([30, 43, 34, 46]), SIZE, SIZE)
    with pytest.raises(InputError, match=r"region: .* near the mouth's, \(130, 20, 40\)"):
        opening_by_color(frames, inside, MOUTH)


def test_dark_skin_does_not_count_as_mouth() -> None:
    frames = talk(torch.zeros(2))
    frames[:, 16:58] = torch.tensor([90, 60, 50], dtype=torch.uint8)
    assert opening_by_color(frames, REGION, MOUTH).tolist() == [0, 0]


def test_the_envelope_is_a_scale_of_decibels() -> None:
    levels = torch.tensor([0.0, 0.25, 0.5, 1.0]).repeat_interleave(3)
    held = speech_envelope(speech(levels), FPS, 12)[1::3]
    assert held.tolist() == pytest.approx([0, 0.25, 0.5, 1], abs=1e-4)
    louder = speech_envelope(2 * speech(levels), FPS, 15)
    assert louder[[10, 13, 14]].tolist() == [1, 0, 0]
    assert len(speech_envelope(speech(levels), 29.97, 5)) == 5


def test_the_envelope_hears_half_a_frame_more_on_each_side() -> None:
    heard = speech_envelope(speech(torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0])), FPS, 5)
    half, quarter = (0.5 + 10 * math.log10(share) / 35 for share in (1 / 2, 1 / 4))
    assert heard.tolist() == pytest.approx([0, quarter, half, quarter, 0], abs=1e-3)


@pytest.mark.parametrize("lag", [-8, -3, 0, 1, 8])
def test_a_delayed_copy_has_its_lag_and_agrees_fully(lag: int) -> None:
    signal = drawn_opening(140)
    # With lag 3 the picture shows at frame 20 what sounded at frame 17.
    picture, sound = signal[20 - lag : 120 - lag], signal[20:120]
    sync = lip_sync(3 * picture + 1, sound)
    assert sync.lag_frames == lag
    assert sync.r == pytest.approx(1)


def test_signals_without_relation() -> None:
    assert lip_sync(torch.full((50,), 0.3), drawn_opening(50)) == lip_sync(
        drawn_opening(50), torch.zeros(50)
    )
    assert lip_sync(torch.full((50,), 0.3), drawn_opening(50)).r == 0
    noise = lip_sync(draw_normal((2000,), 1), draw_normal((2000,), 2))
    assert abs(noise.r) < 0.1
    assert lip_sync(-drawn_opening(60), drawn_opening(60), max_lag=0).r == pytest.approx(-1)


def test_opening_in_silence() -> None:
    envelope = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0.0])
    opening = torch.tensor([2, 4, 9, 9, 9, 9, 3, 1.0])
    assert silence_opening(opening, envelope, 10, guard_frames=2) == pytest.approx(0.25)
    assert silence_opening(opening, envelope, 10, guard_frames=0) == pytest.approx(28 / 60)
    assert silence_opening(opening, envelope, 9, 1, guard_frames=2) == pytest.approx(6 / 32)
    assert silence_opening(opening, torch.ones(8), 10) is None
    assert silence_opening(opening, envelope[2:].repeat(2)[:8], 10, guard_frames=4) is None


def test_cross_talk() -> None:
    other = drawn_opening(100)
    assert cross_talk(0.1 * other, other) == pytest.approx(1)
    assert cross_talk(torch.zeros(100), other) == 0


def test_color_drift_of_a_ramp() -> None:
    ramp = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 4, 4, 3)
    assert color_drift(ramp, [0, 4, 8]).tolist() == [0, 4, 8]
    red = ramp.clone()
    red[..., 1:] = 7
    assert color_drift(red, [0, 6]).tolist() == [0, 2]


def test_a_seam_of_known_size() -> None:
    steps = torch.tensor([0, 2, 2, 2, 10, 2, 2, 10, 2])
    frames = steps.cumsum(0).to(torch.uint8)[:, None, None, None].expand(9, 4, 4, 3)
    assert frame_changes(frames).tolist() == steps[1:].tolist()
    assert seam_ratio(frames, [4, 7]) == 5
    assert seam_ratio(frames, [4]) == 5
    assert seam_ratio(frames, [2]) == 1
    assert motion_energy(frames) == 4


def test_what_has_no_seam_ratio() -> None:
    still = torch.zeros(5, 4, 4, 3, dtype=torch.uint8)
    assert seam_ratio(still, []) is None
    assert seam_ratio(still, [2]) is None
    assert seam_ratio(still[:2], [1]) is None
    assert motion_energy(still) == 0
    assert motion_energy(still[:1]) == 0


def test_known_colors() -> None:
    same = talk(torch.zeros(3))
    faded = same.clone()
    faded[1, :16] = torch.tensor([120, 140, 220], dtype=torch.uint8)
    faded[2, 8:16] = torch.tensor(SKIN, dtype=torch.uint8)
    identity = color_identity(faded, same[0], {"hair": HAIR})
    assert identity.distance[0] == 0
    assert identity.share_error[0] == pytest.approx(0, abs=1e-5)
    assert identity.distance[1] == pytest.approx(30)
    assert identity.share_error[2] == pytest.approx(0.5, abs=1e-2)
    both = color_identity(faded, same[0], {"hair": HAIR, "shirt": SHIRT})
    torch.testing.assert_close(both.distance, identity.distance / 2)
    with pytest.raises(InputError, match=r"colors.eyes: no pixel .* near \(255, 0, 255\)"):
        color_identity(same, same[0], {"eyes": (255, 0, 255)})


def test_features_of_chunks() -> None:
    frames = torch.zeros(8, 4, 4, 3, dtype=torch.uint8)
    frames[:4, ..., 0] = frames[4:6, ..., 1] = 255
    frames[6:, ..., 0] = 255
    curve = feature_identity(frames, frames[0], lambda x: x.mean((2, 3)), [0, 4], 4)
    assert curve.tolist() == pytest.approx([1, 0.5])


def save_network(folder: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, depth=1)
    save_for_hf(model, str(folder), model_args={"depth": 1}, safe_serialization=True)


def test_features_are_loaded_from_a_folder(tmp_path: Path) -> None:
    save_network(tmp_path)
    frames = talk(drawn_opening(6))
    with torch.inference_mode():
        features = load_features(tmp_path)
        again = load_features(tmp_path)
        pictures = frames[:1].movedim(-1, 1).float() / 255
        assert features(pictures).shape == (1, 192)
        torch.testing.assert_close(features(pictures), again(pictures))
        curve = feature_identity(frames, frames[0], features, [0, 3], 2)
    assert curve.shape == (2,)
    assert 0 < curve[1] <= curve[0] + 1e-3


def test_a_network_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="config.json and model.safetensors missing"):
        load_features(tmp_path)
    save_network(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "no_such_network"}')
    with pytest.raises(InputError, match="cannot load this network.*no_such_network"):
        load_features(tmp_path)


def test_report_of_a_perfect_clip() -> None:
    waveform = speech(drawn_opening(80))
    frames = talk(speech_envelope(waveform, FPS, 80).roll(2))
    known = Known(region=REGION, mouth_color=MOUTH, reference=face(0), colors={"hair": HAIR})
    report = talking_report(frames, waveform, FPS, [0, 40], known, lambda x: x.mean((2, 3)))
    assert report["sync_r"] is not None and report["sync_r"] > 0.97
    assert report["lag_frames"] == 2
    assert report["silence_opening"] == pytest.approx(0, abs=1e-3)
    assert report["color_distance"] == 0
    assert [name for name, value in report.items() if value is None] == ["cross_talk"]


def test_report_by_motion_has_the_same_names() -> None:
    waveform = speech(drawn_opening(80))
    frames = talk(speech_envelope(waveform, FPS, 80))
    by_motion = talking_report(frames, waveform, FPS, [0], Known(region=REGION))
    assert by_motion["sync_r"] is not None and by_motion["sync_r"] > 0.97
    assert by_motion["lag_frames"] == 0
    unknown = {name for name, value in by_motion.items() if value is None}
    assert unknown == {
        "cross_talk",
        "seam_ratio",
        "color_drift",
        "color_share_error",
        "color_distance",
        "feature_identity",
    }


def test_report_of_a_listener() -> None:
    other = speech(drawn_opening(80))
    known = Known(region=REGION, mouth_color=MOUTH, full_opening=0.04, other_speech=other)
    frames = talk(speech_envelope(other, FPS, 80))
    report = talking_report(frames, torch.zeros(80 * 640), FPS, [0], known)
    assert report["sync_r"] is None and report["lag_frames"] is None
    assert report["cross_talk"] is not None and report["cross_talk"] > 0.97
    assert report["silence_opening"] is not None and report["silence_opening"] > 0.1


def test_report_without_silence_or_movement() -> None:
    known = Known(region=REGION, mouth_color=MOUTH)
    envelope = 0.5 + 0.5 * drawn_opening(20)
    report = talking_report(talk(torch.zeros(20)), speech(envelope), FPS, [0], known)
    assert report["sync_r"] == 0
    assert report["lag_frames"] is None
    assert report["silence_opening"] is None
    assert report["motion_energy"] == 0
