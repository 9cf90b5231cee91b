"""`kit extract`: an adapter out of two checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML
from torch import Tensor

from kit.adapters.extract import extract, unheld
from kit.adapters.files import AdapterInfo, write_adapter
from kit.adapters.resize import lora_tensors
from kit.errors import InputError
from kit.models.base import Base
from kit.models.keys import is_audio
from kit.models.tensor_files import read_header
from kit.run.bases import build_base

Values = dict[str, object]

AUDIO_FILE = "infinitetalk.safetensors"
"""Where Wan's and this kit's own layout have audio parts."""


@dataclass(frozen=True)
class Request:
    """What to extract.

    Attributes:
        base: folder of the weights as they were.
        tuned: folder or file of the weights as they are now.
        out: adapter file to write.
        rank: of the factors.
        parts: parts of the denoiser to compare.
        overrides: `base.key=value` words, for both.
    """

    base: str
    tuned: str
    out: Path
    rank: int = 32
    parts: tuple[str, ...] = ("attention", "ffn", "audio")
    overrides: Sequence[str] = ()


def extract_adapter(request: Request, report: Callable[[str], None]) -> Path:
    """Write what changed between two checkpoints as an adapter of this kit.

    Args:
        request: which checkpoints, and how.
        report: told what the factors hold and what not, in words.

    Raises:
        InputError: a checkpoint cannot be read, or nothing changed.
    """
    if not request.parts:
        raise InputError("--parts: name at least one part, such as attention")
    if request.out.is_dir():
        raise InputError(
            f"--out: '{request.out}' is a folder; name a file, such as ann.safetensors"
        )
    request.out.parent.mkdir(parents=True, exist_ok=True)
    before = _folder(Path(request.base))
    after = before | _tuned(Path(request.tuned))
    base, tuned = (build_base(values, request.overrides) for values in (before, after))
    tensors: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    for found in extract(base, tuned, request.parts, request.rank):
        tensors |= lora_tensors(found.layer, found.up, found.down)
        lost[found.layer] = found.lost
    if not tensors:
        raise InputError(f"{request.tuned}: no layer of {', '.join(request.parts)} changed")
    write_adapter(request.out, tensors, _info(request, before))
    worst = max(lost, key=lambda layer: lost[layer])
    report(f"{request.out}: {len(lost)} layers, rank {request.rank}")
    report(f"  {lost[worst]:.1%} of the change of {worst} is not in its factors, the worst")
    _report_rest(base, tuned, set(lost), report)
    return request.out


def _folder(folder: Path) -> Values:
    """Name a base folder, with the audio parts that lie in it under their public name."""
    audio = folder / AUDIO_FILE
    with_audio: Values = {"audio_weights": str(audio)} if audio.exists() else {}
    return {"type": "wan", "path": str(folder), "dtype": "float32", **with_audio}


def _tuned(place: Path) -> Values:
    """Name what is not as it was: a whole folder, or the file of one part."""
    if place.is_dir():
        return _folder(place)
    keys = read_header(place).tensors
    return {"audio_weights" if all(map(is_audio, keys)) else "transformer": str(place)}


def _info(request: Request, base: Values) -> AdapterInfo:
    with_base = {"base": base, "adapter": {"type": "lora", "kind": "lora", "rank": request.rank}}
    text = _dump(with_base)
    return AdapterInfo(request.out.stem, "wan", "lora", request.parts, (), 0, text)


def _dump(values: Mapping[str, object]) -> str:
    text = StringIO()
    YAML(typ="safe", pure=True).dump(values, text)
    return text.getvalue()


def _report_rest(base: Base, tuned: Base, held: set[str], report: Callable[[str], None]) -> None:
    rest = dict(unheld(base, tuned, held))
    if rest:
        worst = max(rest, key=lambda name: rest[name])
        report(
            f"  {len(rest)} parameters changed that have no factors, {worst} most, "
            f"by {rest[worst]:.1%}; kit export --to base keeps all of them"
        )
