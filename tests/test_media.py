"""Pictures and sound survive reading and writing, in colour, time and length."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.audio.stream import AudioStream
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kit.data.media import (
    VideoWriter,
    decode_wav,
    encode_clip,
    encode_wav,
    iter_frames,
    load_image,
    load_speech,
    normalize_loudness,
    probe,
    read_frames,
)
from kit.errors import InputError

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (200, 120, 40), (8, 8, 8)]


def flat(color: Sequence[int], height: int = 32, width: int = 48) -> NDArray[np.uint8]:
    return np.full((height, width, 3), color, np.uint8)


def greys(count: int) -> NDArray[np.uint8]:
    """Frames whose grey tells their number: 4 per frame. [count, 32, 48, 3]"""
    return np.stack([flat((4 * number + 10,) * 3) for number in range(count)])


def numbers(path: Path, fps: float) -> list[int]:
    """Which of the `greys` stands at each point of the grid."""
    return [round((float(frame.mean()) - 10) / 4) for frame in iter_frames(path, fps)]


def tone(seconds: float, rate: int = 16_000, hertz: float = 220, level: float = 0.3) -> Tensor:
    return level * torch.sin(2 * torch.pi * hertz * torch.arange(round(seconds * rate)) / rate)


def write_timed(path: Path, frames: NDArray[np.uint8], times: Sequence[Fraction]) -> None:
    """Write frames at any times, in thousandths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0", "crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for picture, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_sound(path: Path, channels: Tensor, rate: int, start_seconds: float = 0.0) -> None:
    with av.open(str(path), "w") as container:
        video = None
        if path.suffix == ".mkv":
            video = container.add_stream("libx264", rate=25)
            video.height, video.width, video.pix_fmt = 32, 48, "yuv420p"
        layout = "mono" if len(channels) == 1 else "stereo"
        codec = "flac" if path.suffix == ".flac" else "pcm_s16le"
        stream = container.add_stream(codec, rate=rate, layout=layout)
        assert isinstance(stream, AudioStream)
        stream.format = "s16"
        if video is not None:
            for number in range(25):
                frame = av.VideoFrame.from_ndarray(flat((0, 0, 0)), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        samples = (channels.T.reshape(1, -1) * 32767).to(torch.int16).numpy()
        sound = av.AudioFrame.from_ndarray(samples, format="s16", layout=layout)
        sound.sample_rate, sound.time_base = rate, Fraction(1, rate)
        sound.pts = round(start_seconds * rate)
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("color", COLORS)
def test_colors_survive_writing_and_reading(tmp_path: Path, color: tuple[int, int, int]) -> None:
    path = tmp_path / "flat.mp4"
    with VideoWriter(path, fps=25, height=32, width=48) as video:
        video.write(np.stack([flat(color)] * 5))
    frames = np.stack(list(iter_frames(path, 25)))
    assert frames.shape == (5, 32, 48, 3)
    assert np.abs(frames.astype(int) - color).max() <= 3


@pytest.mark.parametrize(("height", "matrix"), [(480, 5), (720, 1)])
def test_untagged_colors_depend_on_height(tmp_path: Path, height: int, matrix: int) -> None:
    path = tmp_path / "untagged.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, 64, "yuv420p"
        picture = av.VideoFrame.from_ndarray(flat((200, 40, 40), height, 64), format="rgb24")
        frame = picture.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=1)
        frame.colorspace = frame.color_range = 2
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    first = next(iter_frames(path, 25))
    assert np.abs(first.astype(int) - (200, 40, 40)).max() <= 3


def test_full_range_is_read_as_such(tmp_path: Path) -> None:
    path = tmp_path / "full.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuvj420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(flat((250, 250, 250)), "rgb24")))
        container.mux(stream.encode(None))
    assert abs(int(next(iter_frames(path, 25)).mean()) - 250) <= 2


