"""SDEdit: start from the source video with some noise, instead of from noise alone.

What is left of the source under the noise decides what the new video keeps of it. The chunk begins
with (1 - sigma) source + sigma noise at the level `sigma`, and levels above it are not visited; the
level itself is, so that a list of four steps from distillation is cut where it is wished, too.

    plugins: {sdedit: {sigma: 0.95}}

A mask leaves the face to the speech while the rest is held: of the white part nothing is kept, and
the black part is put back at every level down to its own.

    plugins: {sdedit: {sigma: 0.85, mask: face.png}}

Source: Meng et al. 2021, arXiv 2108.01073; for InfiniteTalk arXiv 2508.14033, which prints no
level: the values below are ours. Masks: Levin and Fried 2023, arXiv 2306.00950.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kit.data.buckets import fit_mask
from kit.data.video_reader import load_image
from kit.errors import InputError
from kit.flow import add_noise
from kit.models.base import Geometry
from kit.recipe import ExistingFile
from kit.sampling.frames import Clips, VideoSource
from kit.sampling.plugin import At, Plugin, Run, Setup
from kit.solvers import sigma_schedule

Level = Annotated[float, Field(gt=0, le=1)]


class SDEdit(Plugin):
    """Starts each chunk from the frames of its time in a source video.

    Args:
        sigma: level to start at. 0.90 to 0.98 keep the motion of the camera, 0.80 to 0.90 layout
            and poses as well; below, lips follow the source and no longer the speech. 1 keeps
            nothing, and is the sampler without this plugin.
        video: to start from, fitted as a source video is, its last picture held behind its end;
            without it, the run's own source. A portrait holds the camera still.
        mask: picture, fitted as the source is: white starts at `mask_sigma`, black is held down to
            `sigma`, and grey lies between them.
        mask_sigma: level to start at where the mask is white; not below `sigma`.
    """

    def __init__(
        self,
        *,
        sigma: Level = 0.95,
        video: ExistingFile | None = None,
        mask: ExistingFile | None = None,
        mask_sigma: Level = 1.0,
    ) -> None:
        self.sigma = sigma
        self.video = video
        self.mask = mask
        self.mask_sigma = mask_sigma

    def problems(self, setup: Setup) -> list[str]:
        """Refuse levels that leave nothing to do, unfit masks, and runs without a source."""
        found = []
        if not setup.has_reference and self.video is None:
            found.append("video: missing; the run has no picture or video of its own to start from")
        last = float(sigma_schedule(setup.sampling["steps"], setup.sampling["shift"])[-2])
        if self.sigma < last:
            found.append(f"sigma: {self.sigma} is below the last level of the steps, {last:.3g}")
        if self.mask is not None:
            if self.mask_sigma < self.sigma:
                found.append(f"mask_sigma: {self.mask_sigma} is below sigma: {self.sigma}")
            try:
                load_image(Path(self.mask))
            except InputError as error:
                found.append(f"mask: {error}")
        return found

    def open(self, run: Run) -> None:
        """Open the source, and find where each latent position starts."""
        self._encode = run.encoders.encode_video
        source = run.scene.source.again()
        height, width = source.frame(0).shape[1:]
        self._starts = torch.tensor(self.sigma)
        if self.mask is not None:
            latent_height, latent_width = run.scene.speaker_masks.shape[1:]
            free = _load_mask(Path(self.mask), (height, width), (latent_height, latent_width))
            self._starts = torch.lerp(self._starts, torch.tensor(self.mask_sigma), free)
        if self.video is not None:
            source = VideoSource(Path(self.video), (height, width), Geometry().fps)
        self._clips = Clips(source)

    def sigmas(self, levels: Tensor) -> Tensor:
        """Begin at the highest start, and visit the others too."""
        given = [self.sigma] if self.mask is None else [self.sigma, self.mask_sigma]
        # Rounded as the levels are, so that one that is among them is visited once.
        starts = levels.new_tensor(given).tolist()
        visited = sorted({*levels.tolist(), *starts}, reverse=True)
        return levels.new_tensor([level for level in visited if level <= max(starts)])

    def noise(self, noise: Tensor, at: At) -> Tensor:
        """Encode the source here: when the chunk starts, the denoiser may have the GPU."""
        clip = self._clips.window(at.chunk.start, at.chunk.num_frames)
        at.shared["source"] = self._encode(clip[None]).to(noise)
        return noise

    def start(self, noise: Tensor, at: At) -> Tensor:
        """Add noise to the source."""
        at.shared["noise"] = noise
        return _source_at(at.sigma, at)

    def step(self, noisy: Tensor, at: At) -> Tensor:
        """Put back what has not reached its own start."""
        if self.mask is None:
            return noisy
        is_held = self._starts.to(noisy.device) <= at.next_sigma
        return torch.where(is_held, _source_at(at.next_sigma, at), noisy)


def _source_at(sigma: float, at: At) -> Tensor:
    """Give the source at a level of noise. [1, C, F, H, W]"""
    source, noise = at.shared["source"], at.shared["noise"]
    return add_noise(source, noise, noise.new_tensor([sigma]))


def _load_mask(file: Path, size: tuple[int, int], latent_size: tuple[int, int]) -> Tensor:
    """Load a mask at latent size, 1 where it is white. [H, W]"""
    grey = load_image(file).mean(axis=-1).astype(np.uint8)
    fitted = torch.from_numpy(fit_mask(grey, *size)) / 255
    return F.adaptive_avg_pool2d(fitted[None], latent_size)[0]


plugin = SDEdit
