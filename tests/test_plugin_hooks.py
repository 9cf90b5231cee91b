"""Plugins' hooks: when they are called, with what, how they combine, and what they remember."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kit.batch import Conditions
from kit.draws import draw_normal
from kit.errors import InputError
from kit.guidance import drop_audio
from kit.models.attention import KeysValues
from kit.models.base import Encoders, Geometry
from kit.models.inside import Entry, Layer, Update
from kit.models.wan import Wan
from kit.sampling.continuity import Ends
from kit.sampling.frames import Clips, StillSource
from kit.sampling.hooks import Hooks
from kit.sampling.pipeline import TalkSampler, no_progress
from kit.sampling.plugin import HOOKS, Ask, At, Attend, Gate, Plugin, Run, Setup, hooks_of, mistakes
from tests.test_sampler import make_scene

MakeWan = Callable[[], Wan]
STEPS = 3


def make_sampler(plugins: Mapping[str, Plugin] | None = None, **options: Any) -> TalkSampler:
    sizes = {"steps": STEPS, "num_frames": 9, "context_frames": 5}
    return TalkSampler(Hooks(plugins), **{**sizes, **options})


@pytest.fixture(scope="module")
def denoiser(tiny_denoiser: MakeWan) -> Wan:
    return tiny_denoiser()


class Film:
    """Makes videos of twelve frames in two chunks."""

    def __init__(self, denoiser: Wan, encoders: Encoders) -> None:
        self.denoiser, self.encoders = denoiser, encoders

    def __call__(self, *plugins: Plugin, **options: Any) -> Tensor:
        named = {f"{number}": plugin for number, plugin in enumerate(plugins)}
        sampler = make_sampler(named, **options)
        made = sampler.sample(self.denoiser, self.encoders, make_scene(12), 0, no_progress)
        return torch.cat([pixels for pixels, _ in made])


@pytest.fixture(scope="module")
def film(denoiser: Wan, tiny_encoders: Encoders) -> Film:
    return Film(denoiser, tiny_encoders)


@pytest.fixture(scope="module")
def plain(film: Film) -> Tensor:
    return film()


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Compare videos that roundings on the way may make differ a little."""
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


class Watching(Plugin):
    """Has every hook but those that only one may have, changes nothing, and notes all calls."""

    def __init__(self) -> None:
        self._told: list[tuple[str, At | None]] = []

    def problems(self, setup: Setup) -> list[str]:
        return super().problems(setup)

    def open(self, run: Run) -> None:
        self._told.append(("open", None))
        assert [chunk.index for chunk in run.chunks] == [0, 1]

    def ends(self, ends: Ends, tail: Tensor | None, at: At) -> Ends:
        self._told.append(("ends", at))
        assert (tail is None) == (at.chunk.index == 0)
        return ends

    def conditions(self, conditions: Conditions, at: At) -> Conditions:
        self._told.append(("conditions", at))
        return conditions

    def noise(self, noise: Tensor, at: At) -> Tensor:
        self._told.append(("noise", at))
        return noise

    def is_active(self, at: At) -> bool:
        self._told.append(("is_active", at))
        return True

    def branches(self, branches: dict[str, Conditions], at: At) -> dict[str, Conditions]:
        self._told.append(("branches", at))
        assert [*branches] == ["full", "no_text", "none"]
        return branches

    def predict(
        self, ask: Ask, noisy: Tensor, sigma: Tensor, conditions: Conditions, at: At
    ) -> Tensor:
        self._told.append(("predict", at))
        assert len(noisy) == len(conditions.text) == len(at.branches)
        assert sigma.tolist() == [at.sigma] * len(at.branches)
        return ask(noisy, sigma, conditions)

    def embed(self, x: Tensor, rotation: Tensor, entry: Entry, at: At) -> tuple[Tensor, Tensor]:
        self._told.append(("embed", at))
        frames, rows, columns = entry.grid
        assert x.shape[1] == len(rotation) == frames * rows * columns
        assert entry.noisy.shape[1] == 20
        assert entry.time.shape == x[:, 0].shape
        return x, rotation

    def block(self, update: Update, number: int, x: Tensor, entry: Entry, at: At) -> Tensor:
        self._told.append((f"block {number} of {entry.num_blocks}", at))
        return update(x)

    def attention(
        self, attend: Attend, layer: Layer, query: Tensor, seen: KeysValues, at: At
    ) -> Tensor:
        self._told.append((f"{layer.kind} {layer.block}", at))
        return attend(query, seen)

    def velocity(self, velocity: Tensor, velocities: Mapping[str, Tensor], at: At) -> Tensor:
        self._told.append(("velocity", at))
        return velocity

    def step(self, noisy: Tensor, at: At) -> Tensor:
        self._told.append(("step", at))
        return noisy

    def pixels(self, pixels: Tensor, at: At) -> Tensor:
        self._told.append(("pixels", at))
        return pixels


