"""Calls the hooks of a run's plugins, in order, each with its own memory."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from kit.batch import Conditions
from kit.errors import InputError
from kit.guidance import Combine
from kit.models.attention import KeysValues, attend
from kit.models.inside import Entry, Layer, Update, run_all
from kit.sampling.chunks import Chunk
from kit.sampling.continuity import Ends
from kit.sampling.plugin import (
    INSIDE,
    ONE,
    WITHIN_STEP,
    Ask,
    At,
    Attend,
    Plugin,
    Run,
    Setup,
    hooks_of,
)

T = TypeVar("T")

Memories = defaultdict[tuple[str, tuple[str, ...], int], dict[str, Any]]


class Hooks:
    """The plugins of a run.

    Args:
        plugins: by name, in the recipe's order.

    Attributes:
        called: plugins and their hooks that were called so far.
    """

    def __init__(self, plugins: Mapping[str, Plugin] | None = None) -> None:
        self.plugins = dict(plugins or {})
        self.called = set[tuple[str, str]]()
        self._owned = {name: hooks_of(plugin) for name, plugin in self.plugins.items()}

    def having(self, hook: str) -> list[str]:
        """Name the plugins that have a hook."""
        return [name for name, owned in self._owned.items() if hook in owned]

    def problems(self, setup: Setup) -> list[str]:
        """List what stands against using these plugins together and here, in words."""
        found = [
            f"plugins: {' and '.join(owners)} cannot go together: each is the one with '{hook}'"
            for hook in ONE
            if len(owners := self.having(hook)) > 1
        ]
        for name in self.plugins:
            told = self.call(name, "problems", setup, like=[""])
            found += [f"plugins.{name}: {problem}" for problem in told]
        return found

    def open(self, run: Run) -> None:
        """Open every plugin."""
        for name in self.plugins:
            self.call(name, "open", run, like=None)

    def sigmas(self, levels: Tensor) -> Tensor:
        """Give the noise levels to visit. [steps + 1]"""
        for name in self.having("sigmas"):
            levels = self.call(name, "sigmas", levels, like=levels)
        return levels

    def call(self, name: str, hook: str, *given: object, like: T) -> T:
        """Call a hook of a plugin.

        Args:
            name: of the plugin.
            hook: which one.
            given: what the hook takes.
            like: of the type and shape that the hook has to give.

        Raises:
            InputError: it gives something else.
        """
        self.called.add((name, hook))
        result: T = getattr(self.plugins[name], hook)(*given)
        found, wanted = _form(result), _form(like)
        if found != wanted:
            raise InputError(f"plugin '{name}': `{hook}` gave {found}; should give {wanted}")
        return result

    def chunk(self, chunk: Chunk, levels: Tensor) -> "InChunk":
        """Begin a chunk, with nothing remembered."""
        return InChunk(self, chunk, levels)


class InChunk:
    """The hooks of one chunk; `begin` says which step it is.

    Args:
        hooks: of the run.
        chunk: which one.
        levels: noise levels of its steps. [steps + 1]
    """

    def __init__(self, hooks: Hooks, chunk: Chunk, levels: Tensor) -> None:
        self.hooks = hooks
        self._levels = levels.tolist()
        self._memories: Memories = defaultdict(dict)
        self._at = At(chunk, 0, len(self._levels) - 1, *self._levels[:2])
        self._active = tuple(hooks.plugins)

    def begin(self, step: int) -> None:
        """Go to a step, from 0; a cache forgets if other plugins are active than before."""
        self._at = replace(
            self._at, step=step, sigma=self._levels[step], next_sigma=self._levels[step + 1]
        )
        active = tuple(name for name in self.hooks.plugins if self._is_active(name))
        caches = self.hooks.having("blocks")
        if (set(active) ^ set(self._active)) - set(caches):
            for (name, branches, _), memory in self._memories.items():
                if name in caches and branches:
                    memory.clear()
        self._active = active

    def ends(self, ends: Ends, tail: Tensor | None) -> Ends:
        """See `Plugin.ends`."""
        return self._chain("ends", ends, tail)

    def conditions(self, conditions: Conditions) -> Conditions:
        """See `Plugin.conditions`."""
        return self._chain("conditions", conditions)

    def noise(self, noise: Tensor) -> Tensor:
        """See `Plugin.noise`."""
        return self._chain("noise", noise)

    def start(self, noise: Tensor) -> Tensor:
        """See `Plugin.start`."""
        return self._chain("start", noise)

    def branches(self, branches: dict[str, Conditions]) -> dict[str, Conditions]:
        """See `Plugin.branches`."""
        return self._chain("branches", branches)

    def ask(self, denoiser: Callable[..., Tensor], branches: tuple[str, ...]) -> Ask:
        """Give the denoiser as the plugins let it be asked for some branches in this step."""
        names = self.named("predict")
        has_inside = any(self.named(hook) for hook in INSIDE)

        def asking(depth: int, same: int) -> Ask:
            def ask(
                noisy: Tensor, sigma: Tensor, conditions: Conditions, *, window: int | None = None
            ) -> Tensor:
                number = same if window is None else window
                if depth < len(names):
                    at = self.at(names[depth], branches, number)
                    given = asking(depth + 1, number), noisy, sigma, conditions, at
                    return self.hooks.call(names[depth], "predict", *given, like=noisy)
                if not has_inside:
                    return denoiser(noisy, sigma, conditions)
                inside = InPass(self, branches, number)
                return denoiser(noisy, sigma, conditions, inside=inside)

            return ask

        return asking(0, 0)

    def combine(
        self, velocities: Mapping[str, Tensor], text_scale: float, audio_scale: float, own: Combine
    ) -> Tensor:
        """See `Plugin.combine` and `Plugin.velocity`; `own` is the sampler's guidance."""
        combined = None
        for name in self.named("combine"):
            given = velocities, text_scale, audio_scale, self.at(name)
            combined = self.hooks.call(name, "combine", *given, like=velocities["full"])
        if combined is None:
            combined = own(velocities, text_scale, audio_scale)
        return self._chain("velocity", combined, velocities)

    def step(self, noisy: Tensor) -> Tensor:
        """See `Plugin.step`."""
        return self._chain("step", noisy)

    def pixels(self, pixels: Tensor) -> Tensor:
        """See `Plugin.pixels`."""
        return self._chain("pixels", pixels)

    def at(self, name: str, branches: tuple[str, ...] = (), window: int = 0) -> At:
        """Say where we are, with a plugin's own memory."""
        return replace(
            self._at,
            branches=branches,
            window=window,
            shared=self._memories[name, (), 0],
            memory=self._memories[name, branches, window],
        )

    def named(self, hook: str) -> list[str]:
        """Name the plugins whose hook is called now, in order."""
        names = self.hooks.having(hook)
        return [name for name in names if name in self._active or hook not in WITHIN_STEP]

    def _chain(self, hook: str, value: T, *given: object) -> T:
        for name in self.named(hook):
            value = self.hooks.call(name, hook, value, *given, self.at(name), like=value)
        return value

    def _is_active(self, name: str) -> bool:
        return self.hooks.call(name, "is_active", self.at(name), like=True)


