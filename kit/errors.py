"""The one error for what a user wrote: the command line prints it without a traceback."""

import difflib
import errno
import os
from collections.abc import Iterable, Iterator

_FULL = {errno.ENOSPC, errno.EDQUOT}


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


def disk_full(error: BaseException) -> str | None:
    """Say which file found no room, if that is what went wrong."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return f"the disk is full, while writing {cause.filename or 'a file'}"
        # Writers in other languages keep the system's words but not its number.
        if os.strerror(errno.ENOSPC) in str(cause):
            return f"the disk is full: {cause}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
