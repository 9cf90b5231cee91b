"""What several test files share: the tiny base, and shards of clips that are drawn here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from kit.batch import Batch, collate
from kit.data.encode import encode_shards
from kit.data.media import VideoWriter, encode_wav
from kit.data.module import ShardData
from kit.data.prepare import prepare
from kit.draws import draw_normal
from kit.models.base import Encoders
from kit.models.wan import Wan
from kit.models.wan_base import WanBase

TINY_BASE = Path(__file__).parents[1] / "data" / "tiny_base"
CPU = torch.device("cpu")
FPS, SIZE, CLIP_FRAMES, WINDOW_FRAMES = 25, 64, 55, 9


@pytest.fixture(scope="session")
def tiny_base() -> WanBase:
    """The real classes at a small size, with drawn weights."""
    return WanBase(path=str(TINY_BASE), random_weights=0, dtype="float32")


@pytest.fixture(scope="session")
def tiny_denoiser(tiny_base: WanBase) -> Callable[[], Wan]:
    """Make a denoiser; all have equal weights."""

    def load() -> Wan:
        model = tiny_base.load_denoiser(CPU)
        assert isinstance(model, Wan)
        return model

    return load


@pytest.fixture(scope="session")
def tiny_encoders(tiny_base: WanBase) -> Encoders:
    """The encoders of the tiny base."""
    return tiny_base.load_encoders(CPU)


@pytest.fixture(scope="session")
def raw_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of one speaker, one of two speakers and a still, in shards of two."""
    media, out = tmp_path_factory.mktemp("media"), tmp_path_factory.mktemp("raw")
    for number, name in enumerate(("ann", "bob", "duo")):
        speech = 0.1 * draw_normal((CLIP_FRAMES * 640,), number, "speech")
        with VideoWriter(
            media / f"{name}.mp4", fps=FPS, height=SIZE, width=SIZE, speech=speech
        ) as writer:
            writer.write(draw_pictures(number, CLIP_FRAMES))
        (media / f"{name}.txt").write_text(f"{name} speaks")
    for number in (1, 2):
        speech = 0.1 * draw_normal((1, CLIP_FRAMES * 640), number, "speaker")
        (media / f"duo.speaker{number}.wav").write_bytes(encode_wav(speech))
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[:, 32 * (number - 1) : 32 * number] = 255
        Image.fromarray(mask).save(media / f"duo.speaker{number}.png")
    Image.fromarray(draw_pictures(9, 1)[0]).save(media / "still.png")
    prepare(
        media,
        out,
        buckets=f"{SIZE}x{SIZE}",
        window_frames=WINDOW_FRAMES,
        samples_per_shard=2,
        report=lambda line: None,
    )
    return out


@pytest.fixture(scope="session")
def shard_data(tiny_base: WanBase) -> Callable[..., ShardData]:
    """Make the data section of a recipe for a folder of shards; options as in the recipe."""
    sizes = tiny_base.geometry

    def make(path: Path, **options: Any) -> ShardData:
        settings = {
            "window_frames": WINDOW_FRAMES,
            "windows_per_clip": 2,
            "references_per_window": 1,
            "context_frames": 5,
            "first_chunk": 0.5,
            "num_workers": 0,
        }
        return ShardData(
            sizes.frame_stride,
            sizes.pixel_stride,
            sizes.fps,
            tiny_base.fingerprint(),
            path=str(path),
            **{**settings, **options},
        )

    return make


@pytest.fixture(scope="session")
def encoded_shards(
    raw_shards: Path,
    shard_data: Callable[..., ShardData],
    tiny_encoders: Encoders,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The raw shards, encoded in float32."""
    out, data = tmp_path_factory.mktemp("encoded"), shard_data(raw_shards)
    encode_shards(
        raw_shards,
        out,
        data.clip_encoder(tiny_encoders),
        data.plan,
        data.settings,
        lambda line: None,
        clips_per_shard=2,
    )
    return out


@pytest.fixture(scope="session")
def batch(
    encoded_shards: Path, shard_data: Callable[..., ShardData], tiny_encoders: Encoders
) -> Batch:
    """A window of each of the three clips: one with two speakers, first chunks and others."""
    data = shard_data(encoded_shards)
    data.prepare_run(lambda: tiny_encoders, seed=0, num_batches=1, place=(0, 1))
    clips = data.train_dataloader().dataset
    return collate([clips[2, number] for number in range(3)])


def draw_pictures(seed: int, count: int) -> NDArray[np.uint8]:
    """Draw smooth moving colours. [T, height, width, 3]"""
    time = np.arange(count)[:, None, None, None] / FPS
    rows, columns = np.mgrid[:SIZE, :SIZE][..., None] / SIZE
    phase = np.arange(3) + seed
    waves = np.sin(6 * columns + 4 * time + phase) * np.cos(5 * rows - 3 * time + seed)
    pictures: NDArray[np.uint8] = (127 + 120 * waves).astype(np.uint8)
    return pictures
