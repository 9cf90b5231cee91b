"""Random choices as pure functions of where they are made.

A generator is named by a path such as `(seed, epoch, sample, "sigma")`. Whoever asks with the same
path gets the same numbers, in whatever process, order or restart, so nothing about randomness has
to be saved in a checkpoint.
"""

import hashlib

import torch


def seed_of(*path: int | str) -> int:
    """Map a path of numbers and names to a seed, 0 to 2**63 - 1, equal on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in path)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def generator(*path: int | str) -> torch.Generator:
    """Make a CPU generator that depends on the path alone."""
    return torch.Generator().manual_seed(seed_of(*path))


def draw_uniform(*path: int | str) -> float:
    """Draw one number from [0, 1)."""
    return torch.rand((), generator=generator(*path)).item()


def draw_index(count: int, *path: int | str) -> int:
    """Draw one of the numbers 0 to count - 1; count is at least 1."""
    return int(torch.randint(count, (), generator=generator(*path)).item())


def draw_normal(shape: tuple[int, ...], *path: int | str) -> torch.Tensor:
    """Draw standard normal numbers in float32 on the CPU, equal for every device that uses them."""
    return torch.randn(shape, generator=generator(*path))
