"""One draw from the shards: the pixels of a raw clip's window, or an encoded clip's features."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load
from torch import Tensor

from kit.batch import Sample
from kit.data.media import decode_wav, read_frames
from kit.data.order import Draw
from kit.data.shards import Shards
from kit.data.windows import Choice, Window, WindowPlan, choose, plan_windows
from kit.masks import check_speaker_masks, latent_masks
from kit.speech import speech_windows


@dataclass(frozen=True)
class RawSample:
    """One window of a raw clip, not encoded yet.

    Attributes:
        key: name of the clip.
        epoch: with `index`, names the random choices of this sample.
        index: number of the clip.
        start: first frame of the window.
        pixels: the window, 0 to 255. [T, height, width, 3]
        reference: the reference frame, 0 to 255. [height, width, 3]
        tracks: the whole clip's speech at 16 kHz, no speakers for an image. [S, samples]
        caption: text.
        speaker_masks: where each speaker stands, 0 or 1, at latent size. [S, H, W]
        num_context_frames: leading video frames given clean.
        shows_last: whether the window's last frame is shown beside the reference.
    """

    key: str
    epoch: int
    index: int
    start: int
    pixels: np.ndarray
    reference: np.ndarray
    tracks: Tensor
    caption: str
    speaker_masks: Tensor
    num_context_frames: int
    shows_last: bool = False


@dataclass(frozen=True)
class Selection:
    """How a draw becomes frames.

    Attributes:
        plan: the clips' windows.
        first_chunk: probability of a video's first chunk, 0 to 1.
        context_frames: clean frames of a continuation.
        seed: of the run.
        frame_stride: video frames in a latent frame.
        pixel_stride: pixels in a latent position.
    """

    plan: WindowPlan
    first_chunk: float
    context_frames: int
    seed: int
    frame_stride: int
    pixel_stride: int


class RawClips:
    """Reads draws from raw shards."""

    def __init__(self, shards: Shards, selection: Selection) -> None:
        self.shards = shards
        self.selection = selection

    def __getitem__(self, draw: Draw) -> RawSample:
        """Decode the frames that a draw names."""
        epoch, number = draw
        window, choice = choose_window(self.shards, self.selection, draw)
        frames = list(range(window.start, window.start + window.num_frames))
        pictures = read_pictures(
            self.shards, number, [*frames, window.references[choice.reference]]
        )
        return RawSample(
            key=self.shards.key(number),
            epoch=epoch,
            index=number,
            start=window.start,
            pixels=pictures[:-1],
            reference=pictures[-1],
            tracks=read_tracks(self.shards, number),
            caption=read_caption(self.shards, number),
            speaker_masks=read_masks(self.shards, number, self.selection.pixel_stride),
            num_context_frames=choice.num_context_frames,
            shows_last=self.selection.plan.shows_last(window.num_frames),
        )


class EncodedClips:
    """Reads draws from encoded shards."""

    def __init__(self, shards: Shards, selection: Selection) -> None:
        self.shards = shards
        self.selection = selection

    def __getitem__(self, draw: Draw) -> Sample:
        """Read the features that a draw names."""
        epoch, number = draw
        window, choice = choose_window(self.shards, self.selection, draw)
        features = _load(self.shards, number, f"window{choice.window}.safetensors")
        text = _load(self.shards, number, "text.safetensors")
        speech = _load(self.shards, number, "speech.safetensors")["speech"]
        return Sample(
            key=self.shards.key(number),
            epoch=epoch,
            index=number,
            latents=features["latents"],
            reference=features[f"reference.{choice.reference}"],
            image=features[f"image.{choice.reference}"],
            text=text["text"],
            null_text=text["null_text"],
            audio=speech_windows(speech, window.start, window.num_frames),
            speaker_masks=read_masks(self.shards, number, self.selection.pixel_stride),
            num_context=num_context(choice.num_context_frames, self.selection.frame_stride),
            shows_last=self.selection.plan.shows_last(window.num_frames),
        )


def choose_window(shards: Shards, selection: Selection, draw: Draw) -> tuple[Window, Choice]:
    """Decide which frames a draw uses, the same for raw and encoded shards."""
    epoch, number = draw
    windows = plan_windows(shards.key(number), shards.meta(number)["num_frames"], selection.plan)
    choice = choose(
        windows,
        first_chunk=selection.first_chunk,
        context_frames=selection.context_frames,
        path=(selection.seed, epoch, number),
    )
    return windows[choice.window], choice


def num_context(num_context_frames: int, frame_stride: int) -> int:
    """Count the latent frames of a clip's clean start; 0 frames have none."""
    return 0 if num_context_frames == 0 else 1 + (num_context_frames - 1) // frame_stride


def read_pictures(shards: Shards, number: int, frames: list[int]) -> np.ndarray:
    """Decode frames of a raw sample; an image repeats its only one. uint8 [N, height, width, 3]."""
    if shards.meta(number)["kind"] == "image":
        picture = np.asarray(Image.open(BytesIO(shards.read(number, "png"))).convert("RGB"))
        return np.stack([picture] * len(frames))
    return read_frames(shards.read(number, "mp4"), frames)


def read_tracks(shards: Shards, number: int) -> Tensor:
    """Read a raw sample's speech, one track for each speaker. [S, samples]."""
    if shards.meta(number)["kind"] == "image":
        return torch.zeros(0, 0)
    return decode_wav(shards.read(number, "wav"))


def read_caption(shards: Shards, number: int) -> str:
    """Read a sample's caption."""
    return shards.read(number, "txt").decode()


def read_masks(shards: Shards, number: int, pixel_stride: int) -> Tensor:
    """Read a sample's speaker masks at latent size; without masks a speaker is everywhere.

    Returns:
        0 or 1; one mask at least. [S, H, W]
    """
    meta = shards.meta(number)
    if meta["num_masks"] == 0:
        size = (meta["height"] // pixel_stride, meta["width"] // pixel_stride)
        return torch.ones(max(meta["num_speakers"], 1), *size)
    members = [shards.read(number, f"speaker{i}.png") for i in range(meta["num_masks"])]
    masks = [np.asarray(Image.open(BytesIO(member)).convert("L")) for member in members]
    small = latent_masks(torch.from_numpy(np.stack(masks)), pixel_stride)
    check_speaker_masks(small, shards.key(number))
    return small


def _load(shards: Shards, number: int, member: str) -> dict[str, Tensor]:
    tensors = load(shards.read(number, member))
    return {name: tensor.float() for name, tensor in tensors.items()}