def test_watching_hooks_change_no_bit(film: Film, plain: Tensor) -> None:
    assert torch.equal(film(Watching()), plain)
    assert torch.equal(film(Plugin()), plain)


@pytest.mark.parametrize("together", [True, False])
def test_hooks_are_called_in_order(film: Film, together: bool) -> None:
    plugin = Watching()
    film(plugin, together=together)
    told = [name for name, _ in plugin._told]
    assert told[0] == "open"
    names = list(dict.fromkeys(told))
    assert names == [
        "open", "ends", "noise", "conditions", "is_active", "branches", "predict", "embed",
        "block 0 of 2", "self 0", "text 0", "image 0", "audio 0",
        "block 1 of 2", "self 1", "text 1", "image 1", "audio 1",
        "velocity", "step", "pixels",
    ]  # fmt: skip
    chunks = [[name for name, at in plugin._told if at and at.chunk.index == n] for n in (0, 1)]
    assert chunks[0] == chunks[1]
    assert chunks[0].count("predict") == STEPS * (1 if together else 3)
    assert chunks[0].count("pixels") == 1
    steps = [at for name, at in plugin._told if name == "step" and at is not None]
    assert [at.step for at in steps] == [0, 1, 2, 0, 1, 2]
    assert steps[0].sigma == 1
    assert [at.next_sigma for at in steps[:2]] == [at.sigma for at in steps[1:3]]
    assert steps[2].next_sigma == 0
    branches = {at.branches for name, at in plugin._told if name == "predict" and at is not None}
    every = ("full", "no_text", "none")
    assert branches == ({every} if together else {(name,) for name in every})


class Adding(Plugin):
    """Adds one and the same to all video tokens behind a block."""

    def __init__(self, by: float, number: int = 0) -> None:
        self._by, self._number = by, number

    def block(self, update: Update, number: int, x: Tensor, entry: Entry, at: At) -> Tensor:
        residual = self._by * (number == self._number) * draw_normal((x.shape[-1],), "residual")
        return update(x) + residual


class Scaling(Plugin):
    """Scales what comes out of the denoiser, the velocity, or the pixels."""

    def __init__(self, by: float, hook: str = "predict") -> None:
        self._by, self._hook = by, hook

    def predict(
        self, ask: Ask, noisy: Tensor, sigma: Tensor, conditions: Conditions, at: At
    ) -> Tensor:
        velocity = ask(noisy, sigma, conditions)
        return velocity * self._by + (self._by - 1) if self._hook == "predict" else velocity

    def pixels(self, pixels: Tensor, at: At) -> Tensor:
        return pixels * self._by + (self._by - 1) if self._hook == "pixels" else pixels


def test_residuals_sum(film: Film, plain: Tensor) -> None:
    both = film(Adding(0.5), Adding(1.5))
    assert_near(both, film(Adding(2.0)))
    assert not torch.allclose(both, plain, atol=0.01)
    assert torch.equal(film(Adding(0.0)), plain)


