"""Caches skip the passes that their sources skip, forget when they must, and tell what they did."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import pytest
import torch

# The way to make diffusers' caches known with blocks of other classes than its own.
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from kit import plugins
from kit.draws import draw_normal, generator
from kit.models.base import Encoders
from kit.models.inside import Entry, Update
from kit.models.wan import Wan
from kit.models.wan_base import WanBase
from kit.sampling.chunks import Chunk
from kit.sampling.hooks import Hooks, InChunk
from kit.sampling.pipeline import TalkSampler, no_progress
from kit.sampling.plugin import At, Gate, Plugin, Setup
from tests import published
from tests.originals import draw_states, write_original
from tests.test_sampler import make_scene

CPU = torch.device("cpu")
CHUNK = Chunk(0, 0, 9, 0, 9)
NUM_BLOCKS, STEPS = 4, 20
BRANCH = ("full",)

ALWAYS: dict[str, dict[str, Any]] = {
    "tea_cache": {"coefficients": [1.0, 0.0], "threshold": 1e9, "first_steps": 1},
    "first_block": {"threshold": 1e9},
    "mag_cache": {"ratios": [1.0], "threshold": 1e9, "max_skip_steps": 99, "first_steps": 1},
}
"""Options with which each skips whatever it may."""


def make(name: str, **options: Any) -> Plugin:
    return plugins.load(name)(**options)


def always(name: str, **options: Any) -> Plugin:
    return make(name, **{**ALWAYS[name], **options})


class Stack:
    """Blocks that count their calls; what they add drifts slowly from step to step."""

    def __init__(self) -> None:
        self.calls = 0
        self.weights = 0.2 * draw_normal((NUM_BLOCKS, 6, 6), "weights")

    def blocks(self) -> list[Update]:
        def run(number: int, x: Tensor) -> Tensor:
            self.calls += number == NUM_BLOCKS - 1
            return x + (x @ self.weights[number]).tanh()

        return [partial(run, number) for number in range(NUM_BLOCKS)]


def tokens(step: int, branch: int = 0) -> Tensor:
    """Draw video tokens that change less and less. [2, 5, 6]"""
    drift = draw_normal((2, 5, 6), "drift", branch) * 0.8**step
    return draw_normal((2, 5, 6), "tokens", branch) + drift


def entry_of(modulation: Tensor) -> Entry:
    empty = torch.zeros(0)
    return Entry(empty, empty, modulation, (1, 1, 1), NUM_BLOCKS)


def begin(plugin: Plugin, *others: Plugin, steps: int = STEPS) -> InChunk:
    named = {"cache": plugin, **{str(number): other for number, other in enumerate(others)}}
    return Hooks(named).chunk(CHUNK, torch.linspace(1, 0, steps + 1))


def ask(
    plugin: Plugin, chunk: InChunk, stack: Stack, x: Tensor, modulation: Tensor | None = None
) -> tuple[Tensor, bool]:
    """Run the blocks under a cache, and say whether the last one ran."""
    before = stack.calls
    given = torch.ones(1) if modulation is None else modulation
    result = plugin.blocks(stack.blocks(), x, entry_of(given), chunk.at("cache", BRANCH))
    return result, stack.calls > before


def run_steps(plugin: Plugin, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[bool]]:
    chunk, stack, results, computed = begin(plugin, steps=len(inputs)), Stack(), [], []
    for step, x in enumerate(inputs):
        chunk.begin(step)
        result, ran = ask(plugin, chunk, stack, x)
        results.append(result)
        computed.append(ran)
    return results, computed


INPUTS = [tokens(step) for step in range(STEPS)]


# The same as their sources


@pytest.fixture(scope="module")
def published_denoiser(tmp_path_factory: pytest.TempPathFactory) -> Wan:
    folder = write_original(tmp_path_factory.mktemp("wan"), draw_states(published.SEED))
    audio = str(folder / "infinitetalk.safetensors")
    base = WanBase(path=str(folder), audio_weights=audio, dtype="float32")
    return cast(Wan, base.load_denoiser(CPU))


@pytest.mark.parametrize("name", published.CACHES)
@torch.no_grad()
def test_tea_cache_decides_and_predicts_as_the_public_code(
    published_denoiser: Wan, name: str
) -> None:
    expected, levels = published.facts()[name], published.cached_levels()
    cache = make("tea_cache", coefficients=name.removeprefix("TeaCache "))
    hooks = Hooks({"tea_cache": cache}).chunk(CHUNK, torch.cat([levels, torch.zeros(1)]))
    velocities = []
    for step, sigma in enumerate(levels):
        hooks.begin(step)
        for branch, given in published.cached_branches().items():
            predict = hooks.ask(published_denoiser, (branch,))
            velocities.append(predict(published.cached_noisy(step), sigma[None], given))
    reused = hooks.at("tea_cache").shared["reused"]
    assert "".join(str(int(not skipped)) for skipped in reused) == expected["computed"]
    published.assert_agrees(torch.cat(velocities), expected, 2e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 2.0])
def test_tea_cache_follows_its_rule(threshold: float) -> None:
    """Stated once more: in numbers, after the paper."""
    levels = 1 + 0.3 * torch.rand(30, generator=generator("modulation")).cumsum(0)
    first, last, (slope, offset) = 3, 2, (1.5, -0.02)
    total, expected = 0.0, []
    for step, level in enumerate(levels.tolist()):
        total += slope * abs(level / levels[step - 1].item() - 1) + offset
        is_kept = step < first or step >= len(levels) - last
        expected.append(is_kept or not (total < threshold and threshold > 0))
        total = 0.0 if expected[-1] else total
    cache = make(
        "tea_cache",
        coefficients=[slope, offset],
        threshold=threshold,
        first_steps=first,
        last_steps=last,
    )
    chunk, stack = begin(cache, steps=len(levels)), Stack()
    found = []
    for step, level in enumerate(levels):
        chunk.begin(step)
        found.append(ask(cache, chunk, stack, INPUTS[0], level * torch.tensor([1.0, -3.0]))[1])
    assert found == expected
    assert all(expected) == (threshold == 0)


class Shell(nn.Module):
    """A block as diffusers' hooks know one."""

    def __init__(self, update: Update) -> None:
        super().__init__()
        self.update = update

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.update(hidden_states)


