"""From a folder of media to raw shards: resample, cut, resize, level the sound, and account for it.

Run: kit prepare my_clips --out shards/my_clips
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from kit.atomic import write_text
from kit.data.buckets import parse_buckets
from kit.data.census import Census, Dropped, KeptClip, load_census
from kit.data.contact_sheet import ContactSheet
from kit.data.cutting import Clip, Cutting, cut_still, cut_video
from kit.data.fields import ENCODED_FOLDER, INDEX_NAME
from kit.data.sources import Source, find_sources, find_unknown
from kit.data.writer import ShardWriter
from kit.errors import InputError

BEGUN_NAME = "begun.txt"
"""Says for which clips and settings a folder was begun."""

_OURS = re.compile(r"(begun\.txt|shard-\d{6}\.tar|index\.json|census\.(json|png))(\.partial)?")
_UNSAFE = re.compile(r"[^0-9A-Za-z_-]+")


def prepare(
    source: Path,
    out: Path,
    *,
    buckets: int | str | Sequence[str],
    window_frames: int = 81,
    clip_seconds: float = 15.0,
    sequence_fps: float = 25.0,
    fps: int = 25,
    samples_per_shard: int = 64,
    overwrite: bool = False,
    report: Callable[[str], None],
) -> Census:
    """Turn media into raw shards with an index, `census.json` and `census.png`.

    Args:
        source: folder, searched with all below it, or one file.
        out: new or empty folder, or one that an earlier `prepare` of the same clips wrote or did
            not finish.
        buckets: `480`, `720` or a list of HEIGHTxWIDTH.
        window_frames: shorter clips are dropped, 4n + 1.
        clip_seconds: longer sources are cut into equal clips of at most this length.
        sequence_fps: rate of folders of numbered pictures.
        fps: rate of the clips.
        samples_per_shard: clips in one tar file.
        overwrite: remove shards that an earlier `prepare` wrote to `out`; nothing else.
        report: is given each line to show.

    Raises:
        InputError: a setting is unfit, the source holds no media, `out` is in use, or every
            file had to be dropped.
    """
    cutting = Cutting(parse_buckets(buckets), window_frames, clip_seconds, sequence_fps, fps)
    _check(cutting)
    sources = find_sources(source, leave_out=out)
    request = _request(source, sources, cutting)
    if _is_done(out, request) and not overwrite:
        report(f"{out}: these clips are prepared already")
        return load_census(out)
    _make_room(out, request, overwrite=overwrite)
    census, sheet = Census(), ContactSheet()
    for path in find_unknown(source, leave_out=out):
        census.warnings.append(f"{path} is of a kind that is not read")
    with ShardWriter(out, "raw", max_samples=samples_per_shard) as writer:
        for number, item in enumerate(sources, start=1):
            before = len(census.kept)
            _take(item, cutting, writer, census, sheet)
            report(f"{number} of {len(sources)}  {item.path}: {len(census.kept) - before} kept")
        if not census.kept:
            (out / BEGUN_NAME).unlink()
            reasons = "\n".join(dropped.reason for dropped in census.dropped)
            raise InputError(f"{source}: nothing can be used\n{reasons}")
        census.write(out)
        sheet.save(out)
    for line in census.lines():
        report(line)
    return census


def _check(cutting: Cutting) -> None:
    if cutting.window_frames < 1 or cutting.window_frames % 4 != 1:
        raise InputError(f"window: {cutting.window_frames} is not 4n + 1 frames, such as 81")
    if not 0 < cutting.sequence_fps < 1000:
        raise InputError(f"sequence-fps: {cutting.sequence_fps} is not between 0 and 1000")
    window_seconds = cutting.window_frames / cutting.fps
    if not window_seconds <= cutting.clip_seconds < math.inf:
        raise InputError(
            f"clip-seconds: {cutting.clip_seconds} must be a number, not shorter than a window of "
            f"{cutting.window_frames} frames ({window_seconds:.2f} s)"
        )


def _is_done(out: Path, request: str) -> bool:
    return (out / INDEX_NAME).exists() and _begun(out) == request


def _make_room(out: Path, request: str, *, overwrite: bool) -> None:
    """Empty the folder of what an unfinished `prepare` left, and note what this one is for."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder")
    present = sorted(out.iterdir()) if out.exists() else []
    ours = [path for path in present if _OURS.fullmatch(path.name)]
    others = [path.name for path in present if path not in ours and path.name != ENCODED_FOLDER]
    is_begun = _begun(out) is not None and not (out / INDEX_NAME).exists()
    if others and not overwrite:
        raise InputError(f"{out} holds other files, such as '{others[0]}'; give an empty folder")
    if ours and not is_begun and not overwrite:
        raise InputError(
            f"{out} already holds shards, of other clips or settings; give another folder, or "
            "overwrite them"
        )
    # Encoded shards of other clips must not be taken for those of these.
    for path in (*ours, out / ENCODED_FOLDER / INDEX_NAME):
        if path.name != BEGUN_NAME:  # says whose the others are, if this is stopped
            path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / BEGUN_NAME, request + "\n")


def _begun(out: Path) -> str | None:
    path = out / BEGUN_NAME
    return path.read_text().strip() if path.is_file() else None


def _request(place: Path, sources: Sequence[Source], cutting: Cutting) -> str:
    """Name clips and settings, so that the same command is known again."""
    root = place if place.is_dir() else place.parent
    digest = hashlib.sha256(repr(cutting).encode())
    folders = sorted({source.path.parent for source in sources} | {s.path for s in sources})
    for folder in (folder for folder in folders if folder.is_dir()):
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            facts = path.stat()
            line = f"{path.relative_to(root)} {facts.st_size} {facts.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _take(
    source: Source, cutting: Cutting, writer: ShardWriter, census: Census, sheet: ContactSheet
) -> None:
    """Write the clips of one source; whatever is wrong with it drops it and nothing else."""
    name = str(source.path)
    try:
        clips = cut_still if source.kind == "image" else cut_video
        for clip in clips(source, cutting, census):
            key = f"{len(census.kept):06d}-{_UNSAFE.sub('_', source.beside('').name)[:48]}"
            members = clip.members | {"json": json.dumps(clip.meta).encode()}
            writer.write(key, members)
            census.num_bytes += sum(map(len, members.values()))
            census.kept.append(_kept(key, name, clip))
            start = clip.meta["start_seconds"]
            sheet.add(f"{source.path.name}  {start:.1f} s", clip.thumbs, clip.tracks)
    except InputError as error:
        census.dropped.append(Dropped(name, str(error)))


def _kept(key: str, name: str, clip: Clip) -> KeptClip:
    meta = clip.meta
    seconds = meta["num_frames"] / meta["fps"] if meta["kind"] == "video" else 0.0
    return KeptClip(
        key=key,
        source=name,
        start_seconds=meta["start_seconds"],
        seconds=seconds,
        speech_seconds=seconds * meta["num_speakers"],
        height=meta["height"],
        width=meta["width"],
    )
