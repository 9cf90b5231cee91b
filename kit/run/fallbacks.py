"""What a run does when memory runs out: options of its recipe take other values, one by one."""

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from kit.devices import is_out_of_memory
from kit.errors import InputError, did_you_mean
from kit.recipe import Recipe, change
from kit.recipe.document import OVERRIDE_PLACE
from kit.run.processes import leave

KEY = "when_out_of_memory"
"""The recipe's list of `section.key=value` words."""

LEAST: Mapping[str, Mapping[str, str]] = {
    "fit": {
        "trainer.checkpoint_blocks": "1",
        "trainer.activations": "host",
        "trainer.offload": "weights",
        "sampling.together": "false",
        "sampling.remember": "false",
        "base.decode_tile": "256",
    },
    "sample": {
        "sampling.together": "false",
        "sampling.remember": "false",
        "base.decode_tile": "256",
        "sampling.offload": "blocks",
    },
}
"""Options of each command that change how much memory is needed and nothing else, or hardly, with
the values that need little."""

Result = TypeVar("Result")


class Fallbacks:
    """The list of a recipe, and how much of it is in use.

    Args:
        recipe: of the run.
        record: file that tells what is in use, for other processes and for a later start.
        num_processes: that work together.
        report: told what happens, in words.
    """

    def __init__(
        self, recipe: Recipe, record: Path, num_processes: int, report: Callable[[str], None]
    ) -> None:
        self._recipe = recipe
        self._record = record
        self._num_processes = num_processes
        self._report = report
        noted = record.read_text().splitlines() if record.exists() else []
        self._used = [word for word in recipe[KEY] if word in noted]
        if self._used:
            report(f"{record}: memory ran out before; {', '.join(self._used)}")

    def run(self, work: Callable[[Recipe], Result]) -> Result:
        """Do work as the recipe says, and again with the next word whenever memory runs out.

        Raises:
            InputError: no word is left; or one is, but other processes wait for this one, and all
                of them have to start again.
        """
        while True:
            try:
                return work(_lowered(self._recipe, self._used))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # Only here does nothing refer any more to what the work held.
            self._use_next(reason)
            _free_memory()

    def forget(self) -> None:
        """Remove the record of a run that is finished."""
        self._record.unlink(missing_ok=True)

    def _use_next(self, reason: str) -> None:
        left = [word for word in self._recipe[KEY] if word not in self._used]
        if not left:
            raise InputError(f"memory ran out: {reason}\n{self._advice()}")
        self._used.append(left[0])
        self._record.parent.mkdir(parents=True, exist_ok=True)
        with self._record.open("a") as file:
            file.write(f"{left[0]}\n")
        if self._num_processes > 1:
            raise InputError(
                f"memory ran out: {reason}\nthe same command goes on with {left[0]}; "
                "`torchrun --max-restarts` gives it by itself"
            )
        self._report(f"memory ran out: {reason}; going on with {left[0]}")

    def _advice(self) -> str:
        """Say what the recipe could give."""
        recipe, known = self._recipe, LEAST[self._recipe.schema.title]
        used = {_option(word) for word in self._used}
        unused = [
            f"{option}={value}"
            for option, value in known.items()
            if option not in used and _value(recipe, option) != value
        ]
        listed = f" {KEY} can have {', '.join(unused)};" if unused else ""
        return f"nothing is left in {KEY};{listed} `kit plan {recipe.path}` tells what needs most"


def least(recipe: Recipe) -> Recipe:
    """Give every option of the table its value, so that recipes that differ in no other are one."""
    known = LEAST[recipe.schema.title]
    return _lowered(recipe, [f"{option}={value}" for option, value in known.items()])


def require_fallbacks(recipe: Recipe, build: Callable[[Recipe], object]) -> None:
    """Check that a recipe could be run with all of its list in use.

    Args:
        recipe: right without it.
        build: builds a recipe's sections and refuses what does not go together.

    Raises:
        InputError: lists what is wrong with the list.
    """
    words, known = recipe[KEY], LEAST[recipe.schema.title]
    unknown = [option for option in map(_option, words) if option not in known]
    if unknown:
        raise InputError(f"{KEY}: unknown '{unknown[0]}'{did_you_mean(unknown[0], known)}")
    if not words:
        return
    try:
        build(_lowered(recipe, words))
    except InputError as error:
        lines = [line.removeprefix(f"{OVERRIDE_PLACE}: ") for line in str(error).splitlines()]
        raise InputError("\n".join(f"{KEY}: {line}" for line in lines)) from None


def _free_memory() -> None:
    """Give back what a failed attempt held."""
    leave()
    gc.collect()
    torch.cuda.empty_cache()


def _lowered(recipe: Recipe, words: Sequence[str]) -> Recipe:
    """Put words to use; of those about one option, the last."""
    last = {_option(word): word for word in words}
    return change(recipe, [*last.values(), f"{KEY}=[]"]) if words else recipe


def _option(word: str) -> str:
    return word.partition("=")[0]


def _value(recipe: Recipe, option: str) -> str:
    """Give an option's value as a word has it."""
    section, _, key = option.partition(".")
    return str(recipe.values[section].get(key)).lower()
