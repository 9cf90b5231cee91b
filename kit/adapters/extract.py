"""An adapter out of two sets of weights: what a training changed, as low-rank factors."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from kit.adapters.resize import factorise
from kit.errors import InputError
from kit.models.base import Base
from kit.models.checkpoints import parameter_shapes


class Extracted(NamedTuple):
    """What became of one layer.

    Attributes:
        layer: our name.
        up: [out, rank]
        down: [rank, in]
        lost: share of the change that the factors do not hold, by its norm.
    """

    layer: str
    up: Tensor
    down: Tensor
    lost: float


def extract(base: Base, tuned: Base, parts: tuple[str, ...], rank: int) -> Iterator[Extracted]:
    """Find low-rank factors of the difference between two denoisers, layer by layer.

    Layers that did not change are left out.

    Args:
        base: as it was.
        tuned: as it is now, of the same sizes.
        parts: whose linear layers are compared.
        rank: of the factors.

    Raises:
        InputError: a part is unknown.
    """
    valid = base.empty_denoiser().parts()
    unknown = [part for part in parts if part not in valid]
    if unknown:
        raise InputError(f"--parts: unknown part '{unknown[0]}'; there are {', '.join(valid)}")
    require_same_sizes(base, tuned)
    names = [f"{layer}.weight" for part in parts for layer in valid[part]]
    for name, change, _ in _changes(base, tuned, names):
        up, down = factorise(change, rank)
        lost = (change - up @ down).norm() / change.norm()
        yield Extracted(name.removesuffix(".weight"), up, down, lost.item())


def require_same_sizes(base: Base, tuned: Base) -> None:
    """Refuse to compare denoisers of different sizes.

    Raises:
        InputError: names the first parameter that differs.
    """
    one, other = (parameter_shapes(given.empty_denoiser()) for given in (base, tuned))
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            raise InputError(
                f"the two denoisers differ in size: {name} is {one.get(name)} in the one, "
                f"{other.get(name)} in the other"
            )


def unheld(base: Base, tuned: Base, layers: set[str]) -> Iterator[tuple[str, float]]:
    """Name the parameters that changed but are in no factors, and by how much of their norm."""
    others = [name for name, _ in base.empty_denoiser().named_parameters()]
    names = [name for name in others if name.removesuffix(".weight") not in layers]
    for name, change, before in _changes(base, tuned, names):
        yield name, (change.norm() / before.norm().clamp_min(1e-12)).item()


def _changes(base: Base, tuned: Base, names: list[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Give what changed, and the value before, in float32."""
    pairs = zip(base.parameters(names), tuned.parameters(names), strict=True)
    for (name, before), (_, after) in pairs:
        change = after.float() - before.float()
        if change.any():
            yield name, change, before.float()