class InPass:
    """The hooks within one pass of the denoiser: an `Inside`.

    Args:
        chunk: hooks of the chunk, at a step.
        branches: what the rows of the pass are.
        window: number of the pass among several of the same branches.
    """

    def __init__(self, chunk: InChunk, branches: tuple[str, ...], window: int) -> None:
        self._call = chunk.hooks.call
        self._of = {
            hook: [(name, chunk.at(name, branches, window)) for name in chunk.named(hook)]
            for hook in INSIDE
        }
        self._entry: Entry | None = None

    def enter(self, x: Tensor, rotation: Tensor, entry: Entry) -> tuple[Tensor, Tensor]:
        """See `Plugin.embed`."""
        self._entry = entry
        entered = x, rotation
        for name, at in self._of["embed"]:
            entered = self._call(name, "embed", *entered, entry, at, like=entered)
        return entered

    def run(self, blocks: Sequence[Update], x: Tensor) -> Tensor:
        """See `Plugin.block` and `Plugin.blocks`."""
        wrapped = [self._wrap(number, block) for number, block in enumerate(blocks)]
        for name, at in self._of["blocks"]:
            return self._call(name, "blocks", wrapped, x, self._entry, at, like=x)
        return run_all(wrapped, x)

    def attend(self, layer: Layer, query: Tensor, seen: KeysValues) -> Tensor:
        """See `Plugin.attention`."""
        attending = attend
        for name, at in reversed(self._of["attention"]):
            attending = partial(self._attend, name, at, attending, layer)
        return attending(query, seen)

    def _wrap(self, number: int, block: Update) -> Update:
        for name, at in reversed(self._of["block"]):
            block = partial(self._update, name, at, block, number)
        return block

    def _update(self, name: str, at: At, update: Update, number: int, x: Tensor) -> Tensor:
        return self._call(name, "block", update, number, x, self._entry, at, like=x)

    def _attend(
        self, name: str, at: At, inner: Attend, layer: Layer, query: Tensor, seen: KeysValues
    ) -> Tensor:
        given = inner, layer, query, seen, at
        return self._call(name, "attention", *given, like=query.flatten(2))


def _form(value: object) -> str:
    """Say of what type a value is, and of what shape the tensors in it."""
    match value:
        case Tensor():
            # Only noise levels are one row, and a plugin may give any number of them.
            return "a row of numbers" if value.ndim == 1 else f"a tensor {list(value.shape)}"
        case Ends():
            return f"Ends with first {_form(value.first)}"
        case tuple():
            return f"({', '.join(_form(each) for each in value)})"
        case dict():
            return f"a dict of {', '.join({_form(each): None for each in value.values()})}"
        case list() if all(isinstance(each, str) for each in value):
            return "a list of texts"
    return "None" if value is None else type(value).__name__
