"""`kit plugins check`: what any plugin must keep to, tried on a tiny base with drawn weights."""

import inspect
import random
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kit import plugins, registry
from kit.batch import SAMPLE_RATE, Conditions
from kit.draws import draw_normal
from kit.errors import InputError
from kit.models import BASES
from kit.models.base import Base, Denoiser, Encoders
from kit.models.inside import UNTOUCHED, Inside
from kit.recipe import Recipe, Schema, Section, read
from kit.run.plugin_list import explained
from kit.run.plugins import build_sampler
from kit.run.recipes import PLUGINS
from kit.run.scenes import one_speaker
from kit.sampling import SAMPLERS
from kit.sampling.chunks import Progress
from kit.sampling.frames import StillSource, to_pictures
from kit.sampling.pipeline import Predict, TalkSampler, no_progress
from kit.sampling.plugin import Plugin, Setup, hooks_of

SCHEMA = Schema(
    title="plugins check",
    fields={},
    sections={"base": Section(BASES), "sampling": Section(SAMPLERS, default="talk")},
    stacks=PLUGINS,
)
# Ten steps, so that a gate that opens behind the first step or closes early has a step in it.
SETTINGS = """\
base: {type: wan, path: "shipped:data/tiny_base", random_weights: 0, dtype: float32,
       text_length: 64}
sampling: {steps: 10, num_frames: 9, context_frames: 5, color_correction: 0}
"""
HINT = "if only this base is in the way, of 2 blocks 48 wide, give options that suit it: "
CHANGES_NOTHING = "Changes nothing"
"""How the docstring of a plugin begins a line that says why videos stay the same with it."""

SIZE = (32, 48)
LOOK_UP = """
import importlib, operator, sys
operator.attrgetter(sys.argv[2])(importlib.import_module(sys.argv[1]))
"""
ONE_CHUNK, TWO_CHUNKS, THREE_CHUNKS = 9, 12, 17
"""Frames of a video with so many chunks."""

Made = list[tuple[Tensor, Progress]]
"""What a sampler yields: frames [T, 3, height, width], and how far the video is."""


@dataclass(frozen=True)
class Outcome:
    """What came of one check.

    Attributes:
        check: what was tried.
        problems: what is wrong, one line each; () if it passed.
    """

    check: str
    problems: tuple[str, ...] = ()


class Bench:
    """A plugin on the tiny base; its instances are new unless one is handed in.

    Args:
        recipe: names the base, the sampler and the plugin.
        kind: the plugin's class.
    """

    def __init__(self, recipe: Recipe, kind: type[Plugin]) -> None:
        self.kind = kind
        self._recipe = recipe
        self._base: Base = recipe.build("base")
        self._problems(has_reference=False)  # which it may refuse, but must be able to answer
        problems = self._problems(has_reference=True)
        if problems:
            (name,) = recipe.values["plugins"]
            raise InputError("\n".join([*problems, f"{HINT}{name}.option=value"]))
        self._denoiser: Denoiser = self._base.load_denoiser(torch.device("cpu")).eval()
        self._encoders: Encoders = self._base.load_encoders(torch.device("cpu"))
        self.without_before = self.without()
        self.called = set[str]()

    @cached_property
    def video(self) -> Made:
        """The video that others are compared with: of two chunks, by a new plugin."""
        sampler = self.sampler()
        made = self.film(sampler)
        self.called = {hook for _, hook in sampler.hooks.called}
        return made

    def sampler(self) -> TalkSampler:
        """Build the sampler with a new instance of the plugin."""
        return build_sampler(self._recipe)

    def without(self) -> Tensor:
        """Make the video without the plugin. [T, 3, height, width]"""
        return frames(self.film(self._recipe.build("sampling")))

    def film(self, sampler: TalkSampler, num_frames: int = TWO_CHUNKS, **options: Any) -> Made:
        """Make a video; options as for `chunks`."""
        return list(self.chunks(sampler, num_frames, **options))

    def chunks(
        self,
        sampler: TalkSampler,
        num_frames: int = TWO_CHUNKS,
        *,
        denoiser: Predict | None = None,
        progress: Progress | None = None,
        seed: int = 0,
    ) -> Iterator[tuple[Tensor, Progress]]:
        """Make a video of a drawn portrait and drawn speech, chunk by chunk."""
        (picture,) = to_pictures(draw_normal((1, 3, *SIZE), "portrait").tanh())
        samples = num_frames * SAMPLE_RATE // self._base.geometry.fps
        track = 0.1 * draw_normal((samples,), "speech")
        source = StillSource(picture, SIZE)
        scene = one_speaker("a person speaks", track, source, SIZE, self._base.geometry)
        predict = self._denoiser if denoiser is None else denoiser
        return sampler.sample(predict, self._encoders, scene, seed, no_progress, progress)

    def as_in_training(
        self, noisy: Tensor, sigma: Tensor, conditions: Conditions, inside: Inside = UNTOUCHED
    ) -> Tensor:
        """Ask the denoiser as previews do, which hand out a function and no network."""
        velocity: Tensor = self._denoiser(noisy, sigma, conditions, inside)
        return velocity

    def _problems(self, *, has_reference: bool) -> list[str]:
        """Ask the plugin what stands against the tiny base."""
        hooks = self.sampler().hooks
        setup = Setup(
            denoiser=self._base.empty_denoiser(),
            geometry=self._base.geometry,
            sampling=self._recipe.values["sampling"],
            size=SIZE,
            has_reference=has_reference,
            plugins=tuple(hooks.plugins),
        )
        return hooks.problems(setup)


