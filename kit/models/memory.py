"""Computing once what all steps of a chunk share."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")


class Once(Protocol):
    """Calls a function, or gives what it gave before for the same objects."""

    def __call__(self, function: Callable[..., Result], *given: object) -> Result:
        """Give `function(*given)`."""


def afresh(function: Callable[..., Result], *given: object) -> Result:
    """Call a function and remember nothing, as training must."""
    return function(*given)


class Memory:
    """Remembers what functions gave, as long as it lives.

    Objects count as the same only if they are identical: looking at the numbers of tensors would
    cost more than it saves. Whoever keeps a memory leaves weights and tensors as they are.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[tuple[object, ...], Any]] = {}

    def __call__(self, function: Callable[..., Result], *given: object) -> Result:
        """Give `function(*given)`; see `Once`."""
        key = (function, *map(id, given))
        if key not in self._known:
            # What was given is kept as well, so that nothing else can come to have its identity.
            self._known[key] = given, function(*given)
        result: Result = self._known[key][1]
        return result
