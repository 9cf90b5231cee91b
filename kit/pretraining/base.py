"""What the networks around a denoiser have in common while they train."""

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kit.data.clips import RawSample
from kit.training.task import Task


class PartTask(Task):
    """Trains a network and writes it into a base folder."""

    @abstractmethod
    def finish(self, batches: list[Any]) -> None:
        """Measure on a few batches what only a trained network can tell."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write configuration and weights where they belong below a base folder."""


class EncoderTask(PartTask):
    """Trains encoders on raw clips."""

    @abstractmethod
    def losses(self, batch: list[RawSample]) -> dict[str, Tensor]:
        """Compute the losses of a batch, scalars by name."""

    def names(self, batch: list[RawSample]) -> tuple[list[str], list[list[int]]]:
        """Name the samples of a batch."""
        return [raw.key for raw in batch], [[raw.epoch, raw.index] for raw in batch]


def save_part(folder: Path, config: dict[str, Any], network: nn.Module, file: str) -> None:
    """Write one network of a base, its weights in half precision.

    Args:
        folder: of the part, such as vae/.
        config: what `config.json` holds.
        network: to write.
        file: name of the weights' file, as diffusers or transformers expect it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {
        name: tensor.detach().to(torch.float16).contiguous()
        for name, tensor in network.state_dict().items()
    }
    save_file(weights, folder / file, metadata={"format": "pt"})
