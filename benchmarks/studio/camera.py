"""How well videos follow a camera on the studio base: without plugins, with SDEdit, Uni3C, both.

Run: python benchmarks/studio/camera.py --strip runs/camera.png
It prints the table and writes `benchmarks/studio/camera.json`. Each scene is a drawn room that
nobody was trained on, with a character and a voice of the test split. All cases are given the same:
the first picture, its depth, the course of the camera and the speech; SDEdit starts from the
video that Uni3C's renderer makes of them. The error is that of the wall's motion, measured from
pixels, against the one asked for.
"""

import argparse
import importlib
import json
import logging
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filming import Studio, film, open_studio, with_plugins
from PIL import Image
from scenes import SPEECH
from torch import Tensor

from kit import plugins
from kit.data.encode import to_video
from kit.data.media import VideoWriter
from kit.metrics.camera import Motion, camera_error, measured_motion, requested_motion
from kit.metrics.mouth import box_regions, opening_by_color
from kit.metrics.sync import lip_sync, speech_envelope
from kit.sampling.frames import StillSource, to_pictures
from kit.sampling.plugin import Plugin
from kit.sampling.scene import Scene
from kit.studio.characters import MOUTH
from kit.studio.mouth import FPS
from kit.studio.scenes import World
from kit.studio.views import View, depth_of, draw_view, lenses, mouth_boxes, paint_view, save_depth
from kit.studio.voices import Corpus, build_corpus

cameras: Any = importlib.import_module("kit.plugins.uni3c.cameras")
points: Any = importlib.import_module("kit.plugins.uni3c.points")

log = logging.getLogger("camera")

OUT = Path(__file__).with_suffix(".json")
WEIGHTS = Path("plugins/uni3c/studio.safetensors")
COURSES = (
    cameras.Trajectory(x_offset=0.18),
    cameras.Trajectory(x_offset=-0.15, y_offset=0.08),
    cameras.Trajectory(distance=0.78),
    cameras.Trajectory(distance=1.25),
    cameras.Trajectory(azimuth=12),
    cameras.Trajectory(azimuth=-10, elevation=-6),
    cameras.Trajectory(zoom=0.82),
    cameras.Trajectory(zoom=1.25),
)
SEED = 5
"""Of the world; the controller's views have another, and other characters and voices."""

COLUMNS = ("pixels", "scale", "sync r", "lag")
MOUTH_MARGIN = 3.0
SHOWN_SCENES, SHOWN_FRAMES, ENLARGED = 4, 5, 2

Numbers = dict[str, float]


class Shot(NamedTuple):
    """A held-out scene with its camera.

    Attributes:
        view: what is drawn.
        course: of the camera.
        frames: the drawn truth. uint8 [T, height, width, 3]
        wall: the part whose motion is measured. bool [height, width]
        asked: its motion.
        mouth: where the lips may be in each frame. [T, height, width]
    """

    view: View
    course: Any
    frames: Tensor
    wall: Tensor
    asked: Motion
    mouth: Tensor


