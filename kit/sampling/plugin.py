"""What a plugin may do to a sampling run: the whole surface, on one page.

A video is made chunk by chunk, a chunk in steps from noise to clean; in each step the denoiser is
asked once or more, and each time is a *pass*. Guidance needs several *branches*, such as with and
without text; they are the rows of one pass, or of one pass each. A plugin is a class whose
keyword-only parameters are its options and whose hooks are called in the order in which they stand
here. Where several plugins have the same hook,

    each      all are asked, and what they say is put together;
    chain     each gets what the one before gave, in the recipe's order;
    wrap      the first in the recipe is the outermost, and calls what lies inside of it;
    one       two plugins with this hook are refused.

B rows of a pass, C channels, F, H, W latent frames, rows and columns, N video tokens, D width,
h heads of d channels; levels of noise run from 1 (noise) to 0. Types that hooks take are imported
from here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal, Protocol

from torch import Tensor

from kit.batch import Conditions as Conditions
from kit.errors import did_you_mean
from kit.models.attention import KeysValues as KeysValues
from kit.models.base import Denoiser, Encoders, Geometry
from kit.models.inside import Entry as Entry
from kit.models.inside import Layer as Layer
from kit.models.inside import Update as Update
from kit.sampling.chunks import Chunk as Chunk
from kit.sampling.continuity import Ends as Ends
from kit.sampling.scene import EncodedScene, Scene
from kit.solvers import sigma_schedule

Attend = Callable[[Tensor, KeysValues], Tensor]
"""`attend(query, seen)` mixes values: [B, N, h, d] and what they look at -> [B, N, h * d]."""


class Ask(Protocol):
    """The denoiser, and all plugins further inside: `ask(noisy, sigma, conditions)`."""

    def __call__(
        self, noisy: Tensor, sigma: Tensor, conditions: Conditions, *, window: int | None = None
    ) -> Tensor:
        """Predict the velocity of all rows.

        Whoever asks for a chunk piece by piece numbers the pieces by `window`, so that what
        plugins remember of one is not taken for another.
        """


@dataclass(frozen=True)
class Setup:
    """What is known of a run before anything is loaded.

    Attributes:
        denoiser: on the meta device: names and sizes, and `blocks()`, the list of them.
        geometry: strides and frame rate of the base.
        sampling: options of `kit.sampling.pipeline.TalkSampler` by name, defaults included:
            `steps`, `shift`, `text_scale`, `audio_scale`, `guidance`, `color_correction`...
        size: height and width of the video in pixels.
        has_reference: False where the video is made from text and speech alone.
        plugins: names of all plugins in the recipe's order.
    """

    denoiser: Denoiser
    geometry: Geometry
    sampling: Mapping[str, Any]
    size: tuple[int, int]
    has_reference: bool
    plugins: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What is the same in all chunks of a video.

    Attributes:
        denoiser: as it is asked; on the device that it works on, or on the CPU until its turn.
        encoders: of the same base.
        scene: what the video is of; `scene.source.again()` gives the source from its beginning.
        encoded: its text and speech.
        chunks: of the whole video.
        levels: noise levels of the steps of a chunk, before `sigmas`. [steps + 1]
        seed: of all random choices; see `kit.draws`.
    """

    denoiser: Any
    encoders: Encoders
    scene: Scene
    encoded: EncodedScene
    chunks: Sequence[Chunk]
    levels: Tensor
    seed: int


@dataclass(frozen=True)
class At:
    """Where in a run a hook is called.

    Attributes:
        chunk: which one.
        step: number of the step, from 0; outside of the steps 0.
        num_steps: steps of a chunk.
        sigma: noise level of the step.
        next_sigma: the level that the step leads to.
        branches: what the rows of the pass are: `full`, `no_text`, `no_audio`, `none`, or names
            that a plugin gave; () outside of passes. The speech is in `full` and `no_text`.
        window: which piece of a chunk a pass is for, if a `predict` asks for several; else 0.
        shared: this plugin's memory for the chunk: begins empty, and is forgotten after it.
        memory: the same, for the passes of these branches and this window alone; outside of
            passes, it is `shared`.
    """

    chunk: Chunk
    step: int
    num_steps: int
    sigma: float
    next_sigma: float
    branches: tuple[str, ...] = ()
    window: int = 0
    shared: dict[str, Any] = field(default_factory=dict, repr=False)
    memory: dict[str, Any] = field(default_factory=dict, repr=False)


