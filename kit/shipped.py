"""Where `plugins/`, `recipes/` and `data/` lie: in an installed wheel or in a checkout."""

from pathlib import Path

FOLDERS = ("plugins", "recipes", "data")
PREFIX = "shipped:"


def root() -> Path:
    """Find the folder that holds the shipped folders.

    A checkout is known by its `pyproject.toml`, so that a broken wheel cannot pick up a
    stranger's folder beside it.

    Raises:
        FileNotFoundError: the installation is broken.
    """
    package = Path(__file__).resolve().parent
    if (package / "_shipped").is_dir():
        return package / "_shipped"
    if (package.parent / "pyproject.toml").is_file():
        return package.parent
    raise FileNotFoundError(f"{package} lacks its shipped files; install the package again")


def shipped(folder: str) -> Path:
    """Find one of the shipped folders by its name."""
    return root() / folder


def resolve(text: str) -> str:
    """Turn `shipped:data/x` into the path of that file here; other text stays as it is.

    Raises:
        ValueError: the path does not begin with a shipped folder.
    """
    if not text.startswith(PREFIX):
        return text
    inside = text.removeprefix(PREFIX)
    if inside.split("/")[0] not in FOLDERS:
        raise ValueError(
            f"'{text}' must begin with one of {', '.join(PREFIX + f for f in FOLDERS)}"
        )
    return str(root() / inside)


def portable(text: str) -> str:
    """Undo `resolve`, so that what is stored says the same on every machine."""
    for folder in FOLDERS:
        prefix = str(shipped(folder))
        if text == prefix or text.startswith(prefix + "/"):
            return PREFIX + folder + text.removeprefix(prefix)
    return text
