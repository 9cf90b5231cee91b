"""From a portrait or source video, text and speech to video frames, chunk by chunk."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn

from kit.batch import Conditions
from kit.devices import visiting
from kit.draws import draw_normal
from kit.flow import hold_context
from kit.guidance import GUIDANCES, branches, drop_image, drop_reference
from kit.models.base import Encoders
from kit.sampling.chunks import Chunk, Progress, plan_chunks, show, speech_frames_needed
from kit.sampling.color import match_color
from kit.sampling.continuity import CONTINUITIES
from kit.sampling.hooks import Hooks, InChunk
from kit.sampling.plugin import Run
from kit.sampling.scene import EncodedScene, Scene, chunk_conditions
from kit.solvers import SOLVERS, sigma_schedule
from kit.speech import mirror_end

Predict = Callable[..., Tensor]
"""A denoiser: (noisy, sigma, conditions) -> velocity; plugins also hand it `inside`."""

NO_PLUGINS = Hooks()


@runtime_checkable
class Remembering(Protocol):
    """A denoiser that can keep what it computed from conditions, which are equal in all steps."""

    def remembering(self) -> Predict:
        """Give it with a new memory, which lasts as long as what is given."""


class Pass(NamedTuple):
    """What the denoiser is asked at once.

    Attributes:
        branches: what its rows are.
        conditions: of these rows.
    """

    branches: tuple[str, ...]
    conditions: Conditions


Offload = Literal["none", "turns", "blocks"]

OnStep = Callable[[Chunk, int], None]
"""Told after each denoising step: the chunk and how many of its steps are done."""


class TalkSampler:
    """Samples talking video of any length with clean context frames between chunks.

    Args:
        hooks: plugins that change what happens.
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
        guidance: `plain`, or `projected`, which takes only what leads aside from the prediction, so
            that large scales do not make colours glaring.
        continuity: what the reference of a chunk is: the `source`'s frame of that time; the
            `last_frame` made, which chains image-to-video after itself; or `both_ends`, the last
            frame made and the source's at the chunk's end. The two latter are baselines.
        solver: how to step between noise levels.
        together: all guidance branches in one forward pass; False takes a third of the memory.
        remember: keep what all steps of a chunk share; False computes it in each step again.
        offload: what of the denoiser is in the memory of the CPU. `turns`: all of it while the
            encoders work, which then have a GPU to themselves; `blocks`: all but the block that
            works, always.
        shard: with several processes, distribute the denoiser's weights over them too, each block
            put together only while it works.

    Source: InfiniteTalk, its released sampling loop; defaults are its 480 p settings.
    """

    def __init__(
        self,
        hooks: Hooks = NO_PLUGINS,
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
        guidance: Literal["plain", "projected"] = "plain",
        continuity: Literal["source", "last_frame", "both_ends"] = "source",
        solver: Literal["euler"] = "euler",
        together: bool = True,
        remember: bool = True,
        offload: Offload = "none",
        shard: bool = False,
    ) -> None:
        self.hooks = hooks
        self.own_sigmas = sigma_schedule(steps, shift)
        self.text_scale = text_scale
        self.audio_scale = audio_scale
        self.num_frames = num_frames
        self.context_frames = context_frames
        self.crossfade_frames = crossfade_frames
        self.color_correction = color_correction
        self.negative_text = negative_text
        self.guidance = guidance
        self.continuity = continuity
        self.step = SOLVERS[solver]
        self.together = together
        self.remember = remember
        self.offload = offload
        self.shard = shard

    @property
    def sigmas(self) -> Tensor:
        """Noise levels to visit, from 1 or where a plugin begins down to 0. [steps + 1]"""
        return self.hooks.sigmas(self.own_sigmas)

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
        self.hooks.open(
            Run(denoiser, encoders, scene, encoded, tuple(chunks), self.own_sigmas, seed)
        )
        tail = waiting = None
        if progress is not None:
            chunks, tail, waiting = chunks[progress.next_chunk :], progress.tail, progress.waiting
        for chunk in chunks:
            hooks = self.hooks.chunk(chunk, self.sigmas)
            ends = hooks.ends(CONTINUITIES[self.continuity](scene.source, chunk, tail), tail)
            conditions = chunk_conditions(encoders, encoded, chunk, *ends)
            noise = hooks.noise(_noise(conditions.reference, seed, chunk))
            context = noise[:, :, :0]
            if tail is not None or scene.has_reference:
                given = ends.first[:, None] if tail is None else tail
                context = encoders.encode_video(given[None])  # [1, C, f, H, W]
            if not scene.has_reference:
                conditions = drop_image(drop_reference(conditions))
            conditions = hooks.conditions(conditions)
            with self._turn_of(denoiser, noise.device):
                # Not named here, so that what it remembers is gone before decoding needs memory.
                latents = self.denoise(
                    self.guided(denoiser, conditions, encoded.null_text, hooks),
                    noise,
                    context,
                    partial(on_step, chunk),
                    hooks,
                )
            pixels = hooks.pixels(encoders.decode_video(latents)[0])
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
        self,
        denoiser: Predict,
        conditions: Conditions,
        null_text: Tensor,
        hooks: InChunk | None = None,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Make (noisy, sigma) -> velocity under guidance.

        Args:
            denoiser: predicts velocity.
            conditions: all conditions present, batch of one.
            null_text: states of the negative text. [1, L, D]
            hooks: plugins in this chunk; none if absent.
        """
        device, hooks = conditions.reference.device, hooks or self._no_hooks()
        asked = branches(
            conditions.to(device), null_text.to(device), self.text_scale, self.audio_scale
        )
        combine, predict = GUIDANCES[self.guidance](), denoiser
        if self.remember and isinstance(denoiser, Remembering):
            predict = denoiser.remembering()
        given: dict[str, Conditions] = {}
        passes: list[Pass] = []

        def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
            nonlocal given, passes
            wanted, predicted = hooks.branches(dict(asked)), list[Tensor]()
            # What steps share stays one and the same object, so that it is remembered once.
            if [*wanted] != [*given] or any(given[name] is not wanted[name] for name in wanted):
                given, passes = wanted, self._passes(wanted)
            for names, conditions in passes:
                count = len(names)
                repeated = noisy.expand(count, *noisy.shape[1:])
                rows = hooks.ask(predict, names)(repeated, sigma.expand(count), conditions)
                predicted += torch.split(rows, 1)
            velocities = dict(zip(given, predicted, strict=True))
            return hooks.combine(velocities, self.text_scale, self.audio_scale, combine)

        return velocity

    def _passes(self, given: Mapping[str, Conditions]) -> list[Pass]:
        """Put branches together as they are asked: all at once, or one by one."""
        if self.together:
            return [Pass(tuple(given), Conditions.cat(list(given.values())))]
        return [Pass((name,), conditions) for name, conditions in given.items()]

    def _no_hooks(self) -> InChunk:
        return NO_PLUGINS.chunk(self.plan(1)[0], self.sigmas)

    def _turn_of(self, denoiser: Predict, device: torch.device) -> AbstractContextManager[None]:
        """Let the denoiser have the device, if it must share it."""
        if self.offload == "turns" and isinstance(denoiser, nn.Module):
            return visiting(denoiser, device)
        return nullcontext()

    def denoise(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        noise: Tensor,
        context: Tensor,
        on_step: Callable[[int], None],
        hooks: InChunk | None = None,
    ) -> Tensor:
        """Turn noise into latents, the context held clean at every level.

        Args:
            velocity: (noisy, sigma) -> velocity.
            noise: standard normal. [1, C, F, H, W]
            context: clean leading latents. [1, C, f, H, W]
            on_step: told after each step how many are done.
            hooks: plugins in this chunk; none if absent.
        """
        hooks = hooks or self._no_hooks()
        num_context = torch.tensor([context.shape[2]], device=noise.device)
        noisy = hold_context(hooks.start(noise), context, num_context)
        levels = self.sigmas.to(noise.device)
        for number, (sigma, next_sigma) in enumerate(pairwise(levels)):
            hooks.begin(number)
            noisy = self.step(noisy, velocity(noisy, sigma), sigma, next_sigma)
            noisy = hold_context(hooks.step(noisy), context, num_context)
            on_step(number + 1)
        return noisy


def _noise(like: Tensor, seed: int, chunk: Chunk) -> Tensor:
    return draw_normal(tuple(like.shape), seed, chunk.index, "noise").to(like)


def no_progress(chunk: Chunk, step: int) -> None:
    """Tell nobody."""
