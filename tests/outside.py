"""What tests compare with that is no part of the project: where it lies, and why a test skips."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "shared"


def reference(name: str) -> Path:
    """Find a file of what the public InfiniteTalk code computes, or skip the test."""
    return _find(
        FOLDER / "fixtures" / "infinitetalk" / name,
        "needs large outputs of the public InfiniteTalk code, which are not shipped; "
        "tests/test_published.py compares the networks with a few numbers of it",
    )


def media(name: str) -> Path:
    """Find a film, picture or sound of real people, or skip the test."""
    return _find(
        FOLDER / "media" / name,
        "needs a film of a real person, which is not shipped; drawn material is tested alike",
    )


def _find(path: Path, reason: str) -> Path:
    if not path.exists():
        pytest.skip(reason)
    return path
