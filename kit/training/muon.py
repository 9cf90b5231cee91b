"""Muon: momentum whose matrices are made orthogonal before they are taken as a step.

torch has this optimiser for matrices alone; here convolutions count as matrices too, which is what
small autoencoders need, and vectors are stepped by Adam beside them.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MOMENTUM = 0.9
_EPSILON = 1e-8


class Muon(Optimizer):
    """Steps matrices and convolutions by Muon, vectors by Adam.

    Args:
        parameters: of any shape.
        lr: of matrices; their step has a root mean square of about 0.2 lr times the larger root
            of its sides' ratio.
        vector_lr: of vectors.
        betas: of Adam.
        weight_decay: of matrices, per step and unit of lr.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the
    polynomial's coefficients are theirs.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        vector_lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        given = list(parameters)
        matrices = [p for p in given if p.ndim > 1 and min(p.flatten(1).shape) > 1]
        chosen = {id(p) for p in matrices}
        vectors = [p for p in given if id(p) not in chosen]
        groups = [
            {"params": matrices, "lr": lr, "is_matrix": True},
            {"params": vectors, "lr": vector_lr, "is_matrix": False},
        ]
        defaults = {"betas": betas, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            move = _move_matrix if group["is_matrix"] else _move_vector
            for parameter in group["params"]:
                if parameter.grad is not None:
                    move(parameter, parameter.grad, group, self.state[parameter])
        return loss


def orthogonalized(matrix: Tensor) -> Tensor:
    """Bring all singular values near 1, by a few steps of a polynomial. [rows, columns].

    Computed in bfloat16, because the polynomial only brings them near 1 anyway.
    """
    a, b, c = _QUINTIC
    is_tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = (matrix.T if is_tall else matrix).bfloat16()
    x = x / (x.norm() + _EPSILON)
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if is_tall else x).to(matrix.dtype)


def _move_matrix(
    parameter: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]
) -> None:
    momentum = state.setdefault("momentum", torch.zeros_like(parameter))
    momentum.mul_(_MOMENTUM).add_(gradient)
    direction = orthogonalized((gradient + _MOMENTUM * momentum).flatten(1))
    rows, columns = direction.shape
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    scale = 0.2 * max(1.0, rows / columns) ** 0.5
    parameter.add_(direction.view_as(parameter), alpha=-group["lr"] * scale)


def _move_vector(
    parameter: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]
) -> None:
    first = state.setdefault("first", torch.zeros_like(parameter))
    second = state.setdefault("second", torch.zeros_like(parameter))
    state["steps"] = steps = state.get("steps", 0) + 1
    beta1, beta2 = group["betas"]
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    size = (second / (1 - beta2**steps)).sqrt_().add_(_EPSILON)
    parameter.addcdiv_(first, size, value=-group["lr"] / (1 - beta1**steps))
