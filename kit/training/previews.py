"""Short talking videos on the way, made and measured as `kit sample --report` does."""

import logging
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from pydantic import Field
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from kit.batch import SAMPLE_RATE, Conditions
from kit.data.media import VideoWriter
from kit.errors import InputError
from kit.metrics.video_report import Measure, VideoReport
from kit.models.base import Encoders
from kit.models.inside import UNTOUCHED, Inside
from kit.recipe import ExistingFile
from kit.sampling.frames import to_pictures
from kit.sampling.pipeline import Predict, TalkSampler, no_progress
from kit.sampling.scene import Scene
from kit.training.ema import AdapterEMA
from kit.training.module import Fitting

_LOG = logging.getLogger(__name__)

GIF_EVERY = 2
"""TensorBoard gets every n-th frame."""


class PreviewSettings:
    """What previews show, and how often.

    Args:
        every: optimiser steps between two; also at the end.
        text: caption.
        image: portrait.
        audio: speech.
        seconds: of the speech at most.
        seed: of the noise, the same for all previews, so that they can be compared.
    """

    def __init__(
        self,
        *,
        every: Annotated[int, Field(ge=1)] = 250,
        text: str,
        image: ExistingFile,
        audio: ExistingFile,
        seconds: Annotated[float, Field(gt=0)] = 4.0,
        seed: int = 0,
    ) -> None:
        self.every = every
        self.text = text
        self.image = image
        self.audio = audio
        self.seconds = seconds
        self.seed = seed


class Previews(Callback):
    """Makes a preview every so many steps, with the averaged weights.

    Args:
        settings: how often.
        folder: receives `step-00000100.mp4`, `step-00000100.json` with its numbers, and so on.
        sampler: makes the video.
        load_encoders: gives the frozen encoders.
        load_scene: gives what to show.
        ema: the average of what trains.
        fps: of the video.
        measure: tells the numbers of the video.
    """

    def __init__(
        self,
        settings: PreviewSettings,
        folder: Path,
        sampler: TalkSampler,
        load_encoders: Callable[[], Encoders],
        load_scene: Callable[[], Scene],
        ema: AdapterEMA,
        fps: int,
        measure: Measure,
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.sampler = sampler
        self.load_encoders = load_encoders
        self.load_scene = load_scene
        self.ema = ema
        self.fps = fps
        self.measure = measure
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the step that the run continues at."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *batch: object
    ) -> None:
        """Make a preview where it is due."""
        step = trainer.global_step
        due = step % self.settings.every == 0 or step == trainer.max_steps
        if step == self._last_step or not due:
            return
        self._last_step = step
        assert isinstance(pl_module, Fitting)
        path = self.folder / f"step-{step:08d}.mp4"
        pl_module.network.eval()
        # Processes that share the network all make the preview, and the first one keeps it.
        with self.ema.applied(pl_module):
            frames, tracks = self._make(_as_trained(pl_module, trainer))
        pl_module.network.train()
        if not trainer.is_global_zero:
            return
        self._save(frames, tracks.sum(0), path)
        report = self._measured(frames, tracks, path)
        if isinstance(trainer.logger, TensorBoardLogger):
            writer = trainer.logger.experiment
            _log(writer, frames, tracks.sum(0), step, self.fps)
            _log_numbers(writer, report, step)

    def _make(self, denoiser: Predict) -> tuple[np.ndarray, Tensor]:
        """Make a preview; gives its pictures and tracks. [T, height, width, 3], [S, samples]"""
        scene, encoders = self.load_scene(), self.load_encoders()
        chunks = [
            to_pictures(pixels)
            for pixels, _ in self.sampler.sample(
                denoiser, encoders, scene, self.settings.seed, no_progress
            )
        ]
        encoders.release()
        return np.concatenate(chunks), scene.tracks

    def _save(self, frames: np.ndarray, speech: Tensor, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = frames.shape[1:3]
        with VideoWriter(path, fps=self.fps, height=height, width=width, speech=speech) as writer:
            writer.write(frames)

    def _measured(self, frames: np.ndarray, tracks: Tensor, path: Path) -> VideoReport | None:
        """Measure a preview and write its numbers beside it."""
        starts = [chunk.first_shown for chunk in self.sampler.plan(len(frames))]
        try:
            report = self.measure.report(torch.from_numpy(frames), tracks, self.fps, starts)
        except InputError as error:
            # What a network shows on its way cannot be foreseen, and is no reason to stop it.
            _LOG.warning("%s is not measured: %s", path, error)
            return None
        report.write(path.with_suffix(".json"))
        return report


def _as_trained(module: Fitting, trainer: Trainer) -> Predict:
    """Call the network as training steps do: else nothing casts a network of two dtypes."""

    def predict(
        noisy: Tensor, sigma: Tensor, conditions: Conditions, inside: Inside = UNTOUCHED
    ) -> Tensor:
        with trainer.precision_plugin.forward_context():
            velocity: Tensor = module.network(noisy, sigma, conditions, inside)
        return velocity

    return predict


def _log(
    writer: SummaryWriter, frames: np.ndarray, speech: torch.Tensor, step: int, fps: int
) -> None:
    peak = speech.abs().max().clamp(min=1)
    writer.add_audio("preview/speech", speech / peak, step, sample_rate=SAMPLE_RATE)
    file_writer = writer.file_writer
    assert file_writer is not None
    file_writer.add_summary(_animation(frames[::GIF_EVERY], fps // GIF_EVERY), step)


def _log_numbers(writer: SummaryWriter, report: VideoReport | None, step: int) -> None:
    # Previews have one speaker.
    for name, value in report.tracks[0].items() if report else ():
        if value is not None:
            writer.add_scalar(f"preview/{name}", value, step)


def _animation(frames: np.ndarray, fps: int) -> Summary:
    """Pack frames as a GIF, which TensorBoard plays as an image."""
    pictures = [Image.fromarray(frame) for frame in frames]
    packed = BytesIO()
    pictures[0].save(
        packed, "GIF", save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0
    )
    image = Summary.Image(
        height=frames.shape[1],
        width=frames.shape[2],
        colorspace=3,
        encoded_image_string=packed.getvalue(),
    )
    return Summary(value=[Summary.Value(tag="preview/video", image=image)])