class Peer(CacheMixin, nn.Module):
    """Our blocks under diffusers' hooks."""

    def __init__(self, stack: Stack, config: object) -> None:
        super().__init__()
        TransformerBlockRegistry.register(Shell, TransformerBlockMetadata(0))
        self.blocks = nn.ModuleList(Shell(update) for update in stack.blocks())
        self.stack = stack
        self.enable_cache(config)

    def run_steps(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[bool]]:
        results, computed = [], []
        for x in inputs:
            before = self.stack.calls
            with self.cache_context("full"):
                for block in self.blocks:
                    x = block(x)
            results.append(x)
            computed.append(self.stack.calls > before)
        return results, computed


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.4])
def test_first_block_cache_is_that_of_diffusers(threshold: float) -> None:
    expected, passes = Peer(Stack(), FirstBlockCacheConfig(threshold)).run_steps(INPUTS)
    found, computed = run_steps(make("first_block", threshold=threshold), INPUTS)
    assert computed == passes
    assert 0 < sum(computed) < STEPS
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))


def test_a_first_block_that_is_left_out_is_no_reason_to_skip() -> None:
    cache, chunk, stack = always("first_block"), begin(always("first_block")), Stack()
    for x in INPUTS[:2]:
        blocks = [lambda x: x, *stack.blocks()[1:]]
        cache.blocks(blocks, x, entry_of(torch.ones(1)), chunk.at("cache", BRANCH))
    assert stack.calls == 2


@pytest.mark.parametrize("options", [(0.06, 3, 20), (0.3, 5, 20), (0.1, 9, 31)])
def test_mag_cache_is_that_of_diffusers(options: tuple[float, int, int]) -> None:
    threshold, most, count = options
    ratios = (1 + 0.05 * draw_normal((count,), "ratios")).tolist()
    config = MagCacheConfig(threshold, most, 0.2, STEPS, ratios)
    expected, passes = Peer(Stack(), config).run_steps(INPUTS)
    cache = make(
        "mag_cache", ratios=ratios, threshold=threshold, max_skip_steps=most, first_steps=4
    )
    found, computed = run_steps(cache, INPUTS)
    assert computed == passes
    assert 4 < sum(computed) < STEPS
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))