Check = Callable[[Bench], Iterator[str]]
"""Yields what is wrong, in words."""


def check_plugin(name: str, words: Sequence[str], report: Callable[[str], None]) -> None:
    """Try a plugin, and report what came of each check.

    Args:
        name: of the plugin.
        words: `NAME.option=value` for options, `sampling.key=value` for the sampler.
        report: told the outcomes.

    Raises:
        InputError: there is no such plugin, it cannot be loaded, or a check failed.
    """
    failed, told = 0, set[tuple[str, ...]]()
    for outcome in examine(name, words):
        failed += bool(outcome.problems)
        report(f"{'FAILED' if outcome.problems else 'passed'}  {outcome.check}")
        for problem in ("as above",) if outcome.problems in told else outcome.problems:
            report(f"        {problem}")
        if outcome.problems:
            told.add(outcome.problems)
    if failed:
        checks = "check" if failed == 1 else "checks"
        raise InputError(f"plugin '{name}': {failed} {checks} failed")


def examine(
    name: str, words: Sequence[str], checks: Mapping[str, Check] | None = None
) -> Iterator[Outcome]:
    """Run the checks; those on the bench only if the plugin can be built for it.

    Args:
        name: of the plugin.
        words: as for `check_plugin`.
        checks: those on the bench; all if absent.

    Raises:
        InputError: there is no such plugin, or it cannot be loaded.
    """
    kind, origin = plugins.load(name), plugins.available()[name].origin
    yield Outcome(f"loads, with the hooks {', '.join(hooks_of(kind)) or '(none)'}")
    unexplained = Outcome("options have types and are explained", tuple(option_problems(kind)))
    yield unexplained
    if unexplained.problems:
        return
    try:
        bench = Bench(_recipe(name, words, kind), kind)
    except Exception as error:
        yield Outcome("can be built, and takes the tiny base", _told(error, origin))
        return
    yield Outcome("can be built, and takes the tiny base")
    for check, problems_of in (CHECKS if checks is None else checks).items():
        try:
            yield Outcome(check, tuple(problems_of(bench)))
        except Exception as error:
            yield Outcome(check, _told(error, origin))


def option_problems(kind: type[Plugin]) -> Iterator[str]:
    """Tell which options a recipe could not set, or its writer not understand."""
    meanings = explained(kind.__doc__ or "")
    options = inspect.signature(kind).parameters
    for name, option in options.items():
        if option.kind is not inspect.Parameter.KEYWORD_ONLY:
            yield f"'{option}' cannot be set by a recipe: options stand behind `*,`"
        elif option.annotation is inspect.Parameter.empty:
            yield f"'{name}' has no type"
        if not meanings.get(name):
            yield f"'{name}' is not explained in the section Args of the class's docstring"
    for name in meanings.keys() - options.keys():
        yield f"'{name}' is explained in the docstring, and is no option"


def makes_one_chunk(bench: Bench) -> Iterator[str]:
    """Try a video of one chunk."""
    yield from _unfit(bench.film(bench.sampler(), ONE_CHUNK), ONE_CHUNK)


def makes_two_chunks(bench: Bench) -> Iterator[str]:
    """Try a video whose second chunk goes on from the first."""
    yield from _unfit(bench.video, TWO_CHUNKS)


def changes_the_video(bench: Bench) -> Iterator[str]:
    """Compare with the video without it; a plugin that only looks on says so in its docstring."""
    says_not = re.search(rf"^\s*{CHANGES_NOTHING}", bench.kind.__doc__ or "", re.MULTILINE)
    is_same = torch.equal(frames(bench.video), bench.without_before)
    if is_same and not says_not:
        yield (
            "the video is, bit for bit, what it is without it: give options with which it does "
            "something; a plugin that only looks on says why in a line of its class's docstring "
            f"that begins with '{CHANGES_NOTHING}'"
        )
    elif says_not and not is_same:
        yield f"its docstring says '{CHANGES_NOTHING}', but the video is another one"


def has_each_hook_called(bench: Bench) -> Iterator[str]:
    """Ask which hooks the kit has called while it made the video."""
    _ = bench.video
    for hook in hooks_of(bench.kind):
        if hook not in bench.called and hook != "problems":
            yield f"`{hook}` was never called; was `is_active` ever True?"


