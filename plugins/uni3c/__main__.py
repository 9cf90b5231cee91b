"""Write the render of a portrait along a course of cameras, beside its holes.

Run: python -m kit.plugins.uni3c portrait.png --camera orbit --depth depth.npy --out render.mp4
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kit.errors import InputError, did_you_mean

from .cameras import PRESETS, Route, Trajectory
from .preview import preview


def main(words: list[str]) -> None:
    """Read the command line and write the preview."""
    options = vars(_read(words))
    route = parse_route(options.pop("camera"))
    preview(options.pop("portrait"), options.pop("out"), route=route, **options)


def parse_route(text: str) -> Route:
    """Turn a name, or `azimuth=-30,distance=0.8`, into a course.

    Raises:
        InputError: lists what is wrong.
    """
    if "=" not in text:
        if text not in PRESETS:
            raise InputError(f"--camera: unknown '{text}'{did_you_mean(text, PRESETS)}")
        return PRESETS[text]
    values = dict(part.partition("=")[::2] for part in text.split(","))
    try:
        return TypeAdapter(Trajectory).validate_strings(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise InputError("\n".join(f"--camera: {line}" for line in lines)) from error


def _read(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kit.plugins.uni3c",
        description="Write the render of a portrait along a course of cameras, beside its holes.",
    )
    add: Any = parser.add_argument
    add("portrait", type=Path)
    add("--camera", required=True, help="name, or azimuth=-30,...")
    add("--depth", required=True, help="file, or folder or hub repository of a network")
    add("--out", type=Path, default=Path("render.mp4"))
    add("--frames", type=int, dest="num_frames", default=81)
    add("--buckets", default="480", help="480, 720, or a size such as 640x640")
    add("--field-of-view", type=float, default=50.0, help="degrees, if depth does not tell")
    add("--radius", type=float, help="distance of the centre, in the unit of depth")
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
