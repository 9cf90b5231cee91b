"""Uni3C in a sampling run: whose render the controller sees, when it is asked, and how often."""

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
)

from kit import plugins
from kit.data.buckets import fit
from kit.data.media import VideoWriter, iter_frames
from kit.draws import draw_normal
from kit.errors import InputError
from kit.flow import add_noise
from kit.models.base import Encoders, Geometry
from kit.models.wan import Wan
from kit.models.wan_base import WanBase
from kit.recipe import Schema, Stack, read
from kit.sampling.chunks import Chunk, Progress
from kit.sampling.frames import VideoSource, to_pixels
from kit.sampling.hooks import Hooks
from kit.sampling.pipeline import TalkSampler, no_progress
from kit.sampling.plugin import At, Plugin, Setup
from tests.conftest import draw_pictures
from tests.test_sampler import make_scene

controllers: Any = importlib.import_module("kit.plugins.uni3c.controller")
cameras: Any = importlib.import_module("kit.plugins.uni3c.cameras")
depths: Any = importlib.import_module("kit.plugins.uni3c.depth")
renders: Any = importlib.import_module("kit.plugins.uni3c.renders")
sampling: Any = importlib.import_module("kit.plugins.uni3c.sampling")
command: Any = importlib.import_module("kit.plugins.uni3c.__main__")
Uni3C: Any = plugins.load("uni3c")
SDEdit: Any = plugins.load("sdedit")

STEPS = 4
TINY = controllers.Sizes(
    in_channels=36,
    guide_channels=7,
    guide_dim=8,
    base_dim=48,
    time_dim=48,
    dim=16,
    ffn_dim=24,
    num_heads=2,
    num_layers=2,
)


class Spy:
    """Encoders that keep the clips of whole chunks that they were given."""

    def __init__(self, encoders: Encoders) -> None:
        self.encoders = encoders
        self.clips: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoders, name)

    def encode_video(self, pixels: Tensor) -> Tensor:
        # What follows a reference is grey.
        if pixels.shape[2] == 9 and pixels[:, :, 1:].any():
            self.clips.append(pixels[0])
        return self.encoders.encode_video(pixels)


class Film:
    """Makes videos of twelve frames in two chunks; tells what their renders were."""

    def __init__(self, denoiser: Wan, encoders: Encoders) -> None:
        self.denoiser, self.encoders = denoiser, encoders
        self.clips: list[Tensor] = []

    def __call__(
        self,
        *named: Plugin,
        progress: Progress | None = None,
        video: Path | None = None,
        **options: Any,
    ) -> Tensor:
        return torch.cat(
            [pixels for pixels, _ in self.made(*named, progress=progress, video=video, **options)]
        )

    def made(
        self,
        *named: Plugin,
        progress: Progress | None = None,
        video: Path | None = None,
        **options: Any,
    ) -> list[tuple[Tensor, Progress]]:
        hooks = Hooks({str(number): plugin for number, plugin in enumerate(named)})
        sizes = {"steps": STEPS, "num_frames": 9, "context_frames": 5}
        sampler, spy = TalkSampler(hooks, **{**sizes, **options}), Spy(self.encoders)
        scene = make_scene(12)
        if video is not None:
            scene = replace(scene, source=VideoSource(video, (32, 32), 25))
        encoders = cast(Encoders, spy)
        made = list(sampler.sample(self.denoiser, encoders, scene, 0, no_progress, progress))
        self.clips = spy.clips
        return made


@pytest.fixture(scope="module")
def film(tiny_denoiser: Callable[[], Wan], tiny_encoders: Encoders) -> Film:
    return Film(tiny_denoiser(), tiny_encoders)