def test_the_first_wraps_the_others(film: Film, denoiser: Wan) -> None:
    asked = Hooks({"a": Scaling(2.0), "b": Scaling(3.0)}).chunk(
        make_sampler().plan(5)[0], torch.tensor([1.0, 0.0])
    )

    def one(noisy: Tensor, sigma: Tensor, conditions: object) -> Tensor:
        return torch.ones(1)

    given: Any = (torch.zeros(1), torch.ones(1), None)
    # The innermost makes 3 + 2 of 1, the outer one 2 * 5 + 1 of that.
    assert asked.ask(one, ("full",))(*given).item() == 11


def test_chains_follow_the_recipe(film: Film) -> None:
    def end(*plugins: Plugin) -> Tensor:
        hooks = Hooks({str(number): plugin for number, plugin in enumerate(plugins)})
        return hooks.chunk(make_sampler().plan(5)[0], torch.tensor([1.0, 0])).pixels(torch.ones(1))

    assert end(Scaling(2.0, "pixels"), Scaling(3.0, "pixels")).item() == 3 * 3 + 2
    assert end(Scaling(3.0, "pixels"), Scaling(2.0, "pixels")).item() == 2 * 5 + 1


class Counting(Plugin):
    """Counts calls in the memories that it is given."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, int, tuple[str, ...], int, int, int]] = []

    def predict(
        self, ask: Ask, noisy: Tensor, sigma: Tensor, conditions: Conditions, at: At
    ) -> Tensor:
        for memory in (at.memory, at.shared):
            memory["calls"] = memory.get("calls", 0) + 1
        counts = at.memory["calls"], at.shared["calls"]
        self._seen.append((at.chunk.index, at.step, at.branches, at.window, *counts))
        return ask(noisy, sigma, conditions)


class Windows(Plugin):
    """Asks for the same frames twice, as two windows."""

    def predict(
        self, ask: Ask, noisy: Tensor, sigma: Tensor, conditions: Conditions, at: At
    ) -> Tensor:
        both = [ask(noisy, sigma, conditions, window=number) for number in (0, 1)]
        return torch.stack(both).mean(0)


def test_memory_is_of_a_chunk_of_branches_and_of_a_window(film: Film, plain: Tensor) -> None:
    counting = Counting()
    assert torch.equal(film(Windows(), counting, together=False), film(together=False))
    assert len(counting._seen) == 2 * STEPS * 3 * 2
    for chunk, step, _, window, own, shared in counting._seen:
        assert own == step + 1
        assert chunk in (0, 1) and window in (0, 1)
        assert shared <= STEPS * 3 * 2
    assert max(seen[-1] for seen in counting._seen) == STEPS * 3 * 2


def test_two_plugins_of_one_class_do_not_share_memory(film: Film) -> None:
    one, other = Counting(), Counting()
    film(one, other)
    assert [seen[-2] for seen in one._seen] == [1, 2, 3, 1, 2, 3]
    assert one._seen == other._seen


class Silent(Plugin):
    """Asks for one more branch in some steps, and takes the velocity of it."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._conditions: Conditions | None = None

    def is_active(self, at: At) -> bool:
        return self._gate.is_open(at)

    def branches(self, branches: dict[str, Conditions], at: At) -> dict[str, Conditions]:
        silent = at.shared.setdefault("silent", drop_audio(branches["full"]))
        return {**branches, "silent": silent}

    def velocity(self, velocity: Tensor, velocities: Mapping[str, Tensor], at: At) -> Tensor:
        return velocities["silent"]


@pytest.mark.parametrize("together", [True, False])
def test_a_branch_of_its_own(film: Film, together: bool) -> None:
    scales = {"text_scale": 1.0, "together": together}
    always, silent = Silent(Gate(0, 1)), Counting()
    found = film(always, silent, audio_scale=4.0, **scales)
    rows = {seen[2] for seen in silent._seen}
    every = ("full", "no_audio", "silent")
    assert rows == ({every} if together else {(name,) for name in every})
    # A guidance scale of 0 follows the branch without speech as well.
    assert_near(found, film(audio_scale=0.0, **scales))


