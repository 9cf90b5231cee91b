"""`kit sample`: make a talking video as a recipe says."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kit.adapters.files import load_adapter
from kit.adapters.lora import require_fit
from kit.batch import SAMPLE_RATE
from kit.data.media import probe
from kit.errors import InputError
from kit.metrics.video_report import Measure, VideoReport
from kit.models.base import Base, Geometry
from kit.models.low_bits import FORMS
from kit.recipe import Recipe
from kit.run.bases import adapter_files
from kit.run.fallbacks import Fallbacks, least, require_fallbacks
from kit.run.parts import quantisation_problems
from kit.run.plugins import build_sampler, plugin_files, require_plugins
from kit.run.processes import Place, joined, load_for_sampling, num_processes
from kit.run.recipes import SAMPLE, read_as
from kit.run.request import Request, load_tracks, place_speakers, read_request
from kit.run.scenes import Size, build_measure, load_portrait, no_reference, open_video
from kit.run.unfinished import UnfinishedVideo, identify
from kit.sampling.chunks import Chunk
from kit.sampling.frames import to_pictures
from kit.sampling.pipeline import TalkSampler
from kit.sampling.plugin import INSIDE
from kit.sampling.scene import Scene, Source


def sample(
    recipe: str,
    overrides: Sequence[str],
    report: Callable[[str], None],
    *,
    is_measured: bool = False,
) -> Path:
    """Make a video, or go on with one that was stopped: finished chunks lie beside it.

    Args:
        recipe: path of a sample recipe.
        overrides: `key=value` words.
        report: told what happens, in words.
        is_measured: also measure the video and write `<out without .mp4>.report.json`; its frames
            are then held in memory, one byte for each colour of a pixel. Frames of an earlier
            run that was stopped are measured as their file holds them.

    Returns:
        The video.

    Raises:
        InputError: something in the recipe or its files is wrong, or the finished video cannot be
            measured as the recipe asks.
        KeyboardInterrupt: says where the finished chunks are and how to go on.
    """
    checked = read_as(recipe, overrides, SAMPLE)
    base, sampler = build_sample(checked)
    out = Path(checked["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    with joined(checked["device"]) as place:
        told = report if place.rank == 0 else tell_nobody
        record = out.with_suffix(".out_of_memory.txt")
        fallbacks = Fallbacks(checked, record, place.world, told)

        def make(lowered: Recipe) -> tuple[UnfinishedVideo, Tensor]:
            built = (base, sampler) if lowered is checked else build_sample(lowered)
            return _make(checked, *built, out, told, place, keeps_frames=is_measured)

        video, frames = fallbacks.run(make)
        if place.rank == 0:
            fallbacks.forget()
    if is_measured and place.rank == 0:
        numbers = _measure(checked, base, sampler, frames)
        path = out.with_suffix(".report.json")
        numbers.write(path)
        report(f"{path}: measured")
        for line in numbers.lines():
            report(line)
    video.remove()
    return out


def build_sample(recipe: Recipe) -> tuple[Base, TalkSampler]:
    """Build the sections of a sample recipe and check that its inputs go together.

    Raises:
        InputError: lists all that is missing or does not go together.
    """
    base: Base = recipe.build("base")
    sampler = build_sampler(recipe)
    problems = [*base.problems(), *sampler.problems(base.geometry.frame_stride)]
    problems += _input_problems(recipe, base.geometry) + _output_problems(recipe)
    if sampler.continuity != "source" and recipe["size"] is not None:
        problems.append(
            f"sampling.continuity: '{sampler.continuity}' needs a picture or video to go on from; "
            "take source"
        )
    problems += _process_problems(recipe, sampler)
    if problems:
        raise InputError("\n".join(problems))
    size, has_reference = _shape(recipe, base.geometry.fps)
    require_plugins(recipe, base, sampler, size, has_reference=has_reference)
    if recipe["adapter"] is not None:
        tensors, info = load_adapter(Path(recipe["adapter"]))
        require_fit(base.empty_denoiser(), tensors, info.kind)
        form = recipe.values["base"].get("quantise")
        unfit = quantisation_problems(form, info.kind, info.train_fully)
        if unfit:
            raise InputError("\n".join(unfit))
    require_fallbacks(recipe, build_sample)
    return base, sampler


def _process_problems(recipe: Recipe, sampler: TalkSampler) -> list[str]:
    """Say what does not go with several processes or with blocks that are away, in words."""
    found, form = [], recipe.values["base"].get("quantise")
    is_packed = form is not None and FORMS[form].is_packed
    if sampler.shard and is_packed:
        found.append(f"sampling.shard: weights in {form} cannot be cut; leave one of them out")
    if sampler.offload == "blocks" and is_packed:
        found.append(
            f"sampling.offload: weights in {form} cannot leave block by block; take turns, or fp8 "
            "for base.quantise"
        )
    if sampler.offload == "turns" and sampler.shard:
        found.append("sampling.offload: each process has only a share to put away; take blocks")
    inner = [name for hook in INSIDE for name in sampler.hooks.having(hook)]
    if num_processes() > 1 and inner:
        found.append(
            f"plugins.{inner[0]}: looks into the denoiser, where each process has only some of the "
            "frames; use one process"
        )
    return found


def _shape(recipe: Recipe, fps: int) -> tuple[Size, bool]:
    """Tell the size of the video, and whether it has a reference."""
    request = read_request(recipe)
    _, size = _load_source(request, recipe["buckets"], fps)
    return size, request.size is None


def _input_problems(recipe: Recipe, base: Geometry) -> list[str]:
    try:
        request = read_request(recipe)
    except InputError as error:
        return [str(error)]
    place = "image: " if request.image else "video: " if request.video else "size: "
    pictures = _problems_of(place, partial(_load_source, request, recipe["buckets"], base.fps))
    if not pictures:
        pictures = _problems_of("", partial(_place, request, recipe["buckets"], base))
    if not pictures and "measure" in recipe:
        pictures = _problems_of("", partial(_build_measure, recipe, request, base.fps))
    return pictures + _problems_of("audio: ", partial(load_tracks, request, base.fps))


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
    if any(file.resolve() == out.resolve() for file in _inputs(recipe)):
        return [f"out: {out} is one of the inputs"]
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        return [f"out: {out} cannot be written"]
    return []


def _inputs(recipe: Recipe) -> list[Path]:
    """List the files that decide what the video shows."""
    named = [Path(recipe[key]) for key in ("adapter", "job") if recipe[key] is not None]
    named += [*adapter_files(recipe), *plugin_files(recipe)]
    with suppress(InputError):
        named += read_request(recipe).files()
    return named


def _load_source(
    request: Request, buckets: int | str | Sequence[str], fps: int
) -> tuple[Source, Size]:
    if request.image is not None:
        return load_portrait(request.image, buckets)
    if request.video is not None:
        return open_video(request.video, buckets, fps)
    assert request.size is not None
    return no_reference(request.size)


def _place(request: Request, buckets: int | str | Sequence[str], base: Geometry) -> Tensor:
    _, size = _load_source(request, buckets, base.fps)
    return place_speakers(request, size, base.pixel_stride)


def _build_measure(recipe: Recipe, request: Request, fps: int) -> Measure:
    source, size = _load_source(request, recipe["buckets"], fps)
    return build_measure(recipe, size, source if request.size is None else None)


def _make(
    recipe: Recipe,
    base: Base,
    sampler: TalkSampler,
    out: Path,
    report: Callable[[str], None],
    place: Place,
    *,
    keeps_frames: bool,
) -> tuple[UnfinishedVideo, Tensor]:
    """Make the video; gives its chunks, and its pixels or none of them. [T, height, width, 3]"""
    fps, started = base.geometry.fps, time.perf_counter()
    request = read_request(recipe)
    tracks = load_tracks(request, fps)
    source, size = _load_source(request, recipe["buckets"], fps)
    places = place_speakers(request, size, base.geometry.pixel_stride)
    scene = Scene(request.text, tracks, source, places, has_reference=request.size is None)

    total = tracks.shape[1] * fps // SAMPLE_RATE
    chunks = sampler.plan(total)
    if request.video is not None and (seconds := probe(request.video).seconds) < total / fps:
        report(f"{request.video} ends after {seconds:.2f} s; its last picture is used from there")
    report(f"{out}: {total} frames of {size[1]}x{size[0]} in {len(chunks)} chunks")
    identity, is_first = identify(least(recipe), _inputs(recipe)), place.rank == 0
    video = UnfinishedVideo(out, identity, fps, size, writes=is_first)
    place.wait()  # until all have seen how far the video is
    if video.progress is not None:
        report(f"{video.folder}: {video.progress.next_chunk} of {len(chunks)} chunks are there")
    # One place for all from the start: chunks in a list would be held twice when joined.
    frames = torch.empty(total if keeps_frames else 0, *size, 3, dtype=torch.uint8)
    done = _copy(video.frames(), frames, 0) if keeps_frames else 0
    steps = len(sampler.sigmas) - 1
    progress_bar = tqdm(total=len(chunks) * steps, unit="step", disable=not is_first)
    with _kept(video, tracks.sum(0)), progress_bar as bar:
        bar.update(steps * video.progress.next_chunk if video.progress else 0)

        def advance(chunk: Chunk, step: int) -> None:
            bar.set_description(f"chunk {chunk.index + 1}/{len(chunks)}")
            bar.update()

        denoiser = load_for_sampling(
            base,
            recipe["adapter"],
            place,
            is_quantised=recipe.values["base"].get("quantise") is not None,
            is_sharded=sampler.shard and place.world > 1,
            offload=sampler.offload,
        )
        encoders = base.load_encoders(place.device)
        made = sampler.sample(denoiser, encoders, scene, recipe["seed"], advance, video.progress)
        for pixels, progress in made:
            pictures = to_pictures(pixels)
            video.add(pictures, progress)
            if keeps_frames:
                done += _copy(pictures, frames, done)
    video.join(tracks.sum(0))
    report(f"{out}: {total / fps:.2f} s of video in {time.perf_counter() - started:.1f} s")
    return video, frames


@contextmanager
def _kept(video: UnfinishedVideo, speech: Tensor) -> Iterator[None]:
    """Say where the finished chunks are if the work is stopped from the keyboard."""
    try:
        yield
    except KeyboardInterrupt:
        if video.progress is None:
            raise
        so_far = video.folder / "so_far.mp4"
        video.join(speech, so_far)
        raise KeyboardInterrupt(
            f"stopped; {so_far} holds the finished chunks, and the same command goes on"
        ) from None


def tell_nobody(line: str) -> None:
    """Leave the telling to the first process."""


def _copy(pictures: np.ndarray, frames: Tensor, start: int) -> int:
    frames[start : start + len(pictures)] = torch.from_numpy(pictures)
    return len(pictures)


def _measure(recipe: Recipe, base: Base, sampler: TalkSampler, frames: Tensor) -> VideoReport:
    request, fps = read_request(recipe), base.geometry.fps
    measure = _build_measure(recipe, request, fps)
    starts = [chunk.first_shown for chunk in sampler.plan(len(frames))]
    try:
        return measure.report(frames, load_tracks(request, fps), fps, starts)
    except InputError as error:
        raise InputError(f"{recipe['out']} is finished, but not measured: {error}") from error
