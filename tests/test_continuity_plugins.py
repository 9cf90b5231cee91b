"""Continuity between chunks as plugins: colours and noise."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kit import plugins
from kit.draws import draw_normal
from kit.models.base import Encoders
from kit.models.wan import Wan
from kit.models.wan_base import WanBase
from kit.registry import options
from kit.sampling.chunks import plan_chunks
from kit.sampling.color import match_color, rgb_to_lab
from kit.sampling.hooks import Hooks
from kit.sampling.pipeline import TalkSampler, no_progress
from kit.sampling.plugin import At, Plugin, Setup
from tests.test_sampler import make_sampler, make_scene

PLUGINS: list[Any] = [plugins.load(name) for name in ("color_match", "free_noise")]
color_match, free_noise = PLUGINS
Film = Callable[..., list[Tensor]]


@pytest.fixture(scope="module")
def film(tiny_denoiser: Callable[[], Wan], tiny_encoders: Encoders) -> Film:
    """Makes a video of 13 frames in two chunks of 9 and 4; or goes on with the second."""
    denoiser = tiny_denoiser()

    def make(*used: Plugin, goes_on: bool = False, **changed: Any) -> list[Tensor]:
        hooks = Hooks({str(number): plugin for number, plugin in enumerate(used)})
        sampler = make_sampler(hooks=hooks, **{"steps": 1, "color_correction": 0.0, **changed})
        given = (denoiser, tiny_encoders, make_scene(13), 5, no_progress)
        made = sampler.sample(*given)
        if goes_on:
            _, progress = next(made)
            made = sampler.sample(*given, progress)
        return [pixels for pixels, _ in made]

    return make


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


def distance(frames: Tensor, picture: Tensor, space: str) -> Tensor:
    """Measure how far the mean colour of frames [T, 3, height, width] is from a picture's. [T]"""
    found, wanted = (
        (rgb_to_lab(rgb) if space == "lab" else rgb).mean((-2, -1))  # [3, T]
        for rgb in (pixels.transpose(0, 1) / 2 + 0.5 for pixels in (frames, picture[None]))
    )
    apart: Tensor = (found - wanted).norm(dim=0)
    return apart


PORTRAIT = make_scene(9).source.frame(0)


@pytest.mark.parametrize("plugin", [color_match, free_noise])
def test_a_stopped_video_goes_on_the_same(film: Film, plugin: type[Plugin]) -> None:
    whole, rest = film(plugin()), film(plugin(), goes_on=True)
    assert same(rest, whole[1:])


# Colours


def test_the_samplers_colour_correction_as_a_plugin(film: Film) -> None:
    assert same(film(color_match()), film(color_correction=1.0))
    assert same(film(color_match(strength=0.4)), film(color_correction=0.4))


@pytest.mark.parametrize("space", ["lab", "rgb"])
def test_all_frames_get_the_colours_of_the_first_picture(film: Film, space: str) -> None:
    for before, after in zip(film(), film(color_match(space=space)), strict=True):
        # Colours beyond white and black are cut, so that some distance is left.
        apart = distance(after, PORTRAIT, space) / distance(before, PORTRAIT, space)
        assert apart.max() < 0.2


def test_in_rgb_mean_and_spread_become_those_of_the_picture() -> None:
    frames, picture = 0.1 * draw_normal((3, 2, 8, 8), "frames"), 0.2 * draw_normal((3, 8, 8), 1)
    for frame in match_color(frames, picture, 1.0, "rgb").unbind(1):
        torch.testing.assert_close(frame.mean((1, 2)), picture.mean((1, 2)))
        torch.testing.assert_close(frame.std((1, 2)), picture.std((1, 2)))


def test_later_chunks_get_the_colours_of_the_one_before(film: Film) -> None:
    plain, matched = film(), film(color_match(reference="previous"))
    assert torch.equal(matched[0], plain[0])
    last = plain[0][-1]
    assert (distance(matched[1], last, "lab") / distance(plain[1], last, "lab")).max() < 0.3


@pytest.mark.parametrize("reference", ["first", "previous"])
def test_strength_zero_changes_no_bit(film: Film, reference: str) -> None:
    assert same(film(color_match(reference=reference, strength=0)), film())


