"""Training a controller: it begins by saying nothing, learns, goes on bit for bit, is read back."""

import importlib
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kit import plugins
from kit.errors import InputError
from kit.models.wan import Wan
from kit.models.wan_base import WanBase
from kit.run.pretrain import pretrain
from kit.training.curves import read_curves

examples = importlib.import_module("kit.plugins.uni3c.examples")
training = importlib.import_module("kit.plugins.uni3c.training")
weights = importlib.import_module("kit.plugins.uni3c.weights")

ROOT = Path(__file__).parents[1]
STUDIO = ROOT / "data" / "studio_base"
SIZES = {"dim": 16, "ffn_dim": 32, "num_heads": 2, "num_layers": 2, "guide_dim": 8}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four views, as the script writes them: two that begin a video, two that go on with it."""
    script = runpy.run_path(str(ROOT / "data" / "prepare_studio_views.py"))
    out = tmp_path_factory.mktemp("views")
    world = script["World"]("train")
    job = script["Job"](out, world, ROOT / "data/sample/voices", STUDIO)
    script["write"](job, range(4))
    return out


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def batch_of(views: Path) -> Any:
    stored = examples.Stored(views)
    return examples.stack([stored[0, number] for number in range(len(stored.places))])


def run(views: Path, **more: Any) -> Path:
    values = {
        "name": "camera",
        "into": "base",
        **{f"task.{name}": size for name, size in SIZES.items()},
        "data.path": views,
        "data.batch_size": 2,
        "data.num_workers": 0,
        "optimizer.lr": 0.02,
        "optimizer.course": "constant",
        "optimizer.warmup_steps": 0,
        "trainer.max_steps": 4,
        "trainer.save_every": 2,
        "trainer.ema_decay": 0.5,
        **more,
    }
    words = [f"{key}={value}" for key, value in values.items()]
    folder = pretrain(str(ROOT / "recipes/studio/camera.yaml"), words, lambda line: None)
    return folder / str(training.FILE)


def test_the_task_is_found_without_importing_plugins() -> None:
    assert plugins.trainings("task")["uni3c"] == "kit.plugins.uni3c.training:task"
    assert (
        set(plugins.trainings("data")) == set(plugins.trainings("task")) < set(plugins.available())
    )


def test_examples_hold_first_and_later_chunks(views: Path) -> None:
    given = batch_of(views)
    assert given.batch.num_context.tolist() == [1, 3, 1, 3]
    assert given.render.shape == given.batch.latents.shape
    assert given.guide.shape == (4, 7, 33, 64, 64)
    assert not given.guide[::2, 0, 0].any()  # a video begins with the picture itself
    # The render and what it shows begin alike, up to the rounding of both.
    apart = (given.render - given.batch.latents)[::2, :, 0].abs().mean()
    assert apart < 0.01 < (given.render - given.batch.latents)[::2, :, -1].abs().mean()


def test_a_new_controller_changes_nothing(views: Path) -> None:
    task = training.ControllerTask(0, base=str(STUDIO), text_length=64, **SIZES)
    given = batch_of(views)
    noisy, sigma = given.batch.latents, torch.full((4,), 0.7)
    denoiser, controller = task.network["denoiser"], task.network["controller"]
    with torch.no_grad():
        plain = denoiser(noisy, sigma, given.batch.conditions)
        rendered = controller.embed_render(given.render, given.guide)
        inside = training.Controlled(controller, rendered)
        assert torch.equal(denoiser(noisy, sigma, given.batch.conditions, inside=inside), plain)
    trains = {name for name, value in task.network.named_parameters() if value.requires_grad}
    assert trains == {f"controller.{name}" for name, _ in controller.named_parameters()}


def test_dropped_renders_are_one_hole_and_dropped_rays_nothing(views: Path) -> None:
    given = batch_of(views)
    task = training.ControllerTask(
        0, base=str(STUDIO), text_length=64, drop_render=1.0, drop_rays=1.0, **SIZES
    )
    render, guide = task.told(given)
    assert not render.any() and (guide[:, 0] == 1).all() and not guide[:, 1:].any()
    kept = training.ControllerTask(
        0, base=str(STUDIO), text_length=64, drop_render=0.0, drop_rays=0.0, **SIZES
    )
    assert all(map(torch.equal, kept.told(given), (given.render, given.guide)))


def test_learns_goes_on_bit_for_bit_and_is_read_back(views: Path) -> None:
    whole = run(views, name="whole", into="whole", **{"trainer.max_steps": 8})
    for steps in (4, 8):
        parts = run(views, name="parts", into="parts", **{"trainer.max_steps": steps})
    one, other = load_file(whole), load_file(parts)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(value.any() for name, value in one.items() if "proj_out" in name)
    controller = weights.load_controller(whole, CPU, torch.float32)
    assert (controller.sizes.num_heads, controller.sizes.num_layers) == (2, 2)
    # Each step draws its own noise, so the loss is compared on one draw.
    given, losses = batch_of(views), []
    for state in (None, one):
        task = training.ControllerTask(0, base=str(STUDIO), text_length=64, **SIZES)
        if state is not None:
            task.network["controller"].load_state_dict(state)
        with torch.no_grad():
            losses.append(float(task.losses(given)["velocity"]))
    assert losses[1] < losses[0]
    assert len(read_curves(Path("runs/whole/metrics.csv"))) == 8


def test_a_folder_without_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.path: .* holds no views-"):
        run(tmp_path)


def test_the_shipped_controller_fits_the_shipped_base() -> None:
    file = ROOT / "plugins" / "uni3c" / "studio.safetensors"
    controller = weights.load_controller(file, CPU, torch.float32)
    base = WanBase(path=str(STUDIO), dtype="float32").empty_denoiser()
    assert isinstance(base, Wan)
    assert controller.sizes.base_dim == base.transformer.patch_embedding.out_channels
    assert any(value.any() for value in controller.controlnet.proj_out.parameters())
