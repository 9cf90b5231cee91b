"""`kit plugins new`: a plugin to begin with, and its test."""

import keyword
from collections.abc import Callable
from pathlib import Path
from string import Template

from kit import plugins
from kit.errors import InputError

PLUGIN = Template('''\
"""Let the frames of a chunk begin with noise that is partly the same, so that less flickers.

Source: mixed noise of "Preserve Your Own Correlation" (arXiv 2305.10474).
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from kit.sampling.plugin import At, Plugin


class $kind(Plugin):
    """Mixes the noise of each latent frame with that of the first.

    Args:
        share: of the variance that all frames share; 0 changes nothing.
    """

    def __init__(self, *, share: Annotated[float, Field(ge=0, le=1)] = 0.5) -> None:
        self._share = share

    def noise(self, noise: Tensor, at: At) -> Tensor:
        """Mix, so that each number stays standard normal. [1, C, F, H, W]"""
        own, common = noise[:, :, 1:], noise[:, :, :1]
        mixed = noise.clone()
        mixed[:, :, 1:] = (1 - self._share) ** 0.5 * own + self._share**0.5 * common
        return mixed


plugin = $kind
''')

TEST = Template('''\
"""What `$name` promises, and that it is a good plugin."""

import torch

from kit import plugins
from kit.run.plugin_check import examine
from kit.sampling.chunks import Chunk
from kit.sampling.plugin import At

# The first chunk and the first step: what most hooks need to know to be called by a test.
AT = At(Chunk(index=0, start=0, num_frames=81, num_context=0, num_shown=81), 0, 40, 1.0, 0.996)


# From here to the last test, all is about the example: replace it with what your plugin promises.


def mixed(noise: torch.Tensor, share: float) -> torch.Tensor:
    plugin = plugins.load("$name")(share=share)
    return plugin.noise(noise, AT)


def test_each_number_stays_standard_normal_and_frames_resemble_each_other() -> None:
    torch.manual_seed(0)
    frames = mixed(torch.randn(1, 16, 21, 60, 52), share=0.5).transpose(1, 2).flatten(2)[0]
    assert (frames.std(1) - 1).abs().max() < 0.02
    alike = torch.corrcoef(frames)[0, 1:]
    assert (alike - 0.5**0.5).abs().max() < 0.02


def test_a_share_of_zero_changes_nothing() -> None:
    noise = torch.randn(1, 16, 3, 4, 4)
    assert torch.equal(mixed(noise, share=0), noise)


def test_it_is_a_good_plugin() -> None:
    # Keep this one; options that suit the tiny base go into the list, as "$name.share=0.3".
    assert [outcome for outcome in examine("$name", []) if outcome.problems] == []
''')


def write_skeleton(name: str, folder: Path, report: Callable[[str], None]) -> None:
    """Write a small working plugin and its test.

    Args:
        name: what recipes will call it.
        folder: where to write `NAME.py` and `test_NAME.py`; made if it is not there.
        report: told how to use them.

    Raises:
        InputError: the name cannot be a plugin's, or a file is there already.
    """
    _require_name(name)
    kind = "".join(part.capitalize() for part in name.split("_"))
    texts = {folder / f"{name}.py": PLUGIN, folder / f"test_{name}.py": TEST}
    there = [str(path) for path in (*texts, folder / name) if path.exists()]
    if there:
        raise InputError(f"{', '.join(there)}: there already; nothing was written")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text.substitute(name=name, kind=kind))
        report(f"{path}: written")
    place = f"{plugins.PATH_VARIABLE}={folder.absolute()}"
    report(f"{place} kit plugins check {name}")
    report(f"{place} pytest {folder / f'test_{name}.py'}")
    report(f"in a recipe of kit sample or kit fit: plugins: {{{name}: {{share: 0.5}}}}")


def _require_name(name: str) -> None:
    is_word = name.isidentifier() and name.isascii() and name == name.lower()
    if not is_word or keyword.iskeyword(name) or name.startswith(plugins.NOT_PLUGINS):
        raise InputError(
            f"'{name}' cannot be a plugin's name; valid: small letters, digits and _, such as "
            "calm_noise, and no word of Python's"
        )
    found = plugins.available().get(name)
    if found is not None:
        raise InputError(f"plugin '{name}' is there already: {found.origin}")
