"""The one error for what a user wrote: the command line prints it without a traceback."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user wrote or gave cannot be used.

    The message names the place, the wrong value and the valid ones. Several findings stand on
    lines of their own. `kit` prints the message and exits with code 2.
    """


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """Say which valid word is nearest and list them all, as the tail of an error message."""
    choices = sorted(valid)
    nearest = difflib.get_close_matches(word, choices, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ";"
    return f"{hint} valid: {', '.join(choices) or 'none'}"