def test_gates(film: Film) -> None:
    sometimes, watching = Silent(Gate(0.3, 0.6)), Counting()
    film(sometimes, watching, text_scale=1.0)
    assert ["silent" in seen[2] for seen in watching._seen] == 2 * [False, True, False]

    def at(step: int, sigma: float) -> At:
        return At(make_sampler().plan(5)[0], step, 5, sigma, 0.0)

    first = Gate(0, 0.1)
    assert [first.is_open(at(step, 1)) for step in range(5)] == [True] + 4 * [False]
    early = Gate(1.0, 0.9, "sigma")
    assert [early.is_open(at(0, sigma)) for sigma in (1.0, 0.95, 0.9)] == [True, True, False]


def test_gates_without_a_step_are_told(denoiser: Wan) -> None:
    setup = make_setup(denoiser)
    assert Gate(0.5, 0.5).problems(setup) == [
        "start: 0.5 is not below end: 0.5, in the unit 'step'"
    ]
    assert Gate(0.5, 0.9, "sigma").problems(setup) == [
        "start: 0.5 is not above end: 0.9, in the unit 'sigma'"
    ]
    assert Gate(0.01, 0.2).problems(setup) == [
        "start: 0.01, end: 0.2: none of the 3 steps lies between them"
    ]
    assert Gate(0.99, 0.98, "sigma").problems(setup) != []
    assert Gate(1.0, 0.98, "sigma").problems(setup) == []
    assert Gate(0.0, 0.2).problems(setup) == []


class Keeping(Plugin):
    """A cache: runs the blocks in the first step and gives the same result in all others."""

    def __init__(self) -> None:
        self._computed: list[int] = []

    def blocks(self, blocks: Sequence[Update], x: Tensor, entry: Entry, at: At) -> Tensor:
        if "result" not in at.memory:
            self._computed.append(at.step)
            at.memory["result"] = super().blocks(blocks, x, entry, at)
        result: Tensor = at.memory["result"]
        return result


class GatedAdding(Adding):
    """Adds in the steps of a gate."""

    def is_active(self, at: At) -> bool:
        return Gate(0, 0.5).is_open(at)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_caches_lie_outside_of_controls_and_forget_when_those_end(
    film: Film, order: tuple[int, int]
) -> None:
    cache = Keeping()
    film(cache)
    assert cache._computed == [0, 0]
    cache, control = Keeping(), GatedAdding(2.0)
    film(*(plugin for _, plugin in sorted(zip(order, (cache, control), strict=True))))
    # Of three steps, the first two are with the control.
    assert cache._computed == [0, 2, 0, 2]


class Levels(Plugin):
    """Begins at another level."""

    def sigmas(self, levels: Tensor) -> Tensor:
        return torch.cat([torch.tensor([0.5]), levels[levels < 0.5]])

    def start(self, noise: Tensor, at: At) -> Tensor:
        assert at.sigma == 0.5
        return noise * 0


def test_levels_of_a_plugin_are_those_of_the_sampler(film: Film) -> None:
    sampler = make_sampler({"levels": Levels()}, steps=6, shift=1.0)
    assert sampler.sigmas.tolist()[0] == 0.5
    assert len(sampler.sigmas) == 1 + int((make_sampler(steps=6, shift=1.0).sigmas < 0.5).sum())
    assert film(Levels(), steps=6).isfinite().all()


class Free(Plugin):
    """Guides by the full branch alone."""

    def combine(
        self, velocities: Mapping[str, Tensor], text_scale: float, audio_scale: float, at: At
    ) -> Tensor:
        assert (text_scale, audio_scale) == (5.0, 4.0)
        return velocities["full"]


def test_guidance_of_a_plugin(film: Film) -> None:
    # Not to the bit: fewer branches make other batches.
    assert_near(film(Free()), film(text_scale=1.0, audio_scale=1.0))


