"""SDEdit: where a chunk starts, which levels it visits, and what a mask holds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kit import plugins
from kit.data.media import VideoWriter
from kit.flow import add_noise
from kit.models.base import Encoders, Geometry
from kit.models.wan import Wan
from kit.models.wan_base import WanBase
from kit.sampling.frames import VideoSource
from kit.sampling.hooks import Hooks
from kit.sampling.pipeline import TalkSampler, no_progress
from kit.sampling.plugin import At, Plugin, Setup
from kit.sampling.scene import Scene
from kit.solvers import sigma_schedule
from tests.conftest import draw_pictures
from tests.test_sampler import make_scene

MakeWan = Callable[[], Wan]
Film = Callable[..., Tensor]
STEPS = 4
SDEdit: Any = plugins.load("sdedit")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of twenty frames."""
    file = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with VideoWriter(file, fps=25, height=64, width=64) as writer:
        writer.write(draw_pictures(3, 20))
    return file


@pytest.fixture(scope="module")
def film(tiny_denoiser: MakeWan, tiny_encoders: Encoders) -> Film:
    """Make a video of twelve frames in two chunks."""
    denoiser = tiny_denoiser()

    def make(*named: Plugin, scene: Scene | None = None, **options: Any) -> Tensor:
        hooks = Hooks({str(number): plugin for number, plugin in enumerate(named)})
        sizes = {"steps": STEPS, "num_frames": 9, "context_frames": 5}
        sampler = TalkSampler(hooks, **{**sizes, **options})
        scene = scene or make_scene(12)
        made = sampler.sample(denoiser, tiny_encoders, scene, 0, no_progress)
        return torch.cat([pixels for pixels, _ in made])

    return make


class Watching(Plugin):
    """Notes what each chunk begins with, and what comes out of each step."""

    def __init__(self) -> None:
        self.noise_of: dict[int, Tensor] = {}
        self.seen: dict[tuple[int, float], Tensor] = {}

    def noise(self, noise: Tensor, at: At) -> Tensor:
        self.noise_of[at.chunk.index] = noise
        return noise

    def predict(self, ask: Any, noisy: Tensor, sigma: Tensor, conditions: Any, at: At) -> Tensor:
        self.seen[at.chunk.index, at.sigma] = noisy[:1]
        velocity: Tensor = ask(noisy, sigma, conditions)
        return velocity


def write_mask(folder: Path) -> Path:
    """White on the right half, black on the left one."""
    mask = np.zeros((40, 36), np.uint8)
    mask[:, 18:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder / "mask.png"


def test_a_level_of_one_keeps_nothing(film: Film, clip: Path) -> None:
    assert torch.equal(film(SDEdit(sigma=1.0, video=str(clip))), film())


def test_the_start_is_the_source_of_that_time_with_noise(
    film: Film, clip: Path, tiny_encoders: Encoders
) -> None:
    watching = Watching()
    film(SDEdit(sigma=0.9, video=str(clip)), watching)
    source = VideoSource(clip, (32, 32), 25)
    frames = torch.stack([source.frame(index) for index in range(20)], dim=1)
    for number, start in ((0, 0), (1, 4)):
        latents = tiny_encoders.encode_video(frames[None, :, start : start + 9])
        noise, level = watching.noise_of[number], torch.tensor([0.9])
        found = watching.seen[number, float(level)]
        expected = add_noise(latents, noise, level)
        context = 1 + number  # the clean first frame, and five of the chunk before
        assert torch.equal(found[:, :, context:], expected[:, :, context:])
    assert not torch.equal(watching.noise_of[0], watching.noise_of[1])


def test_the_own_source_is_what_is_started_from(film: Film, clip: Path) -> None:
    own = replace(make_scene(12), source=VideoSource(clip, (32, 32), 25))
    again = replace(own, source=VideoSource(clip, (32, 32), 25))
    assert torch.equal(
        film(SDEdit(sigma=0.8), scene=own), film(SDEdit(sigma=0.8, video=str(clip)), scene=again)
    )
    assert not torch.allclose(film(SDEdit(sigma=0.8)), film(), atol=0.01)


def test_less_noise_leaves_more_of_the_source(film: Film, clip: Path) -> None:
    source = VideoSource(clip, (32, 32), 25)
    frames = torch.stack([source.frame(index) for index in range(12)])

    def distance(sigma: float) -> float:
        made = film(SDEdit(sigma=sigma, video=str(clip)), color_correction=0.0)
        return float((made - frames).square().mean())

    assert distance(0.05) < distance(0.5) < distance(1.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sigma": 1.0}, [1.0, 0.957, 0.847, 0.011, 0.0]),
        ({"sigma": 0.95}, [0.95, 0.847, 0.011, 0.0]),
        ({"sigma": 0.011}, [0.011, 0.0]),
        ({"sigma": 0.5, "mask": "mask.png"}, [1.0, 0.957, 0.847, 0.5, 0.011, 0.0]),
        ({"sigma": 0.5, "mask": "x", "mask_sigma": 0.9}, [0.9, 0.847, 0.5, 0.011, 0.0]),
    ],
)
def test_levels_begin_at_the_start_itself(options: Any, expected: list[float]) -> None:
    distilled = torch.tensor([1.0, 0.957, 0.847, 0.011, 0.0])
    assert torch.equal(SDEdit(**options).sigmas(distilled), torch.tensor(expected))


def test_levels_at_a_level_of_the_steps_are_the_same() -> None:
    levels = sigma_schedule(40, 7.0)
    for number in (0, 1, 17, 39):
        found = SDEdit(sigma=levels[number].item()).sigmas(levels)
        assert torch.equal(found, levels[number:])


def test_black_is_held_down_to_its_level_and_white_is_free(
    film: Film, clip: Path, tmp_path: Path, tiny_encoders: Encoders
) -> None:
    watching, sigma = Watching(), 0.7
    mask = str(write_mask(tmp_path))
    film(SDEdit(sigma=sigma, video=str(clip), mask=mask), watching)
    source = VideoSource(clip, (32, 32), 25)
    frames = torch.stack([source.frame(index) for index in range(9)], dim=1)
    latents, noise = tiny_encoders.encode_video(frames[None]), watching.noise_of[0]
    levels = [level for chunk, level in watching.seen if chunk == 0]
    assert torch.tensor(sigma).item() in levels
    for level in levels:
        expected = add_noise(latents, noise, torch.tensor([level]))[:, :, 1:]
        seen = watching.seen[0, level][:, :, 1:]
        assert torch.equal(seen[..., :2], expected[..., :2]) == (level >= sigma - 1e-6)
        assert torch.equal(seen[..., 2:], expected[..., 2:]) == (level == 1)


def test_what_cannot_work_is_refused(tiny_base: WanBase, tmp_path: Path) -> None:
    sampling = {"steps": 4, "shift": 7.0}
    setup = Setup(tiny_base.empty_denoiser(), Geometry(), sampling, (32, 32), False, ("sdedit",))
    (line,) = SDEdit(sigma=0.9).problems(setup)
    assert line.startswith("video: missing")
    setup = replace(setup, has_reference=True)
    assert SDEdit(sigma=0.9, mask=str(write_mask(tmp_path))).problems(setup) == []
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    lines = SDEdit(sigma=0.005, mask=str(broken), mask_sigma=0.004).problems(setup)
    assert "sigma: 0.005 is below the last level of the steps, 0.00696" in lines
    assert "mask_sigma: 0.004 is below sigma: 0.005" in lines
    assert any(line.startswith("mask: ") and "cannot be read" in line for line in lines)