def makes_branches_apart(bench: Bench) -> Iterator[str]:
    """Try a video for which the branches of guidance are asked one by one."""
    sampler = bench.sampler()
    sampler.together = False
    yield from _unfit(bench.film(sampler), TWO_CHUNKS)


def makes_previews(bench: Bench) -> Iterator[str]:
    """Try a video as training makes previews."""
    yield from _unfit(bench.film(bench.sampler(), denoiser=bench.as_in_training), TWO_CHUNKS)


def depends_on_the_seed_alone(bench: Bench) -> Iterator[str]:
    """Make the video again, with torch's own generator in another state."""
    expected = bench.video
    with torch.random.fork_rng():
        torch.manual_seed(1)
        before = _random_states()
        again = bench.film(bench.sampler())
        if _random_states() != before:
            yield "it draws from a global generator; take kit.draws"
    yield from _differing(again, expected)


def keeps_nothing_of_other_videos(bench: Bench) -> Iterator[str]:
    """Make the video with an instance that has left a longer one unfinished."""
    sampler = bench.sampler()
    next(bench.chunks(sampler, THREE_CHUNKS, seed=1))
    yield from _differing(bench.film(sampler), bench.video)


def goes_on_after_a_stop(bench: Bench) -> Iterator[str]:
    """Make the second chunk by a new instance, from what the first left."""
    (_, progress), second = bench.video
    yield from _differing(bench.film(bench.sampler(), progress=progress), [second])


def is_found_by_new_processes(bench: Bench) -> Iterator[str]:
    """Look the class up in another process, as one does that was sent an instance."""
    command = [sys.executable, "-c", LOOK_UP, bench.kind.__module__, bench.kind.__qualname__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        yield f"another process cannot import its class: {done.stderr.splitlines()[-1]}"


def leaves_the_base_alone(bench: Bench) -> Iterator[str]:
    """Make a video without the plugin, after one with it."""
    _ = bench.video
    if not torch.equal(bench.without(), bench.without_before):
        yield "a video without it is another one after it was used: what does it leave changed?"


CHECKS: Mapping[str, Check] = {
    "makes a video of one chunk": makes_one_chunk,
    "makes a video of two chunks": makes_two_chunks,
    "changes the video": changes_the_video,
    "has each of its hooks called": has_each_hook_called,
    "makes branches one by one": makes_branches_apart,
    "makes previews in training": makes_previews,
    "the same seed gives the same video": depends_on_the_seed_alone,
    "keeps nothing of other videos": keeps_nothing_of_other_videos,
    "a stopped video goes on and ends the same": goes_on_after_a_stop,
    "is found by new processes": is_found_by_new_processes,
    "leaves the base as it was": leaves_the_base_alone,
}


def frames(made: Made) -> Tensor:
    """Put the frames of a video together. [T, 3, height, width]"""
    return torch.cat([pixels for pixels, _ in made])


def _recipe(name: str, words: Sequence[str], kind: type[Plugin]) -> Recipe:
    for word in words:
        if word.partition("=")[0] in registry.options(kind):
            raise InputError(f"'{word}': an option of the plugin; write {name}.{word}")
    paths = [f"plugins.{word}" if word.startswith(f"{name}.") else word for word in words]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "check.yaml"
        file.write_text(SETTINGS)
        return read(file, [f"plugins.{name}={{}}", *paths], SCHEMA)


def _unfit(made: Made, num_frames: int) -> Iterator[str]:
    video = frames(made)
    if video.shape != (num_frames, 3, *SIZE):
        yield f"frames are {list(video.shape)}; should be {[num_frames, 3, *SIZE]}"
    if video.dtype != torch.float32:
        yield f"frames are {video.dtype}; should be torch.float32"
    if not video.isfinite().all():
        yield "frames have numbers that are not finite"


def _differing(made: Made, expected: Made) -> Iterator[str]:
    wrong = (frames(made) - frames(expected)).abs().amax((1, 2, 3))
    if wrong.any():
        first = int(wrong.nonzero()[0])
        yield f"frames differ by up to {wrong.max():.2g} (of -1 to 1), from number {first} on"


def _random_states() -> tuple[Any, ...]:
    state: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2]


def _told(error: Exception, origin: Path) -> tuple[str, ...]:
    """Say in a line what was raised, and where in the plugin."""
    if isinstance(error, InputError):
        return tuple(str(error).splitlines())
    home = origin.parent if origin.stem == "__init__" else origin
    calls = traceback.extract_tb(error.__traceback__)
    inside = [call for call in calls if Path(call.filename).is_relative_to(home)]
    where = f" ({inside[-1].filename}:{inside[-1].lineno})" if inside else ""
    what = str(error).partition("\n")[0]
    return (f"{type(error).__name__}: {what}{where}",)