class Plugin:
    """Changes nothing; a plugin overrides the hooks that it needs, and no other public names."""

    # Before the run

    def problems(self, setup: Setup) -> list[str]:
        """List what stands against using this plugin here, in words. Each.

        Asked before anything is loaded: files that are missing, a base of another width, other
        plugins or options that it does not go with.
        """
        return []

    def open(self, run: Run) -> None:
        """Load and compute what is the same in all chunks. Each.

        Asked once a video, also in a preview; the same plugin may be opened again for another one.
        """

    def sigmas(self, levels: Tensor) -> Tensor:
        """Give the noise levels to visit. One.

        Args:
            levels: those of the sampler, from high to low, 0 last. [steps + 1]

        Returns:
            Others, of any number. [steps' + 1]
        """
        return levels

    # At the start of a chunk

    def ends(self, ends: Ends, tail: Tensor | None, at: At) -> Ends:
        """Give the pictures that the chunk is given. Chain.

        Args:
            ends: its reference, -1 to 1 [3, height, width], and its last frame or None.
            tail: last frames of the chunk before; None in the first. [3, T, height, width]
            at: which chunk.
        """
        return ends

    def conditions(self, conditions: Conditions, at: At) -> Conditions:
        """Change what steers the chunk. Chain."""
        return conditions

    def noise(self, noise: Tensor, at: At) -> Tensor:
        """Change the noise that the chunk begins with. Chain. [1, C, F, H, W]"""
        return noise

    def start(self, noise: Tensor, at: At) -> Tensor:
        """Give the latents at the first level, `at.sigma`. One. [1, C, F, H, W]

        The context frames are put in afterwards.
        """
        return noise

    # In a step

    def is_active(self, at: At) -> bool:
        """Say whether the hooks below, up to `step`, are called in this step. Each.

        What a cache keeps in `at.memory` is forgotten when another plugin begins or ends to be
        active.
        """
        return True

    def branches(self, branches: dict[str, Conditions], at: At) -> dict[str, Conditions]:
        """Add, change or leave out what the denoiser is asked. Chain.

        Args:
            branches: name to conditions, batch of one each; `full` is there.
            at: which step. A plugin that adds a branch takes its velocity in `velocity`.
        """
        return branches

    def predict(
        self, ask: Ask, noisy: Tensor, sigma: Tensor, conditions: Conditions, at: At
    ) -> Tensor:
        """Ask the denoiser, several times, otherwise, or not at all. Wrap.

        Args:
            ask: what lies inside of this plugin.
            noisy: latents at this level. [B, C, F, H, W]
            sigma: the level, for each row. [B]
            conditions: of the rows `at.branches`.
            at: which pass.

        Returns:
            Velocity. [B, C, F, H, W]
        """
        return ask(noisy, sigma, conditions)

    def embed(self, x: Tensor, rotation: Tensor, entry: Entry, at: At) -> tuple[Tensor, Tensor]:
        """Change the video tokens, or how they turn, before the first block. Chain.

        Args:
            x: tokens. [B, N, D]
            rotation: points on the unit circle. complex64 [N, 1, d / 2]
            entry: what else is known then: noisy latents, embedding of the level, grid.
            at: which pass.
        """
        return x, rotation

    def blocks(self, blocks: Sequence[Update], x: Tensor, entry: Entry, at: At) -> Tensor:
        """Run the blocks, or some of them: the hook of caches. One.

        Args:
            blocks: in order, called as `block(x)`, each with what other plugins do to it, so that
                what is kept of a block's output contains that as well.
            x: video tokens. [B, N, D]
            entry: as for `embed`.
            at: which pass.
        """
        for block in blocks:
            x = block(x)
        return x

    def block(self, update: Update, number: int, x: Tensor, entry: Entry, at: At) -> Tensor:
        """Run a block, add to its result, or leave it out. Wrap.

        Args:
            update: the block, and what lies inside of this plugin; called as `update(x)`.
            number: of the block, from 0.
            x: video tokens, and no others. [B, N, D]
            entry: as for `embed`.
            at: which pass.
        """
        return update(x)

    def attention(
        self, attend: Attend, layer: Layer, query: Tensor, seen: KeysValues, at: At
    ) -> Tensor:
        """Attend, to other things or more than once. Wrap.

        Args:
            attend: attention as it is without this plugin.
            layer: which one: its `kind`, `self`, `text`, `image` or `audio`, and its `block` of
                `num_blocks`.
            query: [B, N, h, d]. In `audio`, tokens of a latent frame are a row: B is branches x F,
                all frames of a branch one behind another. `text` and `image` may be asked for a
                part of the tokens at a time.
            seen: keys, values and bias.
            at: which pass.

        Returns:
            Before the output projection. [B, N, h * d]
        """
        return attend(query, seen)

    def combine(
        self, velocities: Mapping[str, Tensor], text_scale: float, audio_scale: float, at: At
    ) -> Tensor:
        """Make one velocity of those of the branches: the hook of guidance. One.

        Args:
            velocities: by branch. [1, C, F, H, W] each
            text_scale: how far to go from the negative text to the text; 1 is off.
            audio_scale: how far to go from silence to the speech; 1 is off.
            at: which step.
        """
        raise NotImplementedError

    def velocity(self, velocity: Tensor, velocities: Mapping[str, Tensor], at: At) -> Tensor:
        """Change the velocity that the solver follows. Chain. [1, C, F, H, W]"""
        return velocity

    def step(self, noisy: Tensor, at: At) -> Tensor:
        """Change the latents after the solver's step, now at `at.next_sigma`. Chain.

        The context frames are put back afterwards. [1, C, F, H, W]
        """
        return noisy

    # At the end of a chunk

    def pixels(self, pixels: Tensor, at: At) -> Tensor:
        """Change the decoded frames, the chunk's `num_context` context frames first. Chain.

        -1 to 1, [3, num_frames, height, width]; its last frames become the next chunk's context.
        """
        return pixels


