"""Any two shipped plugins make a video together, or are refused by name with a reason."""

from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kit import plugins
from kit.draws import draw_normal
from kit.models.base import Encoders
from kit.models.wan import Wan
from kit.models.wan_base import WanBase
from kit.sampling.frames import StillSource, to_pictures
from kit.sampling.hooks import Hooks
from kit.sampling.pipeline import TalkSampler, no_progress
from kit.sampling.plugin import ONE, Plugin, Setup, hooks_of
from kit.sampling.scene import Scene
from tests.plugin_options import give_options

SIZE = (32, 48)
SAMPLING: dict[str, Any] = {
    "steps": 2,
    "num_frames": 5,
    "context_frames": 1,
    "color_correction": 0.0,
}
DEFAULTS = {"shift": 7.0, "text_scale": 5.0, "audio_scale": 4.0, "guidance": "plain"}
PAIRS = list(permutations(plugins.available(), 2))

Film = Callable[[dict[str, Plugin]], Tensor]


class Quick:
    """Encoders whose latents are averages of pixels; all else is what others gave the first time.

    The hundred pairs take a fifth of the time with them.
    """

    def __init__(self, encoders: Encoders) -> None:
        self._encoders = encoders
        self._given: dict[Any, Any] = {}

    def encode_video(self, pixels: Tensor) -> Tensor:
        first = pixels[:, :, :1].expand(-1, -1, 3, -1, -1)
        averages = F.avg_pool3d(torch.cat([first, pixels], dim=2), (4, 8, 8))
        return averages.repeat(1, 6, 1, 1, 1)[:, :16]

    def decode_video(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents[:, :3], scale_factor=(4, 8, 8))[:, :, 3:].clamp(-1, 1)

    def encode_text(self, texts: Sequence[str]) -> Any:
        return self._once(self._encoders.encode_text, tuple(texts), texts)

    def encode_image(self, pixels: Tensor) -> Any:
        return self._once(self._encoders.encode_image, pixels.shape, pixels)

    def encode_speech(self, waveform: Tensor) -> Any:
        return self._once(self._encoders.encode_speech, waveform.shape, waveform)

    def release(self, *parts: str) -> None:
        pass

    def _once(self, encode: Callable[[Any], Any], key: Any, given: Any) -> Any:
        if key not in self._given:
            self._given[key] = encode(given)
        return self._given[key]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def film(tiny_denoiser: Callable[[], Wan], tiny_encoders: Encoders) -> Film:
    """Make videos of two chunks."""
    denoiser, encoders = tiny_denoiser(), Quick(tiny_encoders)
    (portrait,) = to_pictures(draw_normal((1, 3, *SIZE), "portrait").tanh())
    scene = Scene(
        "a person speaks",
        0.1 * draw_normal((1, 640 * 8), "speech"),
        StillSource(portrait, SIZE),
        torch.ones(1, 4, 6),
    )

    def film(named: dict[str, Plugin]) -> Tensor:
        sampler = TalkSampler(Hooks(named), **SAMPLING)
        made = sampler.sample(denoiser, encoders, scene, 0, no_progress)
        return torch.cat([pixels for pixels, _ in made])

    return film


@pytest.fixture(scope="module")
def setup(tiny_base: WanBase) -> Callable[..., Setup]:
    """Tell plugins of the tiny base."""
    empty = tiny_base.empty_denoiser()

    def setup(*names: str) -> Setup:
        return Setup(empty, tiny_base.geometry, {**DEFAULTS, **SAMPLING}, SIZE, True, names)

    return setup


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_two_plugins_work_together_or_are_refused_by_name(
    names: tuple[str, str], folder: Path, film: Film, setup: Callable[..., Setup]
) -> None:
    named = {name: plugins.load(name)(**give_options(name, folder)) for name in names}
    problems = Hooks(named).problems(setup(*names))
    both = [hooks_of(plugin) for plugin in named.values()]
    exclusive = [hook for hook in ONE if all(hook in hooks for hooks in both)]
    if not problems:
        assert exclusive == []
        video = film(named)
        assert video.shape == (8, 3, *SIZE)
        assert video.isfinite().all()
    for problem in problems:
        assert all(name in problem for name in names), problem


def test_each_plugin_alone_is_taken(folder: Path, film: Film, setup: Callable[..., Setup]) -> None:
    """Else pairs would be refused for another reason than each other."""
    for name in plugins.available():
        plugin = plugins.load(name)(**give_options(name, folder))
        assert Hooks({name: plugin}).problems(setup(name)) == []
