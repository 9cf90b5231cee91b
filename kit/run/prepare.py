"""`kit prepare`: a folder of clips to shards, and shards to encoded shards."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from kit.data.connection import is_address
from kit.data.encode import encode_shards
from kit.data.fields import ENCODED_FOLDER, INDEX_NAME
from kit.data.prepare import prepare as prepare_clips
from kit.data.remote import RemoteFolder
from kit.devices import choose_device
from kit.errors import InputError
from kit.models.base import Base
from kit.recipe import Recipe
from kit.run.parts import build_data
from kit.run.processes import num_processes
from kit.run.recipes import FIT, read_as
from kit.shipped import resolve

DEFAULT_WINDOW, DEFAULT_BUCKETS = 81, "480"


def prepare(
    source: Path | str,
    out: Path,
    *,
    recipe: str | None,
    encode: bool,
    window: int | None,
    buckets: str | None,
    clip_seconds: float,
    sequence_fps: float,
    overwrite: bool,
    report: Callable[[str], None],
) -> None:
    """Prepare clips for training.

    Args:
        source: folder of clips, one file, or with `encode` a folder of raw shards or its address.
        out: folder for the raw shards; encoded ones go to `encoded` inside it.
        recipe: fit recipe whose window, sizes and base count; needed to encode.
        encode: also cache what the base's frozen encoders make of the clips.
        window: shortest clip in frames; the recipe's window if absent.
        buckets: sizes with commas between; the recipe's if absent.
        clip_seconds: longer videos are cut.
        sequence_fps: rate of numbered pictures.
        overwrite: replace shards written before.
        report: told what happens, in words.

    Raises:
        InputError: nothing usable was found, or an option is wrong.
    """
    if encode and recipe is None:
        raise InputError("prepare: --encode needs --recipe, for its base and its windows")
    checked = None
    if recipe is not None:
        checked = read_as(recipe, [f"data.path={json.dumps(str(out))}"], FIT)
    if checked is not None and encode:
        _refuse([*checked.build("base").problems(), *build_data(checked).option_problems()])
    wanted = checked.values["data"]["window_frames"] if checked else DEFAULT_WINDOW
    raw = resolve(str(source))
    is_remote = is_address(raw)
    if not (encode and (is_remote or (Path(raw) / INDEX_NAME).exists())):
        if is_remote or num_processes() > 1:
            raise InputError(
                f"prepare: {source}: clips are prepared by one process from a folder here; an "
                "address, or several processes, are for --encode of shards"
            )
        prepare_clips(
            Path(raw),
            out,
            buckets=buckets or (checked["buckets"] if checked else DEFAULT_BUCKETS),
            window_frames=wanted if window is None else window,
            clip_seconds=clip_seconds,
            sequence_fps=sequence_fps,
            overwrite=overwrite,
            report=report,
        )
        raw = str(out)
    if encode:
        assert checked is not None
        _encode(checked, raw, out / ENCODED_FOLDER, report, overwrite=overwrite)


def _encode(
    recipe: Recipe, raw: str, out: Path, report: Callable[[str], None], *, overwrite: bool
) -> None:
    base: Base = recipe.build("base")
    data = build_data(recipe, base.geometry, base.fingerprint())
    source = RemoteFolder(raw, data.cache) if is_address(raw) else Path(raw)
    _refuse(data.shard_problems(source))
    encoder = data.clip_encoder(base.load_encoders(_own_device(recipe)))
    place = int(os.environ.get("RANK", 0)), num_processes()
    encode_shards(
        source,
        out,
        encoder,
        data.plan,
        data.settings,
        report,
        overwrite=overwrite,
        place=place,
    )


def _own_device(recipe: Recipe) -> torch.device:
    """Give each process of a machine a GPU of its own."""
    device = choose_device(recipe.values["trainer"]["device"])
    if device.type == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def _refuse(problems: list[str]) -> None:
    if problems:
        raise InputError("\n".join(problems))
