"""What files and folders of weights are, told from their headers alone."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from kit.errors import InputError
from kit.models.checkpoints import StoredTensor, mismatches, parameter_shapes
from kit.models.encoders import encoder_problems
from kit.models.keys import is_audio
from kit.models.layouts import (
    ENCODERS,
    KINDS,
    PUBLIC_TOKENIZER,
    Layout,
    Part,
    find_layout,
    recognise,
)
from kit.models.lora_files import describe_lora, is_lora
from kit.models.quantised import form_of
from kit.models.tensor_files import SUFFIXES, read_header
from kit.models.wan_base import empty_denoiser

Tensors = Mapping[str, StoredTensor]

HINTS = {"audio": "; for one speaker or for several: such files are alike"}
"""What to say of a kind of network beside its size."""


@dataclass(frozen=True)
class Survey:
    """What was found in one place.

    Attributes:
        heading: what it is.
        lines: what is in it, and what is missing.
        problems: what is wrong with it.
    """

    heading: str
    lines: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def holds_weights(folder: Path) -> bool:
    """Tell whether a folder is one of networks."""
    parts = find_layout(folder, {}).parts.values()
    return any(part.files or part.given for part in parts) or bool(_loose_files(folder))


def survey_folder(folder: Path) -> Survey:
    """Say what a folder of networks holds, and what is missing from it.

    Raises:
        InputError: a file cannot be read.
    """
    layout = find_layout(folder, {})
    found = [part for part in layout.parts.values() if part.files or part.given]
    if not found:
        return _survey_loose(_loose_files(folder))
    names = {True: "diffusers' layout", False: "Wan2.1's own layout"}
    kinds = sorted({names[part.is_in_own_folder] for part in found if part.files})
    lines, missing, problems = _survey(layout)
    if layout.tokenizer is None:
        missing.append(f"no tokenizer: get {PUBLIC_TOKENIZER}")
    used = {file for part in found for file in part.files}
    others = _survey_loose([file for file in _loose_files(folder) if file not in used])
    heading = f"a base in {' and '.join(kinds)}" if kinds else "configurations of a base"
    return Survey(heading, (*lines, *others.lines, *missing), (*problems, *others.problems))


def survey_file(file: Path) -> Survey:
    """Say what a file of weights is.

    Raises:
        InputError: it cannot be read.
    """
    header = read_header(file)
    if is_lora(header):
        return Survey("a LoRA file", (describe_lora(header),))
    kinds = recognise(file)
    if not kinds:
        keys = ", ".join([*header.tensors][:3])
        return Survey("tensors of no network that a base has", (f"the first are {keys}",))
    nothing = {name: Part(name, file.parent, (), {}) for name in KINDS}
    layout = Layout({**nothing, kinds[0]: Part(kinds[0], file.parent, (file,), {})}, None)
    lines, _, problems = _survey(layout)
    return Survey(" and ".join(KINDS[name].title for name in kinds), tuple(lines), tuple(problems))


def _survey_loose(files: list[Path]) -> Survey:
    surveys = {file.name: survey_file(file) for file in files}
    lines = [f"{name}: {survey.heading}" for name, survey in surveys.items()]
    problems = [f"{name}: {line}" for name, survey in surveys.items() for line in survey.problems]
    return Survey(f"{len(files)} files of weights, in no layout", tuple(lines), tuple(problems))


def _loose_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)


def _tensors(layout: Layout, name: str) -> Tensors:
    """Find the tensors of a part; those of the denoiser may lie in each other's files."""
    part = layout.parts[name]
    if name in ENCODERS:
        return part.tensors if part.is_complete else {}
    if not layout.has_denoiser_files:
        return {}
    located = layout.denoiser_tensors
    return {n: tensor for n, tensor in located.items() if is_audio(n) == (name == "audio")}


def _survey(layout: Layout) -> tuple[list[str], list[str], list[str]]:
    """Say which parts are there, which are missing, and what is wrong."""
    lines, missing, problems = [], [], []
    for name, part in layout.parts.items():
        tensors: Tensors = {}
        try:
            wrong = part.absent()
            tensors = _tensors(layout, name)
            wrong = wrong or _unfit(layout, part)
        except InputError as error:
            wrong = str(error).splitlines()
        problems += wrong
        if tensors:
            lines.append(f"{KINDS[name].title}: {_count(tensors)}{HINTS.get(name, '')}")
        elif not wrong:
            missing.append(part.missing())
    return lines, missing, problems


def _count(tensors: Tensors) -> str:
    num_parameters = sum(prod(tensor.shape) for tensor in tensors.values())
    files = {tensor.file for tensor in tensors.values()}
    size = sum(file.stat().st_size for file in files) / 1e9
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        weight = tensor.weight
        form = "" if weight.factor is None else f" ({form_of(weight.factor)})"
        dtypes[weight.entry.dtype + form] += prod(tensor.shape)
    stored = " and ".join(dtype for dtype, _ in dtypes.most_common())
    return (
        f"{len(tensors):,} tensors, {num_parameters:,} parameters, {stored}, "
        f"{size:.1f} GB in {len(files)} file{'s' if len(files) > 1 else ''}"
    )


def _unfit(layout: Layout, part: Part) -> list[str]:
    if part.name in ENCODERS:
        return encoder_problems(part) if part.files else []
    if part.name == "audio" or not _tensors(layout, part.name):
        return []
    model = empty_denoiser(layout)
    has_audio = bool(_tensors(layout, "audio"))
    audio = [] if has_audio else [name for name in parameter_shapes(model) if is_audio(name)]
    return mismatches(model, layout.denoiser_tensors, may_lack=audio)