HOOKS = tuple(name for name in vars(Plugin) if not name.startswith("_"))
ONE = ("sigmas", "start", "blocks", "combine")
"""Hooks that two plugins cannot share."""

INSIDE = ("embed", "blocks", "block", "attention")
"""Hooks that are called within the denoiser."""

WITHIN_STEP = ("branches", "predict", *INSIDE, "combine", "velocity", "step")
"""Hooks that `is_active` switches."""


@dataclass(frozen=True)
class Gate:
    """The steps in which something is done.

    Attributes:
        start: where it begins.
        end: where it ends; excluded.
        unit: `step`: shares of the steps, 0 to 1; `sigma`: levels of noise, which fall, so that
            `start` is above `end`.
    """

    start: float
    end: float
    unit: Literal["step", "sigma"] = "step"

    def problems(self, setup: Setup) -> list[str]:
        """Say, in words, if none of the sampler's steps lies in it."""
        is_rising = self.unit == "step"
        first, last = (self.start, self.end) if is_rising else (self.end, self.start)
        given, order = f"start: {self.start}", "below" if is_rising else "above"
        if first >= last:
            return [f"{given} is not {order} end: {self.end}, in the unit '{self.unit}'"]
        steps = setup.sampling["steps"]
        levels = sigma_schedule(steps, setup.sampling["shift"])[:-1].tolist()
        if any(self._holds(step / steps, sigma) for step, sigma in enumerate(levels)):
            return []
        return [f"{given}, end: {self.end}: none of the {steps} steps lies between them"]

    def is_open(self, at: At) -> bool:
        """Say whether a step lies in it."""
        return self._holds(at.step / at.num_steps, at.sigma)

    def _holds(self, share: float, sigma: float) -> bool:
        if self.unit == "sigma":
            return self.start >= sigma > self.end
        return self.start <= share < self.end


def hooks_of(plugin: Plugin | type[Plugin]) -> tuple[str, ...]:
    """Name the hooks that a plugin overrides."""
    kind = plugin if isinstance(plugin, type) else type(plugin)
    return tuple(name for name in HOOKS if getattr(kind, name) is not getattr(Plugin, name))


def mistakes(kind: object) -> list[str]:
    """List what makes a class no plugin: hooks that do not exist, or take other things."""
    if not isinstance(kind, type) or not issubclass(kind, Plugin):
        return ["`plugin` is not a class that inherits kit.sampling.plugin.Plugin"]
    found = [
        f"'{name}' is no hook{did_you_mean(name, HOOKS)}; a name of its own begins with _"
        for name in dir(kind)
        if not name.startswith("_") and name not in HOOKS
    ]
    for name in hooks_of(kind):
        wanted, given = (list(signature(getattr(one, name)).parameters) for one in (Plugin, kind))
        if wanted != given:
            found.append(f"'{name}' takes ({', '.join(given)}); should take ({', '.join(wanted)})")
    return found