@pytest.fixture(scope="module")
def plain(film: Film) -> Tensor:
    return film()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new controller, a drawn one, the depth of the portrait, and a video."""
    folder = tmp_path_factory.mktemp("uni3c")
    controller = controllers.Controller(TINY)
    save_file(controller.state_dict(), folder / "new.safetensors", {"num_heads": "2"})
    for seed, parameter in enumerate(controller.parameters()):
        parameter.data = 0.2 * draw_normal(tuple(parameter.shape), seed)
    save_file(controller.state_dict(), folder / "drawn.safetensors", {"num_heads": "2"})
    np.save(folder / "depth.npy", 3 + draw_normal((40, 36), "depth").abs().numpy())
    with VideoWriter(folder / "clip.mp4", fps=25, height=64, width=64) as writer:
        writer.write(draw_pictures(3, 20))
    return folder


@pytest.fixture(scope="module")
def make(folder: Path) -> Callable[..., Any]:
    """Make a plugin that orbits the portrait, as long as no other options are given."""

    def make(weights: str = "drawn", **options: Any) -> Any:
        orbit = {"camera": "orbit", "depth": str(folder / "depth.npy")}
        video = options.get("source") == "video"
        if "trajectory" in options:
            del orbit["camera"]
        return Uni3C(
            weights=str(folder / f"{weights}.safetensors"), **({} if video else orbit) | options
        )

    return make


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def frames_of(file: Path, count: int) -> Tensor:
    source = VideoSource(file, (32, 32), 25)
    return torch.stack([source.frame(index) for index in range(count)], dim=1)


def test_a_new_controller_and_no_strength_change_nothing(
    film: Film, plain: Tensor, make: Callable[..., Any]
) -> None:
    assert torch.equal(film(make("new", end=1.0)), plain)
    assert torch.equal(film(make(strength=0.0)), plain)
    assert torch.equal(film(make(start=0.9, end=0.95)), plain)


def test_a_controller_changes_the_video_as_told(
    film: Film, plain: Tensor, make: Callable[..., Any]
) -> None:
    videos = [
        plain,
        film(make()),
        film(make(strength=0.5)),
        film(make(end=1.0)),
        film(make(trajectory=cameras.Trajectory(distance=0.7))),
        film(make(mask_and_camera=False)),
        film(make(context="renoised")),
        film(make(source="video")),
    ]
    for number, video in enumerate(videos):
        assert video.isfinite().all()
        for other in videos[:number]:
            assert not torch.allclose(video, other, atol=1e-3)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("window", "steps"), [((0.0, 0.5, "step"), 2), ((1.0, 0.97, "sigma"), 1)])
def test_the_controller_is_asked_once_a_step_in_its_window(
    film: Film, make: Callable[..., Any], together: bool, window: Any, steps: int
) -> None:
    start, end, unit = window
    plugin = make(start=start, end=end, unit=unit)
    film(plugin, together=together)
    calls: Counter[str] = Counter()
    layers = plugin._controller.controlnet
    for name, layer in {"in": layers.proj_in, "block": layers.controlnet_blocks[1]}.items():
        layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    film(plugin, together=together)
    # In two chunks, and never once more for one of the three branches.
    assert calls == {"in": 2 * steps, "block": 2 * steps}


def test_branches_together_are_branches_one_by_one(film: Film, make: Callable[..., Any]) -> None:
    assert_near(film(make(), together=False), film(make()))


def test_a_video_goes_on_where_it_was_stopped(
    film: Film, make: Callable[..., Any], folder: Path
) -> None:
    both = [SDEdit(sigma=0.9, video=str(folder / "clip.mp4")), make()]
    (_, progress), (expected, _) = film.made(*both)
    again = [SDEdit(sigma=0.9, video=str(folder / "clip.mp4")), make()]
    assert torch.equal(film(*again, progress=progress), expected)
    assert torch.equal(film(*both, progress=progress), expected)


def test_a_video_is_rendered_by_the_windows_of_its_chunks(
    film: Film, make: Callable[..., Any], folder: Path
) -> None:
    film(make(source="video", video=str(folder / "clip.mp4")))
    frames = frames_of(folder / "clip.mp4", 13)
    assert len(film.clips) == 2
    assert torch.equal(film.clips[0], frames[:, :9])
    assert torch.equal(film.clips[1], frames[:, 4:13])


def test_the_runs_own_source_never_replaces_a_video(
    film: Film, make: Callable[..., Any], folder: Path
) -> None:
    other = folder / "other.mp4"
    with VideoWriter(other, fps=25, height=64, width=64) as writer:
        writer.write(draw_pictures(8, 6))
    film(make(source="video", video=str(other)), video=folder / "clip.mp4")
    given = frames_of(other, 13)
    assert torch.equal(film.clips[1], given[:, 4:13])
    # A video that ends holds its last picture.
    assert torch.equal(given[:, 5], given[:, 12])
    film(make(source="video"), video=folder / "clip.mp4")
    assert torch.equal(film.clips[1], frames_of(folder / "clip.mp4", 13)[:, 4:13])


def wall(scale: float = 1.0) -> Callable[[Tensor], Any]:
    """Give every picture the depth of a wall, in some unit."""
    return lambda image: depths.Depth(torch.full(image.shape[1:], scale), None)


def travel(route: Any, num_frames: int = 13, measure: Any = None) -> Any:
    picture = to_pixels(draw_pictures(1, 1)[0])
    return renders.TravellingCamera(
        picture, measure or wall(), route, num_frames, field_of_view=60.0
    )


def test_chunks_show_slices_of_one_course() -> None:
    camera = travel(cameras.PRESETS["free1"])
    whole = camera.show(Chunk(0, 0, 13, 0, 13))
    first, second = camera.show(Chunk(0, 0, 9, 0, 9)), camera.show(Chunk(1, 4, 9, 5, 4))
    assert torch.equal(first.pixels, whole.pixels[:, :9])
    assert torch.equal(second.pixels, whole.pixels[:, 4:])
    assert torch.equal(second.guide[:1], whole.guide[:1, 4:])
    assert whole.guide[0, 0].max() == 0
    assert second.guide[0, 0].max() == 1
    # Rays are told from the chunk's own first camera, as the controller saw them in training.
    w2c = camera.cameras.w2c[4:]
    expected = cameras.plucker(camera.cameras.intrinsics[0], w2c, 64, 64)
    assert torch.equal(second.guide[1:], expected)


def test_the_camera_stays_where_it_has_come() -> None:
    shown = travel(cameras.PRESETS["free1"], 5).show(Chunk(1, 4, 9, 5, 9))
    assert torch.equal(shown.pixels, shown.pixels[:, :1].expand(-1, 9, -1, -1))


def test_a_new_anchor_goes_on_along_the_course() -> None:
    """What the first picture's render shows, rendered anew, shows the same later."""
    units = iter([1.0, 7.0])
    camera = travel(
        cameras.Trajectory(distance=0.5), measure=lambda image: wall(next(units))(image)
    )
    chunk = Chunk(1, 4, 9, 5, 9)
    expected = camera.show(chunk).pixels
    found = camera.show(chunk, expected[:, 0])
    assert torch.equal(found.pixels[:, 0], expected[:, 0])
    assert found.guide[0, 0].max() == 0
    # Points that were drawn twice are blurred a little.
    coarse = [
        torch.nn.functional.avg_pool2d(some, 4)[..., 3:-3, 3:-3]
        for some in (expected, found.pixels, expected[:, :1])
    ]
    error, moved = (float((other - coarse[0]).square().mean()) for other in coarse[1:])
    assert error < 0.1 * moved


