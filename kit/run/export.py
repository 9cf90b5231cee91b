"""`kit export`: an adapter in the formats of other programs, or merged into its base."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kit.adapters.consumers import UNSUPPORTED
from kit.adapters.export import FORMATS, Trunk, is_trunk, scaled_layers
from kit.adapters.files import AdapterInfo, load_adapter, write_adapter
from kit.adapters.hub import write_card
from kit.adapters.merged import LAYOUTS, cast, write_audio
from kit.adapters.metadata import recipe_of
from kit.adapters.resize import to_lora
from kit.adapters.verify import verify
from kit.atomic import write_text
from kit.errors import InputError, did_you_mean
from kit.models import BASES
from kit.models.base import Base
from kit.models.keys import is_audio
from kit.registry import load
from kit.run.bases import build_base

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DtypeName = Literal["bfloat16", "float16", "float32"]

OWN = "kit"
"""The format of this kit: an adapter file of another rank or dtype."""

HUB = "hub"
"""A folder to publish: the files of diffusers and ComfyUI, a model card, previews."""

TARGETS = (*FORMATS, *LAYOUTS, OWN, HUB)

WHERE_THE_BASE_IS = (
    "merging needs the base's weights: say where they are by base.path=... "
    "base.audio_weights=..., or leave audio out by --without-audio"
)


@dataclass(frozen=True)
class Settings:
    """How to write.

    Attributes:
        dtype: of what is written; whole bases keep theirs where it is not given.
        rank: turns factors into plain low-rank ones of at most this rank; None leaves them.
        trigger: word in captions that calls for what was learnt.
        with_audio: write audio modules that the adapter changes, merged, to a file of their own.
        verify: read what was written as its program does, and compare.
    """

    dtype: DtypeName | None = None
    rank: int | None = None
    trigger: str = ""
    with_audio: bool = True
    verify: bool = False


def export(
    adapter: Path,
    formats: Sequence[str],
    out: Path | None,
    report: Callable[[str], None],
    *,
    settings: Settings = Settings(),  # noqa: B008  # frozen
    overrides: Sequence[str] = (),
) -> list[Path]:
    """Write an adapter for other programs and tell what they will find in it.

    Args:
        adapter: file that `kit fit` wrote.
        formats: names from `TARGETS`.
        out: folder; each format gets one of its own there. Beside the adapter if absent.
        report: told what was written, in words.
        settings: how to write.
        overrides: `base.key=value` words, where the base is not where it was at training.

    Raises:
        InputError: no such format, the adapter or its base cannot be read, or a program does not
            know such adapters; nothing is written then. Or what was written is not what was
            trained.
    """
    tensors, info = load_adapter(adapter)
    place = out or adapter.parent
    exporting = _Exporting(adapter, tensors, info, place, report, settings, tuple(overrides))
    exporting.require_known(formats)
    base, sizes = exporting.open_base(formats), exporting.open_sizes()
    if settings.rank is not None:
        exporting = exporting.resized(settings.rank)
    files: list[Path] = []
    for name in formats:
        written = exporting.write(name, base)
        files += written
        if settings.verify:
            exporting.verify(name, written, sizes)
    if any(name in FORMATS for name in formats):
        for file in exporting.write_audio(base, exporting.out):
            report(f"audio modules, merged:\n  {file}")
            files.append(file)
    if not files:
        raise InputError("--to: nothing to write; the adapter changes audio modules alone")
    exporting.tell_what_else()
    return files


@dataclass(frozen=True)
class _Exporting:
    """One export: what is written, and where to."""

    source: Path
    tensors: dict[str, Tensor]
    info: AdapterInfo
    out: Path
    report: Callable[[str], None]
    settings: Settings
    overrides: tuple[str, ...]

    def require_known(self, formats: Sequence[str]) -> None:
        """Refuse what cannot be written, before anything is."""
        if not formats:
            raise InputError(f"--to: name at least one of {', '.join(TARGETS)}")
        if self.info.base not in BASES:
            hint = did_you_mean(self.info.base, BASES)
            raise InputError(f"{self.source}: unknown base '{self.info.base}'{hint}")
        is_resized = self.settings.rank is not None
        if is_resized and self.info.kind == "dora":
            raise InputError(
                "--rank: the change of a dora depends on its base; --to base and kit extract make "
                "plain factors of it"
            )
        kind = "lora" if is_resized else self.info.kind
        for name in formats:
            if name not in TARGETS:
                raise InputError(f"--to: unknown format '{name}'{did_you_mean(name, TARGETS)}")
            if is_resized and (name in LAYOUTS or self._is_whole):
                raise InputError(f"--rank: has no meaning for {name} here; leave it out")
            if (kind, name) in UNSUPPORTED:
                raise InputError(f"--to {name}: {UNSUPPORTED[kind, name]}")
            if name in (*FORMATS, HUB) and self._whole_parts:
                raise InputError(
                    f"--to {name}: factors alone go there, and this adapter trained "
                    f"{', '.join(self._whole_parts)} fully; take --to base, then kit extract"
                )

    @property
    def _whole_parts(self) -> list[str]:
        """Name the parts of Wan's trunk that trained without factors."""
        return [part for part in self.info.train_fully if part != "audio"]

    def resized(self, rank: int) -> "_Exporting":
        """Make plain factors of at most a rank, and say what is lost."""
        tensors, lost = to_lora(self.tensors, self.info.kind, rank)
        if not lost:
            raise InputError("--rank: this adapter has no factors; leave it out")
        worst = max(lost, key=lambda layer: lost[layer])
        self.report(f"rank {rank}: {lost[worst]:.1%} of the change of {worst} is lost, the worst")
        return replace(self, tensors=tensors, info=replace(self.info, kind="lora"))

    @property
    def _is_whole(self) -> bool:
        return self.info.train_fully == ("all",)

    @property
    def _merges_audio(self) -> bool:
        return self.settings.with_audio and any(is_audio(name) for name in self.tensors)

    def open_base(self, formats: Sequence[str]) -> Base | None:
        """Find the base with the adapter among its changes, if weights of it are to be written."""
        merges = any(name in LAYOUTS for name in formats) and not self._is_whole
        writes_audio = any(name in (*FORMATS, HUB) for name in formats) and self._merges_audio
        if not merges and not writes_audio:
            return None
        values = dict(recipe_of(self.info)["base"])
        values["loras"] = [*values.get("loras", []), {"file": str(self.source.absolute())}]
        if self.settings.dtype not in (None, "bfloat16"):
            values["dtype"] = "float32"  # to be rounded once
        return build_base(values, self.overrides, hint=WHERE_THE_BASE_IS)

    def open_sizes(self) -> Base | None:
        """Find the sizes of the base, if what is written is to be verified."""
        if not self.settings.verify:
            return None
        sizes = self._sizes()
        sizes.empty_denoiser()
        return sizes

    def _sizes(self) -> Base:
        return build_base(recipe_of(self.info)["base"], self.overrides, needs_weights=False)

    def write(self, name: str, base: Base | None) -> list[Path]:
        """Write one format to a folder of its own."""
        folder = self.out / name
        if name == OWN:
            files = [self._write_own(folder)]
        elif name in LAYOUTS:
            files = self._write_whole(name, folder, base)
        elif name in FORMATS:
            files = self._write_trunk(name, folder)
        else:
            files = [path for one in self._hub_formats for path in self._write_trunk(one, folder)]
            files += self.write_audio(base, folder)
            previews = sorted((self.source.parent / "previews").glob("*.mp4"))
            files += write_card(self.info, folder, files, self.settings.trigger, previews)
        for path in files:
            self.report(f"  {path}")
        return files

    def _write_whole(self, name: str, folder: Path, base: Base | None) -> list[Path]:
        given = self.tensors.items() if base is None else base.parameters()
        dtype = None if self.settings.dtype is None else DTYPES[self.settings.dtype]
        files = LAYOUTS[name](cast(given, dtype), folder, self._public)
        try:
            configurations = self._sizes().configurations(name)
        except InputError as error:
            self.report(f"no config.json is written, since the base is not here: {error}")
            return files
        for place, values in configurations.items():
            files.append(folder / place)
            files[-1].parent.mkdir(exist_ok=True)
            write_text(files[-1], json.dumps(values, indent=2) + "\n")
        return files

    def write_audio(self, base: Base | None, folder: Path) -> list[Path]:
        """Write the audio modules that the adapter changes, merged."""
        if base is None or not self._merges_audio:
            return []
        file = folder / f"{self.info.name}_infinitetalk.safetensors"
        names = [name for name, _ in base.empty_denoiser().named_parameters() if is_audio(name)]
        write_audio(cast(base.parameters(names), self._dtype), file, self._public)
        return [file]

    def verify(self, name: str, files: Sequence[Path], sizes: Base | None) -> None:
        """Read back what another program is to read.

        Raises:
            InputError: it does not do what was trained.
        """
        if sizes is None or name not in FORMATS:
            self.report(f"{name}: not verified; only {', '.join(FORMATS)} are")
            return
        with tempfile.TemporaryDirectory() as folder:
            trained = Path(folder) / "adapter.safetensors"
            write_adapter(trained, self.tensors, self.info)
            for file in (file for file in files if file.suffix == ".safetensors"):
                found = verify(file, name, trained, sizes.empty_denoiser())
                self.report(found.summary())
                if found.problems():
                    lines = ["written, but not what was trained:", *found.problems()]
                    raise InputError("\n".join(lines))

    def tell_what_else(self) -> None:
        """Name the adapters that this one was trained on top of."""
        for change in recipe_of(self.info).get("base", {}).get("loras", []):
            self.report(f"trained on top of {Path(change['file']).name}: load that as well")

    @property
    def _hub_formats(self) -> list[str]:
        known = ("diffusers", "comfyui")
        return [name for name in known if (self.info.kind, name) not in UNSUPPORTED]

    def _write_own(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "adapter.safetensors"
        # Scales and magnitudes are few, and worth their digits.
        tensors = {n: t.to(self._dtype) if t.ndim > 1 else t for n, t in self.tensors.items()}
        write_adapter(path, tensors, self.info)
        return path

    def _write_trunk(self, name: str, folder: Path) -> list[Path]:
        layers = scaled_layers(self.tensors, self.info.kind)
        trunk = {layer: factors for layer, factors in layers.items() if is_trunk(layer)}
        unknown = sum(len(factors) for layer, factors in layers.items() if layer not in trunk)
        matched = sum(map(len, trunk.values()))
        self.report(f"{name}: {matched} tensors matched, {unknown} unmatched (audio modules)")
        if not trunk:
            return []
        folder.mkdir(parents=True, exist_ok=True)
        public, trigger = self._public_name, self.settings.trigger
        return FORMATS[name](Trunk(self.info, trunk, public, self._dtype, trigger), folder)

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.settings.dtype or "bfloat16"]

    @property
    def _public_name(self) -> Callable[[str], str | None]:
        name: Callable[[str], str | None] = load(BASES[self.info.base]).public_name
        return name

    def _public(self, name: str) -> str:
        return self._public_name(name) or name