@pytest.mark.parametrize(
    ("reference", "has_reference", "correction", "message"),
    [
        ("first", True, 1.0, "sampling.color_correction: 1.0 would move colours a second time"),
        ("previous", True, 0.5, "sampling.color_correction: 0.5 would move colours a second time"),
        ("first", False, 1.0, "reference: there is no first picture; take previous"),
        ("previous", False, 1.0, None),
        ("first", True, 0.0, None),
    ],
)
def test_colours_are_matched_once_and_to_something(
    tiny_base: WanBase, reference: str, has_reference: bool, correction: float, message: str | None
) -> None:
    sampling = {name: option.default for name, option in options(TalkSampler).items()}
    sampling["color_correction"] = correction
    setup = Setup(
        tiny_base.empty_denoiser(), tiny_base.geometry, sampling, (32, 32), has_reference, ()
    )
    problems = color_match(reference=reference).problems(setup)
    assert [problem.split(";")[0] for problem in problems] == (
        [] if message is None else [message.split(";")[0]]
    )


# Noise

FRAMES, SHARED = 9, 2
"""Latent frames in a chunk of 33 frames, and those of the 5 that two chunks share."""


def noises(plugin: Plugin, seed: int = 3, count: int = 5) -> list[Tensor]:
    run: Any = SimpleNamespace(seed=seed)
    plugin.open(run)
    chunks = plan_chunks(33 + 28 * (count - 1), 33, 5)
    return [
        plugin.noise(
            draw_normal((1, 4, FRAMES, 2, 2), seed, chunk.index, "noise"), At(chunk, 0, 1, 1.0, 0.0)
        )
        for chunk in chunks
    ]


def order(noise: Tensor, first: Tensor) -> list[int]:
    """Tell which frame of the first chunk each frame is."""
    is_same = (noise[:, :, :, None] == first[:, :, None]).all(dim=-1).all(dim=-1).all(dim=1)[0]
    assert (is_same.sum(1) == 1).all()
    return is_same.int().argmax(1).tolist()


def test_all_chunks_have_the_first_ones_noise() -> None:
    first, *later = noises(free_noise())
    assert torch.equal(first, draw_normal((1, 4, FRAMES, 2, 2), 3, 0, "noise"))
    orders = [order(noise, first) for noise in later]
    assert all(sorted(each) == list(range(FRAMES)) for each in orders)
    assert len({tuple(each) for each in orders}) == len(orders)


def test_frames_that_chunks_share_have_the_same_noise() -> None:
    made = noises(free_noise(shuffle=7))
    for before, after in zip(made, made[1:], strict=False):
        assert torch.equal(before[:, :, -SHARED:], after[:, :, :SHARED])


@pytest.mark.parametrize("shuffle", [1, 2, 4])
def test_only_neighbours_change_places(shuffle: int) -> None:
    first, second, *_ = noises(free_noise(shuffle=shuffle))
    places = order(second, first)[SHARED:]
    groups = [sorted(places[n : n + shuffle]) for n in range(0, len(places), shuffle)]
    assert sum(groups, []) == list(range(FRAMES - SHARED))
    assert (places == sorted(places)) == (shuffle == 1)


def test_seeds_decide_the_order() -> None:
    (first, *_, last), (again, *_, last_again) = noises(free_noise()), noises(free_noise())
    assert torch.equal(last, last_again)
    (other, *_, other_last) = noises(free_noise(), seed=4)
    assert order(last, first) != order(other_last, other)
    assert torch.equal(first, again)


class Noting(Plugin):
    """Keeps the noise of each chunk."""

    def __init__(self) -> None:
        self._noise: list[Tensor] = []

    def noise(self, noise: Tensor, at: At) -> Tensor:
        self._noise.append(noise)
        return noise


def test_it_is_the_samplers_own_noise(film: Film) -> None:
    plain, noting = Noting(), Noting()
    own, made = film(plain), film(free_noise(shuffle=1), noting)
    assert torch.equal(made[0], own[0])
    assert not torch.allclose(made[1], own[1], atol=1e-3)
    # Of three latent frames two are shared, so that one is new.
    assert torch.equal(noting._noise[1], plain._noise[0][:, :, [1, 2, 0]])