def test_depth_is_cut_as_its_portrait_is(tmp_path: Path) -> None:
    picture = np.zeros((50, 36, 3), np.uint8)
    picture[...] = (20 + 4 * np.arange(50))[:, None, None]
    np.save(tmp_path / "depth.npy", picture[..., 0].astype(np.float32))
    found = depths.load_depth(tmp_path / "depth.npy", (32, 32)).depth
    # The picture's pixels are mixtures of their neighbours, which are 4 apart.
    assert np.abs(found.numpy() - fit(picture, 32, 32)[..., 0]).max() <= 4


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Depth Anything as transformers saves it, with drawn weights."""
    folder = tmp_path_factory.mktemp("depth_anything")
    backbone = cast(Any, Dinov2Config)(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        out_features=["stage1", "stage2"],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=8,
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return str(folder)


def test_a_chunk_begins_anew_from_what_was_made(
    film: Film, make: Callable[..., Any], network: str
) -> None:
    (first, progress), (second, _) = film.made(make(depth=network, anchor="chunk"))
    made = first[4]  # the frame that the next chunk begins with
    assert torch.equal(film.clips[1][:, 0], made)
    assert torch.equal(film.clips[0][:, 0], make_scene(1).source.frame(0))
    resumed = film(make(depth=network, anchor="chunk"), progress=progress)
    assert torch.equal(resumed, second)
    (same, _), _ = film.made(make(depth=network))
    assert torch.equal(first, same)
    assert not torch.equal(film.clips[1][:, 0], made)


def test_clean_frames_can_be_shown_with_noise(make: Callable[..., Any]) -> None:
    noisy, noise = draw_normal((1, 20, 3, 4, 4), "noisy"), draw_normal((1, 16, 3, 4, 4), "noise")
    at = At(Chunk(1, 4, 9, 5, 4), 0, 4, 0.7, 0.5, shared={"noise": noise})
    assert make()._seen(noisy, at) is noisy
    seen = make(context="renoised")._seen(noisy, at)
    expected = noisy.clone()
    expected[:, :16, :2] = add_noise(noisy[:, :16, :2], noise[:, :, :2], torch.tensor([0.7]))
    assert torch.equal(seen, expected)
    first = replace(at, chunk=Chunk(0, 0, 9, 0, 9))
    assert torch.equal(make(context="renoised")._seen(noisy, first)[:, :, 1:], noisy[:, :, 1:])


@pytest.fixture(scope="module")
def setup(tiny_base: WanBase) -> Setup:
    sampler = {"steps": STEPS, "shift": 7.0}
    return Setup(tiny_base.empty_denoiser(), Geometry(), sampler, (32, 32), True, ("uni3c",))


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ({}, None),
        ({"source": "video"}, None),
        ({"camera": None}, "camera, trajectory: give one of them, and only one"),
        ({"trajectory": cameras.Trajectory()}, None),
        (
            {"camera": "orbit", "trajectory": cameras.Trajectory()},
            "camera, trajectory: give one of them, and only one",
        ),
        ({"depth": None}, "depth: missing"),
        ({"video": "clip.mp4"}, "video: source: trajectory has no use for it"),
        ({"source": "video", "camera": "orbit"}, "camera: source: video has no use for it"),
        ({"source": "video", "anchor": "chunk"}, "anchor: chunk is for source: trajectory"),
        ({"anchor": "chunk"}, "anchor: chunk needs a network that tells the depth"),
        ({"depth": "no/such/file.npy"}, "there is no folder 'no/such/file.npy'"),
        ({"start": 0.6}, "start: 0.6 is not below end: 0.5"),
        ({"unit": "sigma"}, "start: 0.0 is not above end: 0.5"),
    ],
)
def test_options_that_do_not_go_together(
    make: Callable[..., Any], setup: Setup, options: dict[str, Any], finding: str | None
) -> None:
    found = make(**options).problems(setup)
    assert (found == []) == (finding is None)
    assert finding is None or finding in "\n".join(found)


def test_runs_and_weights_that_do_not_fit(
    make: Callable[..., Any], setup: Setup, folder: Path
) -> None:
    (line,) = make().problems(replace(setup, has_reference=False))
    assert line.startswith("there is no picture")
    sizes = replace(TINY, base_dim=40, time_dim=56, num_layers=3, in_channels=32)
    controller = controllers.Controller(sizes)
    save_file(controller.state_dict(), folder / "other.safetensors", {"num_heads": "2"})
    (line,) = make("other").problems(setup)
    for words in (
        "width 40, not 48",
        "time embedding 56, not 48",
        "input 32, not 36",
        "blocks 3, not 2",
    ):
        assert words in line
    save_file({"lora": torch.zeros(1)}, folder / "lora.safetensors")
    (line,) = make("lora").problems(setup)
    assert "is no controller of Uni3C" in line


def test_recipes_name_a_course_or_tell_one(folder: Path) -> None:
    stack = Stack(lambda: ("uni3c",), lambda name: Uni3C)
    schema = Schema("sample", {}, {}, {"plugins": stack})

    def build(option: str) -> Any:
        recipe, weights = folder / "recipe.yaml", folder / "drawn.safetensors"
        recipe.write_text(f"plugins: {{uni3c: {{weights: {weights}, {option}}}}}\n")
        return read(recipe, [], schema).build_stack("plugins")["uni3c"]

    assert set(cameras.PRESETS) == set(sampling.Preset.__args__)
    assert build("camera: orbit").camera == "orbit"
    told = build("trajectory: {azimuth: -30, distance: 0.8}").trajectory
    assert told == cameras.Trajectory(azimuth=-30, distance=0.8)
    for option, words in {
        "camera: orbitt": "camera: unknown 'orbitt'; did you mean 'orbit'?",
        "trajectory: {azimut: 3}": "trajectory.azimut: unknown 'azimut'; did you mean 'azimuth'?",
        "trajectory: {distance: 0}": "trajectory.distance: 0 should be greater than 0",
    }.items():
        with pytest.raises(InputError) as caught:
            build(option)
        assert words in str(caught.value)


def test_a_preview_shows_the_render_and_its_holes(folder: Path) -> None:
    Image.fromarray(draw_pictures(1, 1)[0]).save(folder / "portrait.png")
    out, depth = folder / "render.mp4", str(folder / "depth.npy")
    words = [
        str(folder / "portrait.png"),
        "--depth",
        depth,
        "--out",
        str(out),
        "--buckets",
        "48x64",
    ]
    command.main([*words, "--camera", "azimuth=-40", "--frames", "27"])
    frames = np.stack(list(iter_frames(out, 25)))
    assert frames.shape == (27, 48, 128, 3)
    assert frames[0, :, 64:].max() < 20
    assert frames[-1, :, 64:].max() > 230
    for camera, finding in {"orbi": "did you mean 'orbit'", "azimut=3": "azimut"}.items():
        with pytest.raises(InputError, match=finding):
            command.main([*words, "--camera", camera])
