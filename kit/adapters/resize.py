"""Other sizes of adapters: fewer ranks, plain factors for any change of a weight."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kit.adapters.export import scaled_layers
from kit.adapters.kinds import ALPHA, by_layer, roles
from kit.models.deltas import product

OVERSAMPLING = 8
"""Directions that are looked for beyond those kept, which makes the kept ones exact enough."""


def to_lora(
    tensors: Mapping[str, Tensor], kind: str, rank: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Turn an adapter into plain low-rank factors of at most a rank, the nearest there are.

    Args:
        tensors: content of an adapter file.
        kind: of its factors, not `dora`, which changes weights that are not here.
        rank: at most; layers that have fewer keep theirs.

    Returns:
        Content of an adapter file of kind `lora`; alpha is the rank, whole tensors stay. And the
        share of each layer's change that is lost, by its norm.
    """
    lost: dict[str, float] = {}
    layers = scaled_layers(tensors, kind)
    in_layers = {key for names in by_layer(tensors, kind).values() for key in names.values()}
    made = {name: tensor for name, tensor in tensors.items() if name not in in_layers}
    for layer, factors in layers.items():
        change = product(roles(factors))
        if kind == "lora":
            up, down = truncate(factors["lora_B.weight"], factors["lora_A.weight"], rank)
        else:
            up, down = factorise(change, rank)
        made |= lora_tensors(layer, up, down)
        lost[layer] = ((change - up @ down).norm() / change.norm().clamp_min(1e-12)).item()
    return made, lost


def lora_tensors(layer: str, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """Name the factors of a layer as an adapter file does; alpha is the rank."""
    return {
        f"{layer}.lora_A.weight": down,
        f"{layer}.lora_B.weight": up,
        f"{layer}.{ALPHA}": torch.tensor(float(len(down))),
    }


def truncate(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Find the best factors of a rank for up @ down, without multiplying them out.

    Args:
        up: [out, r]
        down: [r, in]
        rank: at most.

    Returns:
        [out, rank] and [rank, in], equally large.

    Source: Eckart and Young 1936; the singular values of a product are those of its triangles.
    """
    if rank >= len(down):
        return up, down
    left, one = torch.linalg.qr(up)
    right, other = torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(one @ other.T)
    root = s[:rank].sqrt()
    return left @ (u[:, :rank] * root), (v[:rank] * root[:, None]) @ right.T


def factorise(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Find nearly the best factors of a rank for a change of a weight.

    Args:
        change: [out, in]
        rank: at most.

    Returns:
        [out, rank] and [rank, in], equally large.

    Source: Halko et al. 2011, as torch has it.
    """
    rank = min(rank, *change.shape)
    wider = min(rank + OVERSAMPLING, *change.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(change.float(), q=wider, niter=6)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, (v[:, :rank] * root).T.contiguous()