def main() -> None:
    """Film, measure, print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--frames", type=int, default=33, help="33 are one chunk, 57 are two")
    parser.add_argument("--sigma", type=float, default=0.65, help="where SDEdit starts")
    parser.add_argument("--end", type=float, default=1.0, help="where Uni3C ends")
    parser.add_argument("--strip", type=Path, help="save pictures of some scenes here")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("kit").setLevel(logging.WARNING)
    if not (SPEECH / "test").exists():
        build_corpus(SPEECH, "test", 1200.0)
    studio, rows, pictures = open_studio(()), dict[str, list[Numbers]](), list[np.ndarray]()
    for number, shot in enumerate(shots(options.scenes, options.frames)):
        filmed = film_cases(studio, shot, number, options.sigma, options.end)
        made = {"drawn": shot.frames, **filmed}
        for case, frames in made.items():
            rows.setdefault(case, []).append(measure(shot, frames))
        if number < SHOWN_SCENES:
            pictures += [row_of(frames) for frames in made.values()]
        log.info("%d of %d scenes", number + 1, options.scenes)
    report = {case: mean(found) for case, found in rows.items()}
    OUT.write_text(json.dumps(report, indent=2) + "\n")
    log.info("%-12s" + "%10s" * len(COLUMNS), "", *COLUMNS)
    for case, numbers in report.items():
        log.info("%-12s" + "%10.3f" * len(COLUMNS), case, *(numbers[name] for name in COLUMNS))
    if options.strip is not None:
        save_strip(pictures, options.strip)


def shots(count: int, num_frames: int) -> Iterator[Shot]:
    """Draw scenes of the test split in which somebody speaks, each with the next course."""
    corpus, index, made = Corpus(SPEECH, "test"), 0, 0
    while made < count:
        view = draw_view(World("test", SEED), index, num_frames, corpus)
        index += 1
        if view.take.speaking == "one":
            yield open_shot(view, COURSES[made % len(COURSES)], num_frames)
            made += 1


def open_shot(view: View, course: Any, num_frames: int) -> Shot:
    """Draw a scene as its camera sees it."""
    way = cameras.follow(course, num_frames, view.intrinsics, 1.0)
    seen = lenses(*way)
    depth = depth_of(view, seen[0])
    wall = depth > 0.99 * depth.max()
    frames = torch.from_numpy(np.stack(list(paint_view(view, seen))))
    height, width = depth.shape
    # A video that does not follow has its lips where those of a camera at rest are.
    places = [mouth_boxes(view, those) for those in (seen, [seen[0]] * num_frames)]
    either = torch.cat(
        [
            torch.minimum(*(boxes[:, :2] for boxes in places)),
            torch.maximum(*(boxes[:, 2:] for boxes in places)),
        ],
        dim=1,
    )
    mouth = box_regions(either, height, width, MOUTH_MARGIN)
    return Shot(view, course, frames, wall, requested_motion(depth, wall, *way), mouth)


def film_cases(
    studio: Studio, shot: Shot, seed: int, sigma: float, end: float
) -> dict[str, Tensor]:
    """Make the scene's video in each case. uint8 [T, height, width, 3] each"""
    take, size = shot.view.take, (shot.frames.shape[1], shot.frames.shape[2])
    portrait = StillSource(shot.frames[0].numpy(), size)
    scene = Scene(take.caption, take.tracks, portrait, torch.ones(1, size[0] // 8, size[1] // 8))
    with tempfile.TemporaryDirectory() as folder:
        depth, render = Path(folder) / "depth.npz", Path(folder) / "render.mp4"
        save_depth(shot.view, depth)
        save_render(shot, render)
        uni3c = plugins.load("uni3c")(
            weights=WEIGHTS, trajectory=shot.course, depth=str(depth), radius=1.0, end=end
        )  # type: ignore[call-arg]
        sdedit = plugins.load("sdedit")(sigma=sigma, video=str(render))  # type: ignore[call-arg]
        cases: dict[str, dict[str, Plugin]] = {
            "no plugin": {},
            "sdedit": {"sdedit": sdedit},
            "uni3c": {"uni3c": uni3c},
            "both": {"sdedit": sdedit, "uni3c": uni3c},
        }
        return {
            case: film(with_plugins(studio, used), scene, seed).frames
            for case, used in cases.items()
        }


def save_render(shot: Shot, file: Path) -> None:
    """Save what Uni3C's renderer makes of the first picture, its depth and the camera."""
    num_frames, height, width = shot.frames.shape[:3]
    view = shot.view
    way = cameras.follow(shot.course, num_frames, view.intrinsics, 1.0)
    picture = to_video(shot.frames[:1].numpy())[:, 0]
    rendered = points.render(picture, depth_of(view, lenses(*way)[0]), way)
    with VideoWriter(file, fps=FPS, height=height, width=width) as writer:
        writer.write(to_pictures(rendered.pixels.transpose(0, 1)))


def measure(shot: Shot, frames: Tensor) -> Numbers:
    """Compare the wall's motion with the one asked for, and the lips with the speech."""
    error = camera_error(measured_motion(frames, shot.wall), shot.asked)
    speech = speech_envelope(shot.view.take.tracks[0], FPS, len(frames))
    sync = lip_sync(opening_by_color(frames, shot.mouth, MOUTH), speech)
    return dict(zip(COLUMNS, (error.pixels, error.scale, sync.r, sync.lag_frames), strict=True))


def mean(found: list[Numbers]) -> Numbers:
    """Average numbers over scenes."""
    return {name: round(statistics.fmean(row[name] for row in found), 4) for name in COLUMNS}


def row_of(frames: Tensor) -> np.ndarray:
    """Put some frames of a video side by side. [height, width * n, 3]"""
    chosen = np.linspace(0, len(frames) - 1, SHOWN_FRAMES).astype(int)
    return np.concatenate([frames[number].numpy() for number in chosen], axis=1)


def save_strip(rows: list[np.ndarray], file: Path) -> None:
    """Save rows of pictures: for each scene the drawn truth, then each case."""
    per_scene = len(rows) // SHOWN_SCENES
    scenes = [np.concatenate(rows[n : n + per_scene]) for n in range(0, len(rows), per_scene)]
    pairs = [np.concatenate(scenes[n : n + 2], axis=1) for n in range(0, len(scenes), 2)]
    sheet = Image.fromarray(np.concatenate(pairs))
    file.parent.mkdir(parents=True, exist_ok=True)
    size = (sheet.width * ENLARGED, sheet.height * ENLARGED)
    # A hundred colours do for drawings, in a quarter of the bytes.
    sheet.quantize(100).resize(size, Image.Resampling.NEAREST).save(file, optimize=True)


if __name__ == "__main__":
    main()