def make_setup(denoiser: Wan, *names: str) -> Setup:
    sampling = {"steps": STEPS, "shift": 7.0}
    return Setup(denoiser, Geometry(), sampling, (32, 32), True, names)


def test_conflicts_are_told_by_name(denoiser: Wan) -> None:
    class Doubting(Plugin):
        def problems(self, setup: Setup) -> list[str]:
            return [f"does not go with {other}" for other in setup.plugins if other == "first"]

    hooks = Hooks({"first": Levels(), "second": Levels(), "third": Doubting()})
    assert hooks.problems(make_setup(denoiser, *hooks.plugins)) == [
        "plugins: first and second cannot go together: each is the one with 'sigmas'",
        "plugins: first and second cannot go together: each is the one with 'start'",
        "plugins.third: does not go with first",
    ]


def test_what_is_no_hook_is_refused() -> None:
    class Misspelt(Plugin):
        def blok(self, x: Tensor) -> Tensor:
            return x

        def pixels(self, frames: Tensor, at: At) -> Tensor:
            return frames

    found = mistakes(Misspelt)
    assert found[0].startswith("'blok' is no hook; did you mean 'block'?")
    assert found[1] == "'pixels' takes (self, frames, at); should take (self, pixels, at)"
    assert mistakes(Watching) == mistakes(Plugin) == []
    assert "not a class" in mistakes(Watching())[0]
    assert set(hooks_of(Watching)) == set(HOOKS) - {"sigmas", "start", "blocks", "combine"}


def test_what_has_another_shape_is_refused_by_plugin_and_hook(film: Film) -> None:
    class Cutting(Plugin):
        def block(self, update: Update, number: int, x: Tensor, entry: Entry, at: At) -> Tensor:
            return update(x)[:, 1:]

    class Unflattened(Plugin):
        def attention(
            self, attend: Attend, layer: Layer, query: Tensor, seen: KeysValues, at: At
        ) -> Tensor:
            return attend(query, seen).view_as(query)

    class Alone(Plugin):
        def embed(self, x: Tensor, rotation: Tensor, entry: Entry, at: At) -> Any:
            return x

    for plugin, hook in ((Cutting(), "block"), (Unflattened(), "attention"), (Alone(), "embed")):
        with pytest.raises(InputError, match=rf"plugin '0': `{hook}` gave a tensor \[3, .* give "):
            film(plugin)


def test_clips_overlap_and_are_read_once() -> None:
    class Numbered:
        def __init__(self) -> None:
            self.asked: list[int] = []

        def frame(self, index: int) -> Tensor:
            self.asked.append(index)
            return torch.full((3, 2, 2), float(index))

        def again(self) -> "Numbered":
            return Numbered()

    source = Numbered()
    clips = Clips(source)
    for start in (0, 4, 8, 20):
        window = clips.window(start, 6)
        assert window[0, :, 0, 0].tolist() == [float(start + n) for n in range(6)]
    assert source.asked == [*range(14), *range(20, 26)]


def test_a_still_source_again_is_the_same() -> None:
    scene = make_scene(5)
    assert isinstance(scene.source, StillSource)
    assert torch.equal(scene.source.again().frame(7), scene.source.frame(0))


def test_conditions_ends_and_noise_reach_the_sampler(film: Film, plain: Tensor) -> None:
    class Grey(Plugin):
        def ends(self, ends: Ends, tail: Tensor | None, at: At) -> Ends:
            return ends._replace(first=torch.zeros_like(ends.first))

    class Mute(Plugin):
        def conditions(self, conditions: Conditions, at: At) -> Conditions:
            return replace(conditions, audio=torch.zeros_like(conditions.audio))

    class OtherNoise(Plugin):
        def noise(self, noise: Tensor, at: At) -> Tensor:
            return draw_normal(tuple(noise.shape), at.chunk.index, "other")

    for plugin in (Grey(), Mute(), OtherNoise()):
        assert not torch.allclose(film(plugin), plain, atol=1e-3), plugin
