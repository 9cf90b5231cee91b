"""Reading speech, bringing it to one loudness, and its form in shards."""

from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import torch
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.filter import Graph
from av.stream import Disposition
from torch import Tensor

from kit.batch import SAMPLE_RATE
from kit.data.container import open_media
from kit.errors import InputError

TARGET_LOUDNESS = -23.0
"""In LUFS. Source: InfiniteTalk brings each speaker's track to it (ITU-R BS.1770)."""

_SHORTEST_METERED = round(0.4 * SAMPLE_RATE)
_CLAMP_FREE_PEAK = 0.25


def load_speech(path: Path) -> Tensor:
    """Load a sound file, or the sound of a video, as one track of 16 kHz; channels are averaged.

    Of a video, time 0 is the first frame: sound that starts earlier is cut, silence stands before
    sound that starts later and in gaps.

    Returns:
        About -1 to 1. [samples]

    Raises:
        InputError: the file is missing, empty, damaged or has no sound.
    """
    with open_media(path) as container:
        if not container.streams.audio:
            raise InputError(f"{path} has no sound")
        stream = container.streams.audio[0]
        graph = _resampling_graph(stream, _video_start(container))
        chunks: list[Tensor] = []
        for frame in container.decode(stream):
            graph.push(frame)
            chunks += _pull_all(graph)
        graph.push(None)
        chunks += _pull_all(graph)
    waveform = torch.cat(chunks) if chunks else torch.zeros(0)
    if not len(waveform):
        raise InputError(f"{path} cannot be read: its sound is empty")
    if not waveform.isfinite().all():
        raise InputError(f"{path} cannot be read: its sound holds values that are not numbers")
    return waveform


def normalize_loudness(waveform: Tensor) -> tuple[Tensor, float | None]:
    """Bring speech to -23 LUFS; silence, or less than 0.4 s, stays as it is.

    Args:
        waveform: at 16 kHz. [samples]

    Returns:
        The waveform and the loudness that it had, in LUFS; None where it was not changed.
    """
    # Loading this package takes a second, which reading pictures alone should not pay.
    from torchaudio.functional import loudness  # type: ignore[import-untyped]

    peak = float(waveform.abs().max()) if len(waveform) else 0.0
    if len(waveform) < _SHORTEST_METERED or peak == 0:
        return waveform, None
    # The meter's filters clamp at 1, so it is given a copy with room above its peak.
    room = min(1.0, _CLAMP_FREE_PEAK / peak)
    measured = float(loudness(waveform[None] * room, SAMPLE_RATE)) - 20 * np.log10(room)
    if not np.isfinite(measured):
        return waveform, None
    return waveform * 10 ** ((TARGET_LOUDNESS - measured) / 20), float(measured)


def encode_wav(tracks: Tensor) -> bytes:
    """Write tracks as a 32-bit float wav at 16 kHz, one channel for each.

    Args:
        tracks: [S, samples]
    """
    num_tracks, num_samples = tracks.shape
    layout = "mono" if num_tracks == 1 else f"{num_tracks} channels"
    file = BytesIO()
    # `bitexact` leaves out the library's version, so that equal sound has equal bytes.
    with av.open(file, "w", format="wav", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("pcm_f32le", rate=SAMPLE_RATE, layout=layout)
        frame = av.AudioFrame(format="flt", layout=layout, samples=num_samples)
        frame.sample_rate = SAMPLE_RATE
        samples_first = tracks.T.contiguous().float().numpy()
        frame.planes[0].update(samples_first.astype("<f4").tobytes())
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def decode_wav(wav: bytes) -> Tensor:
    """Read what `encode_wav` wrote. [S, samples]

    Raises:
        InputError: the bytes are damaged.
    """
    with open_media(wav) as container:
        num_tracks = container.streams.audio[0].channels
        chunks = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return torch.from_numpy(np.concatenate(chunks)).reshape(-1, num_tracks).T.contiguous()


def _resampling_graph(stream: AudioStream, origin: Fraction | None) -> Graph:
    graph = Graph()
    timing = f":first_pts={round(origin * SAMPLE_RATE)}" if origin is not None else ""
    steps = [
        graph.add_abuffer(template=stream, time_base=stream.time_base),
        # `async=1` fills gaps and cuts overlaps; it does not stretch.
        graph.add("aresample", f"{SAMPLE_RATE}:async=1{timing}"),
        graph.add("aformat", "sample_fmts=fltp"),
        graph.add("abuffersink"),
    ]
    graph.link_nodes(*steps).configure()
    return graph


def _pull_all(graph: Graph) -> list[Tensor]:
    chunks: list[Tensor] = []
    while True:
        try:
            frame = graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return chunks
        # The library's own mixing to mono would add channels up, not average them.
        chunks.append(torch.from_numpy(frame.to_ndarray().mean(axis=0)))


def _video_start(container: InputContainer) -> Fraction | None:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic and stream.time_base:
            return (stream.start_time or 0) * stream.time_base
    return None
