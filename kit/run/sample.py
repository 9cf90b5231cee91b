"""`kit sample`: make a talking video as a recipe says."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from kit.adapters.files import load_adapter
from kit.adapters.lora import apply_adapter, require_fit
from kit.data.media import VideoWriter
from kit.errors import InputError
from kit.models.base import Base, Denoiser
from kit.recipe import Recipe, read
from kit.run.devices import choose_device
from kit.run.recipes import SAMPLE
from kit.run.scenes import load_portrait, load_track, one_speaker, open_video
from kit.sampling.chunks import Chunk
from kit.sampling.frames import to_pictures
from kit.sampling.pipeline import TalkSampler


def sample(recipe: str, overrides: Sequence[str], report: Callable[[str], None]) -> Path:
    """Make a video; finished frames go to the file as they are made.

    Args:
        recipe: path of a sample recipe.
        overrides: `key=value` words.
        report: told what happens, in words.

    Returns:
        The video.

    Raises:
        InputError: something in the recipe or its files is wrong.
    """
    checked = read(recipe, overrides, SAMPLE)
    base, sampler = build_sample(checked)
    out = Path(checked["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    _write(checked, base, sampler, out, report)
    return out


def build_sample(recipe: Recipe) -> tuple[Base, TalkSampler]:
    """Build the sections of a sample recipe and check that its inputs go together.

    Raises:
        InputError: lists all that is missing or does not go together.
    """
    base: Base = recipe.build("base")
    sampler: TalkSampler = recipe.build("sampling")
    problems = [*base.problems(), *sampler.problems(base.geometry.frame_stride)]
    if (recipe["image"] is None) == (recipe["video"] is None):
        problems.append("image, video: give one of them, not both and not neither")
    if Path(recipe["out"]).suffix != ".mp4":
        problems.append(f"out: {recipe['out']} does not end in .mp4")
    if problems:
        raise InputError("\n".join(problems))
    if recipe["adapter"] is not None:
        tensors, _ = load_adapter(Path(recipe["adapter"]))
        require_fit(base.empty_denoiser(), tensors)
    return base, sampler


def _write(
    recipe: Recipe, base: Base, sampler: TalkSampler, out: Path, report: Callable[[str], None]
) -> None:
    fps, buckets, started = base.geometry.fps, recipe["buckets"], time.perf_counter()
    track = load_track(Path(recipe["audio"]), fps)
    source, size = (
        open_video(Path(recipe["video"]), buckets, fps)
        if recipe["image"] is None
        else load_portrait(Path(recipe["image"]), buckets)
    )
    scene = one_speaker(recipe["text"], track, source, size, base.geometry)
    device = choose_device("auto")
    denoiser = load_with_adapter(base, recipe["adapter"], device)
    encoders = base.load_encoders(device)

    total = len(track) * fps // 16_000
    chunks = sampler.plan(total)
    report(f"{out}: {total} frames of {size[1]}x{size[0]} in {len(chunks)} chunks")
    with (
        tqdm(total=len(chunks) * (len(sampler.sigmas) - 1), unit="step") as bar,
        VideoWriter(out, fps=fps, height=size[0], width=size[1], speech=track) as writer,
    ):

        def advance(chunk: Chunk, step: int) -> None:
            bar.set_description(f"chunk {chunk.index + 1}/{len(chunks)}")
            bar.update()

        for pixels in sampler.sample(denoiser, encoders, scene, recipe["seed"], advance):
            writer.write(to_pictures(pixels))
    report(f"{out}: {total / fps:.2f} s of video in {time.perf_counter() - started:.1f} s")


def load_with_adapter(base: Base, adapter: str | None, device: torch.device) -> Denoiser:
    """Load a base's denoiser, with a trained adapter if there is one."""
    denoiser = base.load_denoiser(device)
    if adapter is not None:
        tensors, info = load_adapter(Path(adapter))
        apply_adapter(denoiser, tensors, info.alpha)
    return denoiser.eval()
