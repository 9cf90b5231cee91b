"""Finding the clips in a folder, and the files beside each that say more about it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kit.data.fields import INDEX_NAME
from kit.errors import InputError

VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".gif", ".avi")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SOUND_SUFFIXES = (".wav", ".flac")

_SPEAKER_FILE = re.compile(r".+\.speaker\d+\.png", re.IGNORECASE)
_SIDE_SUFFIXES = (".txt", ".json", *SOUND_SUFFIXES)
_NUMBERED = re.compile(r"(.*?)(\d+)")
_MASK_IN_JSON = re.compile(r'"mask"\s*:\s*"([^"]+)"')


@dataclass(frozen=True)
class Source:
    """A video, a still picture, or a folder of numbered pictures that make one video.

    Attributes:
        pictures: of a sequence, in order; else empty.
    """

    path: Path
    kind: Literal["video", "image", "sequence"]
    pictures: tuple[Path, ...] = ()

    def beside(self, ending: str) -> Path:
        """Name the file of the same stem with another ending, such as `.txt`, in any case."""
        stem = self.path.name if self.kind == "sequence" else self.path.stem
        wanted = (stem + ending).lower()
        found = (p for p in self.path.parent.iterdir() if p.name.lower() == wanted and p.is_file())
        return next(found, self.path.with_name(stem + ending))

    @property
    def missing_numbers(self) -> list[int]:
        """List the numbers that a sequence leaves out between its first and its last."""
        numbers = {_number(path) for path in self.pictures}
        return sorted(set(range(min(numbers), max(numbers))) - numbers) if numbers else []

    def sound_beside(self, middle: str = "") -> Path | None:
        """Find `<stem><middle>.wav` or `.flac`."""
        return next((p for s in SOUND_SUFFIXES if (p := self.beside(middle + s)).is_file()), None)


def find_sources(place: Path, leave_out: Path) -> list[Source]:
    """List what a folder holds, in order of names; of a single file, that file.

    Args:
        place: folder, searched with all below it, or file.
        leave_out: folder not to search: the one that is written to.

    Raises:
        InputError: there is no such place, or no file with an ending that we know.
    """
    known = ", ".join((*VIDEO_SUFFIXES, *IMAGE_SUFFIXES))
    if not place.exists():
        raise InputError(f"{place}: there is no such file or folder")
    if (place / INDEX_NAME).exists():
        raise InputError(f"{place} holds shards, no clips; `--encode` would encode them")
    if place.is_file():
        found = list(_lone_sources([place]))
    else:
        files = sorted(path for path in place.rglob("*") if path.is_file())
        inside = [path for path in files if not _is_left_out(path, place, leave_out)]
        found = _group(place, inside)
    if not found:
        raise InputError(f"{place} holds no media; looked for {known}")
    return sorted(found, key=lambda source: source.path)


def find_unknown(place: Path, leave_out: Path) -> list[Path]:
    """List the files of a folder that are neither media nor stand beside any."""
    if not place.is_dir():
        return []
    known = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, *_SIDE_SUFFIXES)
    files = sorted(path for path in place.rglob("*") if not path.is_dir())
    return [
        path
        for path in files
        if path.suffix.lower() not in known and not _is_left_out(path, place, leave_out)
    ]


def _group(place: Path, files: Sequence[Path]) -> list[Source]:
    side_files = {mask for path in files if path.suffix == ".json" for mask in _masks_of(path)}
    media = [path for path in files if _is_medium(path) and path not in side_files]
    folders: dict[Path, list[Path]] = {}
    for path in media:
        folders.setdefault(path.parent, []).append(path)
    found: list[Source] = []
    for folder, members in folders.items():
        if folder != place and _is_sequence(members):
            found.append(Source(folder, "sequence", tuple(sorted(members, key=_number))))
        else:
            found += _lone_sources(members)
    return found


def _lone_sources(files: Sequence[Path]) -> Iterator[Source]:
    for path in files:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            yield Source(path, "video")
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield Source(path, "image")


def _is_medium(path: Path) -> bool:
    known = path.suffix.lower() in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)
    return known and not _SPEAKER_FILE.fullmatch(path.name)


def _is_left_out(path: Path, place: Path, leave_out: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(place).parts)
    # A folder prepared into its own media folder is a request we refuse elsewhere.
    inside = leave_out != place and leave_out.absolute() in path.absolute().parents
    return hidden or inside


def _is_sequence(members: Sequence[Path]) -> bool:
    """Numbered pictures of one name; a caption of its own makes a picture a still."""
    names = [_NUMBERED.fullmatch(path.stem) for path in members]
    images = all(path.suffix.lower() in IMAGE_SUFFIXES for path in members)
    one_name = all(names) and len({name[1] for name in names if name}) == 1
    captioned = any(path.with_suffix(".txt").is_file() for path in members)
    return len(members) > 1 and images and one_name and not captioned


def _number(path: Path) -> int:
    name = _NUMBERED.fullmatch(path.stem)
    return int(name[2]) if name else 0


def _masks_of(path: Path) -> list[Path]:
    # Read loosely here: a file that is not quite right must not turn its masks into stills.
    text = path.read_text(encoding="utf-8", errors="replace")
    return [path.parent / name for name in _MASK_IN_JSON.findall(text)]