@pytest.mark.parametrize(("source_fps", "grid_fps"), [(25, 25), (50, 25), (30, 25), (24, 25)])
def test_grid_shows_the_visible_frame(tmp_path: Path, source_fps: int, grid_fps: int) -> None:
    path = tmp_path / "steady.mp4"
    with VideoWriter(path, fps=source_fps, height=32, width=48) as video:
        video.write(greys(20))
    length = -(-20 * grid_fps // source_fps)
    expected = [number * source_fps // grid_fps for number in range(length)]
    assert numbers(path, grid_fps) == expected
    info = probe(path)
    assert info.num_frames == 20
    assert info.fps == pytest.approx(source_fps, abs=0.01)
    assert info.count_frames(grid_fps) == length


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_uneven_frames_keep_their_times(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"uneven{suffix}"
    times = [Fraction(t, 1000) for t in (0, 40, 200, 240, 400)]
    write_timed(path, greys(5), times)
    assert numbers(path, 25)[:11] == [0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 4]


def test_milliseconds_of_matroska_do_not_repeat_frames(tmp_path: Path) -> None:
    path = tmp_path / "rounded.mkv"
    write_timed(path, greys(30), [Fraction(round(n * 1000 / 30), 1000) for n in range(30)])
    assert numbers(path, 30)[:30] == list(range(30))


def test_avi_with_frames_out_of_order(tmp_path: Path) -> None:
    path = tmp_path / "old.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "3", "crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for number, picture in enumerate(greys(30)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert numbers(path, 25) == list(range(30))


def test_gif_durations(tmp_path: Path) -> None:
    path = tmp_path / "drawing.gif"
    first, *rest = [Image.fromarray(frame) for frame in greys(3)]
    first.save(path, save_all=True, append_images=rest, duration=[100, 300, 200])
    assert numbers(path, 10) == [0, 1, 1, 1, 2, 2]
    assert probe(path).seconds == pytest.approx(0.6)
    assert not probe(path).has_sound


def test_rotated_video_is_upright(tmp_path: Path) -> None:
    path = tmp_path / "phone.mp4"
    picture = flat((0, 0, 0))
    picture[:, :16] = 255
    with VideoWriter(path, fps=25, height=32, width=48) as video:
        video.write(picture[None])
    # The matrix of the track header: identity becomes a quarter turn clockwise.
    unit, minus, scale = (1 << 16).to_bytes(4), (-(1 << 16) % (1 << 32)).to_bytes(4), b"\x40\0\0\0"
    zero = bytes(4)
    identity = unit + zero * 3 + unit + zero * 3 + scale
    turned = zero + unit + zero + minus + zero * 4 + scale
    data = path.read_bytes()
    place = data.index(identity, data.index(b"tkhd"))
    path.write_bytes(data[:place] + turned + data[place + len(turned) :])
    frame = next(iter_frames(path, 25))
    assert frame.shape == (48, 32, 3)
    assert frame[:10].mean() > 240
    assert frame[24:].mean() < 15
    assert (probe(path).height, probe(path).width) == (48, 32)


def test_image_is_upright_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (load_image(tmp_path / "clear.png") == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").shape == (40, 20, 3)


def test_clip_gives_back_exact_frames() -> None:
    frames = greys(60)
    clip = encode_clip(iter(frames), 25)
    assert clip == encode_clip(frames, 25)
    asked = [59, 0, 3, 3, 26]
    read = read_frames(clip, asked)
    assert np.abs(read.astype(int) - frames[asked]).max() <= 1
    with pytest.raises(InputError, match="no frame 60"):
        read_frames(clip, [60])


def test_clip_has_keyframes_and_is_near_lossless(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (30, 4, 6, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_clip(noise, 25))
    with av.open(str(path)) as container:
        keys = [n for n, p in enumerate(container.demux(video=0)) if p.is_keyframe and p.size]
    assert all(later - sooner <= 25 for sooner, later in pairwise(keys))
    error = read_frames(path, range(30)).astype(int) - noise
    assert np.sqrt(np.mean(error**2)) < 3


def test_writer_gives_equal_lengths_and_no_lag(tmp_path: Path) -> None:
    path = tmp_path / "talk.mp4"
    speech = tone(10) * torch.repeat_interleave(torch.rand(100), 1600)
    with VideoWriter(path, fps=25, height=32, width=48, speech=speech) as video:
        for part in np.array_split(greys(31), 4):
            video.write(part)
    assert sorted(tmp_path.iterdir()) == [path]
    with av.open(str(path)) as container:
        seconds = [float((s.duration or 0) * (s.time_base or 0)) for s in container.streams]
        assert seconds == pytest.approx([31 / 25, 31 / 25], abs=1e-4)
    heard = load_speech(path)[: 31 * 640]
    agreement = torch.corrcoef(torch.stack([heard, speech[: 31 * 640]]))[0, 1]
    assert agreement > 0.99
    assert numbers(path, 25) == list(range(31))


def test_short_speech_is_followed_by_silence(tmp_path: Path) -> None:
    path = tmp_path / "short.mp4"
    with VideoWriter(path, fps=25, height=32, width=48, speech=tone(0.4)) as video:
        video.write(greys(25))
    heard = load_speech(path)
    assert len(heard) >= 16_000
    assert heard[8000:].abs().max() < 0.01 < heard[:6000].abs().max()


def test_exception_leaves_a_playable_file(tmp_path: Path) -> None:
    speech = tone(2)
    with (
        pytest.raises(RuntimeError),
        VideoWriter(tmp_path / "x.mp4", fps=25, height=32, width=48, speech=speech) as video,
    ):
        video.write(greys(20))
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["x.partial.mkv"]
    assert numbers(tmp_path / "x.partial.mkv", 25) == list(range(20))


def test_what_is_written_before_a_crash_can_be_played(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "x.mp4", fps=25, height=32, width=48) as video:
        for _ in range(3):
            video.write(greys(60))
        # As it lies on the disk now, with nothing closed.
        crashed = tmp_path / "crashed.mkv"
        crashed.write_bytes((tmp_path / "x.partial.mkv").read_bytes())
    assert numbers(crashed, 25)[:60] == list(range(60))


@pytest.mark.parametrize("name", ["speech.wav", "speech.flac"])
def test_stereo_of_any_rate_becomes_mono_16k(tmp_path: Path, name: str) -> None:
    left = tone(1, rate=44_100)
    write_sound(tmp_path / name, torch.stack([left, torch.zeros_like(left)]), 44_100)
    speech = load_speech(tmp_path / name)
    assert len(speech) == pytest.approx(16_000, abs=3)
    middle = slice(1000, 15_000)
    assert (speech[middle] - tone(1)[middle] / 2).abs().max() < 2e-3


@pytest.mark.parametrize("start", [0.0, 0.25])
def test_sound_that_starts_late_is_aligned(tmp_path: Path, start: float) -> None:
    path = tmp_path / "late.mkv"
    write_sound(path, torch.full((1, 8000), 0.5), 16_000, start)
    speech = load_speech(path)
    first = int((speech > 0.25).nonzero()[0])
    assert first == pytest.approx(start * 16_000, abs=16)


def test_loudness() -> None:
    random = torch.Generator().manual_seed(0)
    for level in (0.02, 0.2, 1.5):
        waveform = level * torch.randn(32_000, generator=random)
        leveled, before = normalize_loudness(waveform)
        assert before is not None
        assert normalize_loudness(leveled)[1] == pytest.approx(-23, abs=0.1)
    quiet, loud = normalize_loudness(0.01 * waveform)[1], normalize_loudness(waveform)[1]
    assert quiet is not None and loud is not None
    assert loud - quiet == pytest.approx(40, abs=0.1)


@pytest.mark.parametrize("waveform", [torch.zeros(16_000), tone(0.3), torch.zeros(0)])
def test_silence_and_short_sound_stay_as_they_are(waveform: Tensor) -> None:
    same, loudness = normalize_loudness(waveform)
    assert loudness is None
    assert torch.equal(same, waveform)


@pytest.mark.parametrize("num_tracks", [1, 2, 3, 6])
def test_wav_is_exact(num_tracks: int) -> None:
    tracks = torch.randn(num_tracks, 1234)
    wav = encode_wav(tracks)
    assert wav == encode_wav(tracks)
    assert torch.equal(decode_wav(wav), tracks)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "it is empty"), (b"not a video" * 100, "damaged"), (None, "no such file")],
)
def test_bad_files_are_named_with_the_reason(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "bad.mp4"
    if content is not None:
        path.write_bytes(content)
    for read in (probe, load_speech, load_image, lambda p: list(iter_frames(p, 25))):
        with pytest.raises(InputError, match=f"bad.mp4 cannot be read: .*{reason}"):
            read(path)


def test_sound_of_no_numbers(tmp_path: Path) -> None:
    waveform = tone(1)
    waveform[100] = torch.nan
    (tmp_path / "a.wav").write_bytes(encode_wav(waveform[None]))
    with pytest.raises(InputError, match="a.wav cannot be read: its sound holds values"):
        load_speech(tmp_path / "a.wav")


def test_sound_is_no_video_and_silence_has_no_sound(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(encode_wav(torch.zeros(1, 800)))
    with pytest.raises(InputError, match="a.wav has no video"):
        probe(tmp_path / "a.wav")
    with VideoWriter(tmp_path / "a.mp4", fps=25, height=32, width=48) as video:
        video.write(greys(2))
    with pytest.raises(InputError, match="a.mp4 has no sound"):
        load_speech(tmp_path / "a.mp4")
