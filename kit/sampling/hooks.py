"""Calls the hooks of a run's plugins, in order, each with its own memory."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from kit.batch import Conditions
from kit.guidance import Combine
from kit.models.attention import KeysValues, attend
from kit.models.inside import Entry, Layer, Update, run_all
from kit.sampling.chunks import Chunk
from kit.sampling.continuity import Ends
from kit.sampling.plugin import INSIDE, ONE, WITHIN_STEP, Ask, At, Plugin, Run, Setup, hooks_of

Memories = defaultdict[tuple[str, tuple[str, ...], int], dict[str, Any]]


class Hooks:
    """The plugins of a run.

    Args:
        plugins: by name, in the recipe's order.
    """

    def __init__(self, plugins: Mapping[str, Plugin] | None = None) -> None:
        self.plugins = dict(plugins or {})
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
        for name, plugin in self.plugins.items():
            found += [f"plugins.{name}: {problem}" for problem in plugin.problems(setup)]
        return found

    def open(self, run: Run) -> None:
        """Open every plugin."""
        for plugin in self.plugins.values():
            plugin.open(run)

    def sigmas(self, levels: Tensor) -> Tensor:
        """Give the noise levels to visit. [steps + 1]"""
        for name in self.having("sigmas"):
            levels = self.plugins[name].sigmas(levels)
        return levels

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
        self._hooks = hooks
        self._levels = levels.tolist()
        self._memories: Memories = defaultdict(dict)
        self._at = At(chunk, 0, len(self._levels) - 1, *self._levels[:2])
        self._active = tuple(hooks.plugins)

    def begin(self, step: int) -> None:
        """Go to a step, from 0; a cache forgets if other plugins are active than before."""
        self._at = replace(
            self._at, step=step, sigma=self._levels[step], next_sigma=self._levels[step + 1]
        )
        active = tuple(name for name in self._hooks.plugins if self._is_active(name))
        caches = self._hooks.having("blocks")
        if (set(active) ^ set(self._active)) - set(caches):
            for (name, branches, _), memory in self._memories.items():
                if name in caches and branches:
                    memory.clear()
        self._active = active

    def ends(self, ends: Ends, tail: Tensor | None) -> Ends:
        """See `Plugin.ends`."""
        for plugin, at in self._each("ends"):
            ends = plugin.ends(ends, tail, at)
        return ends

    def conditions(self, conditions: Conditions) -> Conditions:
        """See `Plugin.conditions`."""
        for plugin, at in self._each("conditions"):
            conditions = plugin.conditions(conditions, at)
        return conditions

    def noise(self, noise: Tensor) -> Tensor:
        """See `Plugin.noise`."""
        for plugin, at in self._each("noise"):
            noise = plugin.noise(noise, at)
        return noise

    def start(self, noise: Tensor) -> Tensor:
        """See `Plugin.start`."""
        for plugin, at in self._each("start"):
            noise = plugin.start(noise, at)
        return noise

    def branches(self, branches: dict[str, Conditions]) -> dict[str, Conditions]:
        """See `Plugin.branches`."""
        for plugin, at in self._each("branches"):
            branches = plugin.branches(branches, at)
        return branches

    def ask(self, denoiser: Callable[..., Tensor], branches: tuple[str, ...]) -> Ask:
        """Give the denoiser as the plugins let it be asked for some branches in this step."""
        names = self._named("predict")
        has_inside = any(self._named(hook) for hook in INSIDE)

        def asking(depth: int, same: int) -> Ask:
            def ask(
                noisy: Tensor, sigma: Tensor, conditions: Conditions, *, window: int | None = None
            ) -> Tensor:
                number = same if window is None else window
                if depth < len(names):
                    plugin, at = (
                        self._hooks.plugins[names[depth]],
                        self.at(names[depth], branches, number),
                    )
                    return plugin.predict(asking(depth + 1, number), noisy, sigma, conditions, at)
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
        for plugin, at in self._each("combine"):
            combined = plugin.combine(velocities, text_scale, audio_scale, at)
        if combined is None:
            combined = own(velocities, text_scale, audio_scale)
        for plugin, at in self._each("velocity"):
            combined = plugin.velocity(combined, velocities, at)
        return combined

    def step(self, noisy: Tensor) -> Tensor:
        """See `Plugin.step`."""
        for plugin, at in self._each("step"):
            noisy = plugin.step(noisy, at)
        return noisy

    def pixels(self, pixels: Tensor) -> Tensor:
        """See `Plugin.pixels`."""
        for plugin, at in self._each("pixels"):
            pixels = plugin.pixels(pixels, at)
        return pixels

    def at(self, name: str, branches: tuple[str, ...] = (), window: int = 0) -> At:
        """Say where we are, with a plugin's own memory."""
        return replace(
            self._at,
            branches=branches,
            window=window,
            shared=self._memories[name, (), 0],
            memory=self._memories[name, branches, window],
        )

    def each(self, hook: str, branches: tuple[str, ...], window: int) -> list[tuple[Plugin, At]]:
        """List the active plugins that have a hook, in order, each with where we are."""
        plugins = self._hooks.plugins
        return [(plugins[name], self.at(name, branches, window)) for name in self._named(hook)]

    def _each(self, hook: str) -> list[tuple[Plugin, At]]:
        return self.each(hook, (), 0)

    def _named(self, hook: str) -> list[str]:
        names = self._hooks.having(hook)
        return [name for name in names if name in self._active or hook not in WITHIN_STEP]

    def _is_active(self, name: str) -> bool:
        return self._hooks.plugins[name].is_active(self.at(name))


class InPass:
    """The hooks within one pass of the denoiser: an `Inside`.

    Args:
        chunk: hooks of the chunk, at a step.
        branches: what the rows of the pass are.
        window: number of the pass among several of the same branches.
    """

    def __init__(self, chunk: InChunk, branches: tuple[str, ...], window: int) -> None:
        self._of = {hook: chunk.each(hook, branches, window) for hook in INSIDE}
        self._entry: Entry | None = None

    def enter(self, x: Tensor, rotation: Tensor, entry: Entry) -> tuple[Tensor, Tensor]:
        """See `Plugin.embed`."""
        self._entry = entry
        for plugin, at in self._of["embed"]:
            x, rotation = plugin.embed(x, rotation, entry, at)
        return x, rotation

    def run(self, blocks: Sequence[Update], x: Tensor) -> Tensor:
        """See `Plugin.block` and `Plugin.blocks`."""
        assert self._entry is not None
        wrapped = [self._wrap(number, block) for number, block in enumerate(blocks)]
        for plugin, at in self._of["blocks"]:
            return plugin.blocks(wrapped, x, self._entry, at)
        return run_all(wrapped, x)

    def attend(self, layer: Layer, query: Tensor, seen: KeysValues) -> Tensor:
        """See `Plugin.attention`."""
        attending = attend
        for plugin, at in reversed(self._of["attention"]):
            attending = partial(_attend, plugin, attending, layer, at)
        return attending(query, seen)

    def _wrap(self, number: int, block: Update) -> Update:
        assert self._entry is not None
        for plugin, at in reversed(self._of["block"]):
            block = partial(plugin.block, block, number, entry=self._entry, at=at)
        return block


def _attend(
    plugin: Plugin,
    attending: Callable[[Tensor, KeysValues], Tensor],
    layer: Layer,
    at: At,
    query: Tensor,
    seen: KeysValues,
) -> Tensor:
    return plugin.attention(attending, layer, query, seen, at)
