"""`kit sample`: make a talking video as a recipe says."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kit.adapters.files import load_adapter
from kit.adapters.lora import apply_adapter, require_fit
from kit.batch import SAMPLE_RATE
from kit.data.media import VideoWriter, probe
from kit.devices import choose_device
from kit.errors import InputError
from kit.metrics.video_report import Measure, VideoReport
from kit.models.base import Base, Denoiser
from kit.recipe import Recipe
from kit.run.recipes import SAMPLE, read_as
from kit.run.scenes import (
    Size,
    build_measure,
    load_portrait,
    load_track,
    no_reference,
    one_speaker,
    open_video,
)
from kit.sampling.chunks import Chunk
from kit.sampling.frames import to_pictures
from kit.sampling.pipeline import Source, TalkSampler


def sample(
    recipe: str,
    overrides: Sequence[str],
    report: Callable[[str], None],
    *,
    is_measured: bool = False,
) -> Path:
    """Make a video; finished frames go to the file as they are made.

    Args:
        recipe: path of a sample recipe.
        overrides: `key=value` words.
        report: told what happens, in words.
        is_measured: also measure the video and write `<out without .mp4>.report.json`; its frames
            are then held in memory, one byte for each colour of a pixel.

    Returns:
        The video.

    Raises:
        InputError: something in the recipe or its files is wrong, or the finished video cannot be
            measured as the recipe asks.
        KeyboardInterrupt: names the file that holds the finished chunks.
    """
    checked = read_as(recipe, overrides, SAMPLE)
    base, sampler = build_sample(checked)
    out = Path(checked["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        frames = _write(checked, base, sampler, out, report, keeps_frames=is_measured)
    except KeyboardInterrupt:
        unfinished = out.with_suffix(".partial.mkv")
        raise KeyboardInterrupt(f"stopped; {unfinished} holds the finished chunks") from None
    if is_measured:
        numbers = _measure(checked, base, sampler, frames)
        path = out.with_suffix(".report.json")
        numbers.write(path)
        report(f"{path}: measured")
        for line in numbers.lines():
            report(line)
    return out


def build_sample(recipe: Recipe) -> tuple[Base, TalkSampler]:
    """Build the sections of a sample recipe and check that its inputs go together.

    Raises:
        InputError: lists all that is missing or does not go together.
    """
    base: Base = recipe.build("base")
    sampler: TalkSampler = recipe.build("sampling")
    problems = [*base.problems(), *sampler.problems(base.geometry.frame_stride)]
    problems += _input_problems(recipe, base.geometry.fps) + _output_problems(recipe)
    if problems:
        raise InputError("\n".join(problems))
    if recipe["adapter"] is not None:
        tensors, _ = load_adapter(Path(recipe["adapter"]))
        require_fit(base.empty_denoiser(), tensors)
    return base, sampler


def _input_problems(recipe: Recipe, fps: int) -> list[str]:
    pictures = [name for name in ("image", "video", "size") if recipe[name] is not None]
    if len(pictures) != 1:
        return ["image, video, size: give one of them, and only one"]
    problems = _problems_of(f"{pictures[0]}: ", partial(_load_source, recipe, fps))
    if not problems and "measure" in recipe:
        problems = _problems_of("", partial(_build_measure, recipe, fps))
    return problems + _problems_of("audio: ", partial(load_track, Path(recipe["audio"]), fps))


def _problems_of(place: str, load: Callable[[], object]) -> list[str]:
    try:
        load()
    except InputError as error:
        return [f"{place}{error}"]
    return []


def _output_problems(recipe: Recipe) -> list[str]:
    out = Path(recipe["out"])
    if out.suffix.lower() != ".mp4":
        return [f"out: {out} does not end in .mp4"]
    given = [recipe[name] for name in ("image", "video", "audio", "adapter")]
    if any(name is not None and Path(name).resolve() == out.resolve() for name in given):
        return [f"out: {out} is one of the inputs"]
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        return [f"out: {out} cannot be written"]
    return []


def _load_source(recipe: Recipe, fps: int) -> tuple[Source, Size]:
    if recipe["image"] is not None:
        return load_portrait(Path(recipe["image"]), recipe["buckets"])
    if recipe["video"] is not None:
        return open_video(Path(recipe["video"]), recipe["buckets"], fps)
    return no_reference(recipe["size"])


def _build_measure(recipe: Recipe, fps: int) -> Measure:
    source, size = _load_source(recipe, fps)
    return build_measure(recipe, size, source if recipe["size"] is None else None)


def _write(
    recipe: Recipe,
    base: Base,
    sampler: TalkSampler,
    out: Path,
    report: Callable[[str], None],
    *,
    keeps_frames: bool,
) -> Tensor:
    """Make the video; gives its pixels, or none of them. [T, height, width, 3]"""
    fps, started = base.geometry.fps, time.perf_counter()
    track = load_track(Path(recipe["audio"]), fps)
    source, size = _load_source(recipe, fps)
    scene = one_speaker(recipe["text"], track, source, size, base.geometry)
    scene = replace(scene, has_reference=recipe["size"] is None)
    device = choose_device(recipe["device"])
    denoiser = load_with_adapter(base, recipe["adapter"], device)
    encoders = base.load_encoders(device)

    total = len(track) * fps // SAMPLE_RATE
    chunks = sampler.plan(total)
    if (
        recipe["video"] is not None
        and (seconds := probe(Path(recipe["video"])).seconds) < total / fps
    ):
        report(f"{recipe['video']} ends after {seconds:.2f} s; its last picture is used from there")
    report(f"{out}: {total} frames of {size[1]}x{size[0]} in {len(chunks)} chunks")
    # One place for all from the start: chunks in a list would be held twice when joined.
    frames = torch.empty(total if keeps_frames else 0, *size, 3, dtype=torch.uint8)
    with (
        tqdm(total=len(chunks) * (len(sampler.sigmas) - 1), unit="step") as bar,
        VideoWriter(out, fps=fps, height=size[0], width=size[1], speech=track) as writer,
    ):

        def advance(chunk: Chunk, step: int) -> None:
            bar.set_description(f"chunk {chunk.index + 1}/{len(chunks)}")
            bar.update()

        done = 0
        for pixels in sampler.sample(denoiser, encoders, scene, recipe["seed"], advance):
            pictures = to_pictures(pixels)
            writer.write(pictures)
            if keeps_frames:
                frames[done : done + len(pictures)] = torch.from_numpy(pictures)
            done += len(pictures)
    report(f"{out}: {total / fps:.2f} s of video in {time.perf_counter() - started:.1f} s")
    return frames


def _measure(recipe: Recipe, base: Base, sampler: TalkSampler, frames: Tensor) -> VideoReport:
    fps = base.geometry.fps
    measure = _build_measure(recipe, fps)
    track = load_track(Path(recipe["audio"]), fps)
    starts = [chunk.first_shown for chunk in sampler.plan(len(frames))]
    try:
        return measure.report(frames, track[None], fps, starts)
    except InputError as error:
        raise InputError(f"{recipe['out']} is finished, but not measured: {error}") from error


def load_with_adapter(base: Base, adapter: str | None, device: torch.device) -> Denoiser:
    """Load a base's denoiser, with a trained adapter if there is one."""
    denoiser = base.load_denoiser(device)
    if adapter is not None:
        tensors, info = load_adapter(Path(adapter))
        apply_adapter(denoiser, tensors, info.alpha)
    return denoiser.eval()
