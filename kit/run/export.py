"""`kit export`: an adapter in the formats of other programs."""

from collections.abc import Callable, Sequence
from pathlib import Path

from kit.adapters.export import FORMATS, export_adapter
from kit.adapters.files import load_adapter
from kit.errors import InputError, did_you_mean
from kit.models import BASES
from kit.registry import load


def export(
    adapter: Path, formats: Sequence[str], out: Path | None, report: Callable[[str], None]
) -> list[Path]:
    """Write an adapter for other programs and tell what they will find in it.

    Args:
        adapter: file that `kit fit` wrote.
        formats: names of formats.
        out: folder; each format gets one of its own there. Beside the adapter if absent.
        report: told what was written, in words.

    Raises:
        InputError: no such format, or the adapter cannot be read. Nothing is written then.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise InputError(f"--to: unknown format '{unknown[0]}'{did_you_mean(unknown[0], FORMATS)}")
    _, info = load_adapter(adapter)
    if info.base not in BASES:
        raise InputError(f"{adapter}: unknown base '{info.base}'{did_you_mean(info.base, BASES)}")
    public_name = load(BASES[info.base]).public_name
    folder = adapter.parent if out is None else out
    written: list[Path] = []
    for name in formats:
        exported = export_adapter(adapter, name, folder / name, public_name)
        report(f"{name}: {len(exported.matched)} keys matched, {len(exported.unmatched)} unmatched")
        for path in exported.files:
            report(f"  {path}")
        for reason in sorted(set(exported.unmatched.values())):
            count = list(exported.unmatched.values()).count(reason)
            report(f"  {count} tensors: {reason}")
        written += exported.files
    return written
