"""What a controller learns from: encoded windows of video, each with a render along its cameras."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kit.batch import Batch, Sample, collate
from kit.data.clips import RawSample
from kit.data.encode import ClipEncoder, ClipEncoders
from kit.data.loader import ResumableLoader
from kit.data.module import RunData
from kit.data.order import Draw, Order
from kit.models.base import Geometry
from kit.models.tensor_files import read_header
from kit.models.wan_base import WanBase

from .cameras import Cameras, plucker
from .points import Render

ENCODED = ("latents", "reference", "image", "text", "null_text", "audio", "speaker_masks")
"""Fields of a sample that are stored, as float16."""

PATTERN, KEYS = "views-*.safetensors", "keys"


@dataclass(frozen=True)
class Example:
    """A window, and what the controller is told of it.

    Attributes:
        sample: the window, as any fine-tuning sees it.
        render: normalised latents of the render. [C, F, H, W]
        guide: holes of the render, then the cameras' rays. [7, T, 8H, 8W]
    """

    sample: Sample
    render: Tensor
    guide: Tensor


@dataclass(frozen=True)
class ControlBatch:
    """Examples, stacked.

    Attributes:
        batch: as in any fine-tuning.
        render: [B, C, F, H, W]
        guide: [B, 7, T, 8H, 8W]
    """

    batch: Batch
    render: Tensor
    guide: Tensor

    def to(self, device: torch.device) -> "ControlBatch":
        """Move to a device."""
        return ControlBatch(self.batch.to(device), self.render.to(device), self.guide.to(device))


def open_encoder(base: Path, text_length: int) -> ClipEncoder:
    """Make the encoder of a base, on the CPU."""
    whole = WanBase(
        path=str(base), dtype="float32", video_dtype="bfloat16", text_length=text_length
    )
    return ClipEncoder(whole.load_encoders(torch.device("cpu")), torch.float16, negative_text="")


def encode_example(
    encoder: ClipEncoder, raw: RawSample, render: Render, cameras: Cameras
) -> dict[str, Tensor]:
    """Encode a window and its render to what is stored.

    Args:
        encoder: of the base that the controller is for.
        raw: the window.
        render: of the window's length.
        cameras: of the window; their intrinsics before any zoom. [3, 3]
    """
    sample = encoder.sample(raw, Geometry().frame_stride)
    stored = {name: getattr(sample, name) for name in ENCODED}
    stored["render"] = encoder.encoders.encode_video(render.pixels[None])[0]
    return {
        **{name: value.half() for name, value in stored.items()},
        "num_context": torch.tensor(sample.num_context),
        "holes": render.holes.bool(),
        "intrinsics": cameras.intrinsics,
        "w2c": cameras.w2c,
    }


def write_examples(file: Path, examples: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write encoded examples by their keys, the whole file or none of it."""
    tensors = {
        f"{number}.{name}": value.contiguous()
        for number, example in enumerate(examples.values())
        for name, value in example.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, metadata={KEYS: json.dumps(list(examples))})
    partial.replace(file)


class Stored:
    """Encoded examples in a folder.

    Args:
        folder: of files by `write_examples`.
    """

    def __init__(self, folder: Path) -> None:
        self.places = [
            (file, number, key)
            for file in sorted(folder.glob(PATTERN))
            for number, key in enumerate(json.loads(read_header(file).metadata[KEYS]))
        ]

    def __getitem__(self, draw: Draw) -> Example:
        """Read one; draw is (epoch, number)."""
        epoch, index = draw
        file, number, key = self.places[index]
        with safe_open(file, framework="pt") as opened:
            read: Callable[[str], Tensor] = lambda name: opened.get_tensor(f"{number}.{name}")  # noqa: E731
            encoded: dict[str, Any] = {name: read(name).float() for name in ENCODED}
            render, holes, num_context = read("render").float(), read("holes"), read("num_context")
            guide = guide_of(holes.float(), Cameras(read("intrinsics"), read("w2c")))
        sample = Sample(key=key, epoch=epoch, index=index, num_context=int(num_context), **encoded)
        return Example(sample, render, guide)


def guide_of(holes: Tensor, cameras: Cameras) -> Tensor:
    """Put together what the controller is told of each pixel.

    Args:
        holes: 1 where the render has a hole. [1, T, H, W]
        cameras: intrinsics before any zoom [3, 3]; w2c [T, 4, 4].

    Returns:
        [7, T, H, W]
    """
    return torch.cat([holes, plucker(*cameras, holes.shape[2], holes.shape[3])])


def stack(examples: Sequence[Example]) -> ControlBatch:
    """Put examples of equal size behind each other."""
    return ControlBatch(
        batch=collate([example.sample for example in examples]),
        render=torch.stack([example.render for example in examples]),
        guide=torch.stack([example.guide for example in examples]),
    )


class Examples(RunData):
    """Encoded examples, batch by batch.

    Args:
        frame_stride: as for all data; the examples were encoded by it.
        pixel_stride: likewise.
        fps: likewise.
        fingerprint: likewise.
        path: folder that `data/prepare_studio_views.py` wrote.
        batch_size: examples in a batch.
        num_workers: loader processes.
    """

    def __init__(
        self,
        frame_stride: int,
        pixel_stride: int,
        fps: int,
        fingerprint: str | None,
        *,
        path: str,
        batch_size: Annotated[int, Field(ge=1)] = 8,
        num_workers: Annotated[int, Field(ge=0)] = 1,
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self.batch_size = batch_size
        self.num_workers = num_workers

    @cached_property
    def stored(self) -> Stored:
        """The examples, which are looked for when they are first needed."""
        return Stored(self.path)

    def problems(self) -> list[str]:
        """Say so, in words, if there are none."""
        return [] if self.stored.places else [f"data.path: {self.path} holds no {PATTERN}"]

    def digest(self) -> str:
        """Identify the examples, wherever they lie."""
        keys = [key for _, _, key in self.stored.places]
        return hashlib.sha256(json.dumps(keys).encode()).hexdigest()

    def prepare_run(
        self,
        load_encoders: Callable[[], ClipEncoders] | None,
        seed: int,
        num_batches: int,
        place: tuple[int, int],
    ) -> None:
        """Open the examples for a run."""
        order = Order([0] * len(self.stored.places), self.batch_size, seed)
        self.loader = ResumableLoader(
            self.stored, order, num_batches, *place, self.num_workers, stack
        )

    def train_dataloader(self) -> ResumableLoader:
        """Give Lightning the run's one loader."""
        return self.loader

    def transfer_batch_to_device(
        self, batch: ControlBatch, device: torch.device, dataloader_idx: int
    ) -> ControlBatch:
        """Move a batch."""
        return batch.to(device)
