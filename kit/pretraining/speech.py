"""The speech encoder of a small base."""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks  # type: ignore[import-untyped]
from transformers import AutoConfig, Wav2Vec2Model

from kit.batch import SAMPLE_RATE
from kit.data.clips import RawSample
from kit.draws import seed_of
from kit.models.encoders import SpeechEncoder
from kit.pretraining.base import EncoderTask, save_part
from kit.recipe import ExistingFolder

_WINDOW = 1024
_FLOOR = 1e-6


class SpeechFeatures(EncoderTask):
    """Trains wav2vec 2.0 to tell the loudness of frequency bands in each video frame.

    Every layer is asked, because the denoiser sees the outputs of all of them.

    Args:
        seed: of the first weights.
        config: folder whose `config.json` tells the sizes.
        fps: video frames per second.
        bands: mel bands.
    """

    def __init__(
        self,
        seed: int,
        *,
        config: ExistingFolder,
        fps: Annotated[int, Field(ge=1)] = 25,
        bands: Annotated[int, Field(ge=1)] = 24,
    ) -> None:
        self._config: dict[str, Any] = json.loads((Path(config) / "config.json").read_text())
        torch.manual_seed(seed_of(seed, "weights"))
        self._wav2vec = Wav2Vec2Model(AutoConfig.from_pretrained(config))
        self._encoder = SpeechEncoder(self._wav2vec, fps)
        self._heads = nn.Linear(self._wav2vec.config.hidden_size, bands)
        self._network = nn.ModuleDict({"wav2vec": self._wav2vec, "heads": self._heads})
        self._fps = fps
        self._filters = melscale_fbanks(_WINDOW // 2 + 1, 60.0, SAMPLE_RATE / 2, bands, SAMPLE_RATE)

    @property
    def network(self) -> nn.Module:
        """The encoder and the layer that reads the bands from it."""
        return self._network

    def losses(self, batch: list[RawSample]) -> dict[str, Tensor]:
        """Compare what the layers tell with the bands of the sound."""
        errors = []
        for track in (track for raw in batch for track in raw.tracks if track.any()):
            layers = self._encoder.encode(track.to(self._wav2vec.device))  # [T, M, D]
            told = self._heads(layers.float())  # [T, M, bands]
            heard = band_levels(track, self._fps, self._filters).to(told)[: len(told)]
            errors.append((told[: len(heard)] - heard[:, None]).square().mean())
        if not errors:
            errors = [self._heads.weight.sum() * 0]
        return {"bands": torch.stack(errors).mean()}

    def finish(self, batches: list[list[RawSample]]) -> None:
        """Measure nothing."""

    def save(self, folder: Path) -> None:
        """Write `audio_encoder/`."""
        save_part(folder / "audio_encoder", self._config, self._wav2vec, "model.safetensors")


def band_levels(track: Tensor, fps: int, filters: Tensor) -> Tensor:
    """Measure the level of each band around each video frame, about -1 to 1.

    Args:
        track: at 16 kHz. [samples]
        fps: video frames per second.
        filters: share of each frequency in each band. [frequencies, bands]

    Returns:
        [T, bands]
    """
    scaled = track / (track.square().mean() + _FLOOR).sqrt()
    spectrum = torch.stft(
        scaled,
        _WINDOW,
        hop_length=SAMPLE_RATE // fps,
        window=torch.hann_window(_WINDOW),
        return_complex=True,
    )
    power = spectrum.abs().square().T @ filters / _WINDOW  # [T, bands]
    return (power.clamp(min=_FLOOR).log10() + 2) / 4