def test_mag_cache_measures_what_diffusers_measures(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    Peer(Stack(), MagCacheConfig(num_inference_steps=STEPS, calibrate=True)).run_steps(INPUTS)
    expected = capsys.readouterr().out.split("[")[-1].split("]")[0]
    cache = make("mag_cache")
    chunk, stack = begin(cache), Stack()
    for step, x in enumerate(INPUTS):
        chunk.begin(step)
        assert ask(cache, chunk, stack, x)[1]
    with caplog.at_level(logging.INFO, logger="kit"):
        chunk.pixels(torch.zeros(1))
    (line,) = caplog.messages
    assert line.startswith("chunk 1: mag_cache: {ratios: [1.0, ")
    found = line.split("[")[1].split("]")[0]
    numbers = [torch.tensor([float(word) for word in row.split(",")]) for row in (found, expected)]
    torch.testing.assert_close(*numbers, atol=1e-5, rtol=0)


# What every cache promises


@pytest.fixture(scope="module")
def film(tiny_denoiser: Callable[[], Wan], tiny_encoders: Encoders) -> Callable[..., Tensor]:
    denoiser = tiny_denoiser()

    def make_film(*used: Plugin, together: bool = True) -> Tensor:
        named = {str(number): plugin for number, plugin in enumerate(used)}
        sampler = TalkSampler(
            Hooks(named), steps=4, num_frames=9, context_frames=5, together=together
        )
        made = sampler.sample(denoiser, tiny_encoders, make_scene(12), 0, no_progress)
        return torch.cat([pixels for pixels, _ in made])

    return make_film


@pytest.fixture(scope="module")
def plain(film: Callable[..., Tensor]) -> dict[bool, Tensor]:
    return {together: film(together=together) for together in (True, False)}


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.INFO, logger="kit"):
        yield lambda: [line for line in caplog.messages if "passes" in line]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", ALWAYS)
def test_a_threshold_of_zero_changes_no_bit(
    film: Callable[..., Tensor],
    plain: dict[bool, Tensor],
    told: Callable[[], list[str]],
    name: str,
    together: bool,
) -> None:
    cache = always(name, threshold=0.0)
    assert torch.equal(film(cache, together=together), plain[together])
    count = 4 if together else 12
    assert told() == [f"chunk {number}: 0 of {count} passes skipped" for number in (1, 2)]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", ALWAYS)
def test_each_chunk_and_branch_is_computed_once_at_least(
    film: Callable[..., Tensor],
    plain: dict[bool, Tensor],
    told: Callable[[], list[str]],
    name: str,
    together: bool,
) -> None:
    cache = always(name)
    video = film(cache, together=together)
    skipped, count = (3, 4) if together else (9, 12)
    line = f"{skipped} of {count} passes skipped"
    assert told() == [f"chunk 1: {line}", f"chunk 2: {line}"]
    assert not torch.equal(video, plain[together])


class Adding(Plugin):
    """Adds to what the first block gives, in the second half of the steps."""

    def is_active(self, at: At) -> bool:
        return Gate(0.5, 1.0).is_open(at)

    def block(self, update: Update, number: int, x: Tensor, entry: Entry, at: At) -> Tensor:
        return update(x) + (number == 1)


@pytest.mark.parametrize("name", ALWAYS)
def test_a_cache_forgets_when_a_control_begins_and_still_counts(
    film: Callable[..., Tensor], told: Callable[[], list[str]], name: str
) -> None:
    film(always(name), Adding())
    assert told() == [f"chunk {number}: 2 of 4 passes skipped" for number in (1, 2)]


@pytest.mark.parametrize("name", ALWAYS)
def test_a_skipped_pass_adds_what_was_added_before(name: str) -> None:
    found, computed = run_steps(always(name), INPUTS[:2])
    assert computed == [True, False]
    first = Stack().blocks()[0] if name == "first_block" else lambda x: x
    expected = first(INPUTS[1]) + (found[0] - first(INPUTS[0]))
    torch.testing.assert_close(found[1], expected)


@pytest.mark.parametrize("name", ALWAYS)
def test_first_and_last_steps_are_computed(name: str) -> None:
    _, computed = run_steps(always(name, first_steps=4, last_steps=3), INPUTS)
    assert computed == [step < 4 or step >= STEPS - 3 for step in range(STEPS)]


def make_setup(denoiser: Wan, steps: int) -> Setup:
    return Setup(denoiser, None, {"steps": steps}, (32, 32), True, ("cache",))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ALWAYS)
def test_to_skip_nothing_is_refused(tiny_base: WanBase, name: str) -> None:
    denoiser = cast(Wan, tiny_base.empty_denoiser())
    cache = always(name, first_steps=6, last_steps=2)
    assert cache.problems(make_setup(denoiser, 9)) == []
    assert cache.problems(make_setup(denoiser, 8)) == [
        "first_steps, last_steps: 6 first and 2 last of 8 steps leave none to skip"
    ]


def test_ratios_are_measured_in_any_number_of_steps(tiny_base: WanBase) -> None:
    denoiser = cast(Wan, tiny_base.empty_denoiser())
    assert make("mag_cache").problems(make_setup(denoiser, 4)) == []


def test_public_coefficients_are_for_the_public_network(tiny_base: WanBase) -> None:
    setup = make_setup(cast(Wan, tiny_base.empty_denoiser()), 40)
    for coefficients in ("480p", "720p"):
        (problem,) = make("tea_cache", coefficients=coefficients).problems(setup)
        assert problem == (
            "coefficients: the public ones are for a network of 40 blocks; this one has 2; "
            "give a list"
        )
