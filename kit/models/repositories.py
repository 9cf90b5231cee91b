"""Folders of weights: here, or repositories on the Hugging Face hub that are fetched."""

import re
from collections.abc import Sequence
from pathlib import Path

from kit.errors import InputError

HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?")
CONFIG_FILES = ("*.json", "*.model", "*.txt")
"""What a hub repository is asked for before a run: all but its weights."""
WEIGHT_FILES = (*CONFIG_FILES, "*.safetensors", "*.pth")


def is_remote(name: str) -> bool:
    """Tell whether a name can only be a repository on the hub."""
    return not Path(name).exists() and HUB_NAME.fullmatch(name) is not None


def resolve(name: str, place: str, patterns: Sequence[str]) -> Path:
    """Find what is local, or the local copy of a hub repository, fetching files if need be.

    Args:
        name: of a folder, or `organisation/name` or `organisation/name@revision`.
        place: in the recipe, for messages.
        patterns: of files that are wanted.

    Raises:
        InputError: it is neither.
    """
    if Path(name).exists():
        return Path(name)
    if HUB_NAME.fullmatch(name) is None:
        raise InputError(f"{place}: there is no folder '{name}'")
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=[*patterns])
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{place}: '{name}' is no folder here, and the hub does not give it: {error}"
        ) from error
