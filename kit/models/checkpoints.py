"""Weights: streamed from files into a network without memory, or drawn from a seed."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from kit.draws import draw_normal
from kit.errors import InputError
from kit.models.keys import Names
from kit.models.lora_files import Change
from kit.models.quantised import UNUSED as UNUSED_FACTORS
from kit.models.quantised import Weight, dequantise, pair_factors, require_known_forms
from kit.models.tensor_files import Read, open_tensors, read_header, same_shape, shorten

FLOAT32_PARTS = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3", "norm_x"}
"""Parts that stay float32 in a bfloat16 network. Source: diffusers 0.42, and ours for norm_x."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a parameter lies.

    Attributes:
        file: holds it.
        weight: keys in the file, shape and dtype there.
        piece: it is this one of so many equal pieces, counted from the first row.
    """

    file: Path
    weight: Weight
    piece: tuple[int, int] = (0, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        rows, *rest = self.weight.entry.shape or (1,)
        shape = (rows // self.piece[1], *rest)
        return shape if self.weight.entry.shape else ()

    def read(self, read: Read) -> Tensor:
        """Read it from its open file, as the numbers that were stored or in float32."""
        numbers, factor = read(self.weight.numbers), self.weight.factor
        whole = numbers if factor is None else dequantise(numbers, read(factor))
        number, count = self.piece
        return whole if count == 1 else whole.chunk(count)[number].clone()


def locate_tensors(
    files: Iterable[Path],
    names: Callable[[Collection[str]], Names],
    unused: Mapping[str, str],
) -> dict[str, StoredTensor]:
    """Find each tensor by our name; later files win, unknown keys stay as they are.

    Only the files' headers are read.

    Args:
        files: holding the weights of one network.
        names: translates keys.
        unused: patterns of keys to leave out.

    Raises:
        InputError: a file cannot be read, or is quantised in an unknown form.
    """
    patterns = [*unused, *UNUSED_FACTORS]
    found: dict[str, StoredTensor] = {}
    for file in files:
        header = read_header(file)
        require_known_forms(file, header)
        weights = {
            key: weight
            for key, weight in pair_factors(header.tensors).items()
            if not any(fnmatchcase(key, pattern) for pattern in patterns)
        }
        translated = names(weights)
        for key, weight in weights.items():
            ours = translated.get(key, (key,))
            for number, name in enumerate(ours):
                found[name] = StoredTensor(file, weight, (number, len(ours)))
    return found


def mismatches(
    model: nn.Module, stored: Mapping[str, StoredTensor], may_lack: Collection[str] = ()
) -> list[str]:
    """Say in words which tensors are missing, unknown, of another shape or no numbers."""
    wanted = parameter_shapes(model)
    known = {name: tensor for name, tensor in stored.items() if name in wanted}
    findings = {
        "missing": [name for name in wanted if name not in stored and name not in may_lack],
        "unknown": [tensor.weight.numbers for name, tensor in stored.items() if name not in wanted],
        "differently shaped": [
            f"{name} is {list(tensor.shape)}, not {list(wanted[name])}"
            for name, tensor in known.items()
            if not same_shape(tensor.shape, wanted[name])
        ],
        "integer (without a factor to make weights of them)": [
            tensor.weight.numbers
            for tensor in known.values()
            if tensor.weight.factor is None and "int" in tensor.weight.entry.dtype
        ],
    }
    return [
        f"{what} tensors ({len(names)}): {shorten(names)}"
        for what, names in findings.items()
        if names
    ]


def require_match(
    model: nn.Module, stored: Mapping[str, StoredTensor], may_lack: Collection[str] = ()
) -> None:
    """Refuse stored tensors that are not the network's parameters.

    Raises:
        InputError: a tensor is missing, unknown or has another shape; all are counted.
    """
    findings = mismatches(model, stored, may_lack)
    if findings:
        files = ", ".join(sorted({str(tensor.file) for tensor in stored.values()})) or "no file"
        raise InputError(f"the weights in {files} do not fit:\n" + "\n".join(findings))


def assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Make a value the frozen parameter of a name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))


def load_weights(
    model: nn.Module,
    stored: Mapping[str, StoredTensor],
    *,
    device: torch.device,
    dtype: Callable[[str], torch.dtype],
    changes: Mapping[str, Sequence[Change]] | None = None,
    may_lack: Collection[str] = (),
) -> None:
    """Read a network's parameters one by one, so that only one is ever held twice.

    Args:
        model: on the meta device.
        stored: where its parameters lie, by our names.
        device: to read them onto.
        dtype: of a parameter by its name.
        changes: to add to parameters on the way, in float32.
        may_lack: parameters that no computation reads; zeros where they are not stored.

    Raises:
        InputError: a tensor is missing, unknown or has another shape; all are counted.
    """
    require_match(model, stored, may_lack)
    shapes, in_files = parameter_shapes(model), by_file(stored)
    for name, value in read_weights(in_files, shapes, device=device, changes=changes or {}):
        assign(model, name, value.to(dtype(name)))
    for name in sorted(set(shapes).difference(stored)):
        assign(model, name, torch.zeros(shapes[name], dtype=dtype(name), device=device))


def read_weights(
    stored: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    device: torch.device,
    changes: Mapping[str, Sequence[Change]],
) -> Iterator[tuple[str, Tensor]]:
    """Read parameters one by one, with changes added in float32.

    Args:
        stored: where they lie, by our names, in the order in which they are wanted; best file by
            file, as `by_file` sorts them, since one is open at a time.
        shapes: that they are to have.
        device: to read them onto.
        changes: to add on the way.

    Yields:
        Our name and the value, in the dtype that was stored, or float32 if it was changed.
    """
    with ExitStack() as stack:
        change_files = {change.file for found in changes.values() for change in found}
        added = {file: stack.enter_context(open_tensors(file, device)) for file in change_files}
        for file, names in groupby(stored, key=lambda name: stored[name].file):
            with open_tensors(file, device) as read:
                for name in names:
                    value = stored[name].read(read).reshape(shapes[name])
                    for change in changes.get(name, ()):
                        value = change.add_to(value, added[change.file])
                    yield name, value


def by_file(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Sort parameters by the file that holds them."""
    return dict(sorted(stored.items(), key=lambda item: item[1].file))


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """List the parameters' shapes; of those that are one and the same, the first.

    A weight packed into four bits has the shape that it stands for.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: _shape(p) for name, p in model.named_parameters() if name not in tied}


def draw_weights(model: nn.Module, seed: int, dtype: torch.dtype) -> None:
    """Give each parameter numbers; see `draw_parameters`."""
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name, value in draw_parameters(shapes, seed):
        parameters[name].data = value.to(parameters[name].device, dtype_of(name, dtype))


def draw_parameters(
    shapes: Mapping[str, tuple[int, ...]], seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Draw parameters of these shapes one by one; each depends on the seed and its name alone.

    Nothing is zero: a part that is left out, or in the wrong place, changes the output.
    """
    for name, shape in shapes.items():
        yield name, _draw_parameter(name, shape, seed)


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Choose a parameter's dtype: float32 for parts that are computed so, else the one given."""
    return torch.float32 if FLOAT32_PARTS.intersection(name.split(".")) else dtype


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    packed = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if packed is None else packed.shape)


def _draw_parameter(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    noise = draw_normal(shape, seed, name)
    is_vector = math.prod(shape) == max(shape)
    if name.endswith("bias"):
        return 0.02 * noise
    if is_vector:
        return 1 + 0.1 * noise
    fan_in = shape[-1] if name.endswith("scale_shift_table") else math.prod(shape[1:])
    return noise / math.sqrt(fan_in)
