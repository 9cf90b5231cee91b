"""From a portrait or source video, text and speech to video frames, chunk by chunk."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor

from kit import guidance
from kit.batch import Conditions
from kit.draws import draw_normal
from kit.flow import hold_context
from kit.models.base import Encoders
from kit.reference import Unchanged, between_grey, followed_by_grey, reference_mask
from kit.sampling.chunks import Chunk, Progress, plan_chunks, show, speech_frames_needed
from kit.sampling.color import match_color
from kit.solvers import SOLVERS, sigma_schedule
from kit.speech import mirror_end, speech_windows

Predict = Callable[[Tensor, Tensor, Conditions], Tensor]
"""A denoiser: (noisy, sigma, conditions) -> velocity."""


@runtime_checkable
class Remembering(Protocol):
    """A denoiser that can keep what it computed from conditions, which are equal in all steps."""

    def remembering(self) -> Predict:
        """Give it with a new memory, which lasts as long as what is given."""


OnStep = Callable[[Chunk, int], None]
"""Told after each denoising step: the chunk and how many of its steps are done."""


class Source(Protocol):
    """Where reference frames come from."""

    def frame(self, index: int) -> Tensor:
        """Give the picture at the time of video frame `index`, -1 to 1. [3, height, width].

        Asked with rising numbers; behind its end a source repeats its last picture.
        """


class Ends(NamedTuple):
    """The pictures that a chunk is given: its reference, and its last frame or None."""

    first: Tensor
    last: Tensor | None = None


def follow_source(source: Source, chunk: Chunk, tail: Tensor | None) -> Ends:
    """Take the source's frame at the chunk's start.

    Source: InfiniteTalk, sparse-frame dubbing.
    """
    return Ends(source.frame(chunk.start))


def follow_last_frame(source: Source, chunk: Chunk, tail: Tensor | None) -> Ends:
    """Take the last frame that was made, as image-to-video chained after itself.

    Source: the I2V baseline of InfiniteTalk's paper; colours and faces drift by design.
    """
    return Ends(source.frame(chunk.start) if tail is None else tail[:, -1])


def meet_source(source: Source, chunk: Chunk, tail: Tensor | None) -> Ends:
    """Go from the last frame that was made to the source's frame at the chunk's end.

    Source: the FL2V baseline of InfiniteTalk's paper; poses of the source are copied by design.
    """
    first, _ = follow_last_frame(source, chunk, tail)
    return Ends(first, source.frame(chunk.start + chunk.num_frames - 1))


CONTINUITIES = {
    "source": follow_source,
    "last_frame": follow_last_frame,
    "both_ends": meet_source,
}
"""What the reference of a chunk is."""


@dataclass(frozen=True)
class Scene:
    """What to make a video of.

    Attributes:
        text: caption.
        tracks: speech of each speaker at 16 kHz, -23 LUFS. [S, samples]
        source: portrait or source video, at the video's size.
        speaker_masks: where each speaker stands, 0 or 1, at latent size. [S, H, W]
        has_reference: False makes video from text and speech alone; the source only tells the size.
    """

    text: str
    tracks: Tensor
    source: Source
    speaker_masks: Tensor
    has_reference: bool = True


@dataclass(frozen=True)
class EncodedScene:
    """What all chunks of a video share.

    Attributes:
        text: states of the caption. [1, L, D]
        null_text: states of the negative text. [1, L', D]
        speech: features of the whole video and a little beyond. [S, T, M, D]
        num_frames: frames of the whole video.
        speaker_masks: as in the scene. [S, H, W]
        references: encodes the reference of a chunk, unless it is that of the chunk before.
    """

    text: Tensor
    null_text: Tensor
    speech: Tensor
    num_frames: int
    speaker_masks: Tensor
    references: Unchanged[tuple[Tensor, Tensor]] = field(default_factory=Unchanged)


class TalkSampler:
    """Samples talking video of any length with clean context frames between chunks.

    Args:
        steps: denoising steps of a chunk.
        shift: moves the steps towards noise; 7 at 480 p, 11 at 720 p.
        text_scale: guidance towards the text; 1 is off.
        audio_scale: guidance towards the speech; 1 is off.
        num_frames: frames in a chunk, 4n + 1.
        context_frames: frames that a chunk takes over from the one before, 4n + 1.
        crossfade_frames: context frames in which a chunk's own decoding takes over from that of the
            chunk before, so that no jump of the codec is seen; at most `context_frames`.
        color_correction: how far each chunk's colours are moved to those of the first reference.
        negative_text: what guidance leads away from.
        continuity: what the reference of a chunk is: the `source`'s frame of that time; the
            `last_frame` made, which chains image-to-video after itself; or `both_ends`, the last
            frame made and the source's at the chunk's end. The two latter are baselines.
        solver: how to step between noise levels.
        together: all guidance branches in one forward pass; False takes a third of the memory.
        remember: keep what all steps of a chunk share; False computes it in each step again.

    Source: InfiniteTalk, its released sampling loop; defaults are its 480 p settings.
    """

    def __init__(
        self,
        *,
        steps: Annotated[int, Field(ge=1)] = 40,
        shift: Annotated[float, Field(gt=0)] = 7.0,
        text_scale: Annotated[float, Field(ge=0)] = 5.0,
        audio_scale: Annotated[float, Field(ge=0)] = 4.0,
        num_frames: Annotated[int, Field(ge=5)] = 81,
        context_frames: Annotated[int, Field(ge=1)] = 9,
        crossfade_frames: Annotated[int, Field(ge=0)] = 0,
        color_correction: Annotated[float, Field(ge=0, le=1)] = 1.0,
        negative_text: str = "",
        continuity: Literal["source", "last_frame", "both_ends"] = "source",
        solver: Literal["euler"] = "euler",
        together: bool = True,
        remember: bool = True,
    ) -> None:
        self.sigmas = sigma_schedule(steps, shift)
        self.text_scale = text_scale
        self.audio_scale = audio_scale
        self.num_frames = num_frames
        self.context_frames = context_frames
        self.crossfade_frames = crossfade_frames
        self.color_correction = color_correction
        self.negative_text = negative_text
        self.continuity = continuity
        self.step = SOLVERS[solver]
        self.together = together
        self.remember = remember

    def problems(self, frame_stride: int) -> list[str]:
        """List what is wrong with the options for a base's frame stride, in words."""
        found = [
            f"sampling.{name}: {value} is not {frame_stride}n + 1 frames"
            for name, value in (
                ("num_frames", self.num_frames),
                ("context_frames", self.context_frames),
            )
            if value % frame_stride != 1
        ]
        if self.context_frames >= self.num_frames:
            found.append(
                f"sampling.context_frames: {self.context_frames} of {self.num_frames} frames leave "
                "nothing new in a chunk"
            )
        if self.continuity != "source" and self.context_frames != 1:
            found.append(
                f"sampling.context_frames: {self.context_frames}; chunks that go on from the "
                "last frame made share 1"
            )
        if self.crossfade_frames > self.context_frames:
            found.append(
                f"sampling.crossfade_frames: {self.crossfade_frames} is more than the "
                f"{self.context_frames} frames that two chunks share"
            )
        return found

    def plan(self, total_frames: int) -> list[Chunk]:
        """List the chunks of a video."""
        return plan_chunks(total_frames, self.num_frames, self.context_frames)

    @torch.no_grad()
    def sample(
        self,
        denoiser: Predict,
        encoders: Encoders,
        scene: Scene,
        seed: int,
        on_step: OnStep,
        progress: Progress | None = None,
    ) -> Iterator[tuple[Tensor, Progress]]:
        """Yield, after each chunk, the frames that no later chunk changes.

        Args:
            denoiser: predicts velocity.
            encoders: of the same base.
            scene: what to make a video of.
            seed: of the noise.
            on_step: told after each denoising step.
            progress: what an earlier call yielded last; its frames are not made again.

        Yields:
            Pixels, -1 to 1, [T, 3, height, width], all of them together as long as the speech; and
            how far the video is.
        """
        encoded = self.encode(encoders, scene)
        chunks, color = self.plan(encoded.num_frames), scene.source.frame(0)
        tail = waiting = None
        if progress is not None:
            chunks, tail, waiting = chunks[progress.next_chunk :], progress.tail, progress.waiting
        for chunk in chunks:
            ends = CONTINUITIES[self.continuity](scene.source, chunk, tail)
            conditions = chunk_conditions(encoders, encoded, chunk, *ends)
            noise = _noise(conditions.reference, seed, chunk)
            context = noise[:, :, :0]
            if tail is not None or scene.has_reference:
                given = ends.first[:, None] if tail is None else tail
                context = encoders.encode_video(given[None])  # [1, C, f, H, W]
            if not scene.has_reference:
                conditions = guidance.drop_image(guidance.drop_reference(conditions))
            # Not named here, so that what it remembers is gone before decoding needs the memory.
            latents = self.denoise(
                self.guided(denoiser, conditions, encoded.null_text),
                noise,
                context,
                partial(on_step, chunk),
            )
            pixels = encoders.decode_video(latents)[0]
            if scene.has_reference:
                pixels = match_color(pixels, color.to(pixels), self.color_correction)
            fades = 0 if chunk is chunks[-1] else self.crossfade_frames
            shown, waiting = show(chunk, pixels, waiting, fades)
            # Copies, so that the window itself can go.
            tail, waiting = pixels[:, -self.context_frames :].clone(), waiting.clone()
            yield shown.transpose(0, 1), Progress(chunk.index + 1, tail, waiting)

    def encode(self, encoders: Encoders, scene: Scene) -> EncodedScene:
        """Encode text and speech once; the speech is continued to fill the last chunk."""
        text, null_text = encoders.encode_text([scene.text, self.negative_text])
        speech = encoders.encode_speech(scene.tracks)
        encoders.release("text", "speech")
        needed = speech_frames_needed(self.plan(speech.shape[1]))
        return EncodedScene(
            text=text[None],
            null_text=null_text[None],
            speech=mirror_end(speech, needed),
            num_frames=speech.shape[1],
            speaker_masks=scene.speaker_masks,
        )

    def guided(
        self, denoiser: Predict, conditions: Conditions, null_text: Tensor
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Make (noisy, sigma) -> velocity under guidance.

        Args:
            denoiser: predicts velocity.
            conditions: all conditions present, batch of one.
            null_text: states of the negative text. [1, L, D]
        """
        device = conditions.reference.device
        asked = guidance.branches(
            conditions.to(device), null_text.to(device), self.text_scale, self.audio_scale
        )
        # What branches share stays one and the same object, so that it is remembered once.
        given = list(asked.values())
        passes = [Conditions.cat(given)] if self.together else given
        predict = denoiser
        if self.remember and isinstance(denoiser, Remembering):
            predict = denoiser.remembering()

        def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
            predicted: list[Tensor] = []
            for conditions in passes:
                count = len(conditions.text)
                repeated = noisy.expand(count, *noisy.shape[1:])
                predicted += torch.split(predict(repeated, sigma.expand(count), conditions), 1)
            branches = dict(zip(asked, predicted, strict=True))
            return guidance.combine(branches, self.text_scale, self.audio_scale)

        return velocity

    def denoise(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        noise: Tensor,
        context: Tensor,
        on_step: Callable[[int], None],
    ) -> Tensor:
        """Turn noise into latents, the context held clean at every level.

        Args:
            velocity: (noisy, sigma) -> velocity.
            noise: standard normal. [1, C, F, H, W]
            context: clean leading latents. [1, C, f, H, W]
            on_step: told after each step how many are done.
        """
        num_context = torch.tensor([context.shape[2]], device=noise.device)
        noisy = hold_context(noise, context, num_context)
        levels = self.sigmas.to(noise.device)
        for number, (sigma, next_sigma) in enumerate(pairwise(levels), start=1):
            noisy = self.step(noisy, velocity(noisy, sigma), sigma, next_sigma)
            noisy = hold_context(noisy, context, num_context)
            on_step(number)
        return noisy


def chunk_conditions(
    encoders: Encoders,
    encoded: EncodedScene,
    chunk: Chunk,
    frame: Tensor,
    last: Tensor | None = None,
) -> Conditions:
    """Put together what steers one chunk, as a batch of one.

    Args:
        encoders: give the reference its latents and image features.
        encoded: text, speech and places of the whole video.
        chunk: which frames.
        frame: the chunk's reference picture, -1 to 1. [3, height, width]
        last: its last frame, if that is given. [3, height, width]
    """
    given = [frame] if last is None else [frame, last]
    # A source's pictures are on the CPU, those that were made where they were decoded.
    pictures = torch.stack([picture.cpu() for picture in given])
    reference, image = encoded.references(
        partial(_encode_reference, encoders, chunk.num_frames), pictures
    )
    audio = speech_windows(encoded.speech, chunk.start, chunk.num_frames)
    return Conditions(
        text=encoded.text,
        image=image,
        reference=reference,
        reference_mask=reference_mask(last is not None, reference.shape[2]),
        audio=audio[None],
        num_speakers=torch.tensor([len(audio)]),
        speaker_masks=encoded.speaker_masks[None],
    )


def _encode_reference(
    encoders: Encoders, num_frames: int, pictures: Tensor
) -> tuple[Tensor, Tensor]:
    """Encode one or two pictures with grey frames to the latents and image features of a chunk."""
    frames = followed_by_grey(pictures[0], num_frames)
    if len(pictures) == 2:
        frames = between_grey(pictures[0], pictures[1], num_frames)
    return encoders.encode_video(frames[None]), encoders.encode_image(pictures[:1])


def _noise(like: Tensor, seed: int, chunk: Chunk) -> Tensor:
    return draw_normal(tuple(like.shape), seed, chunk.index, "noise").to(like)


def no_progress(chunk: Chunk, step: int) -> None:
    """Tell nobody."""
