"""Claims: who of several processes, on any number of machines, makes a file."""

from pathlib import Path

from filelock import SoftFileLease

LEASE_SECONDS = 60.0
"""An owner who gave no sign of life for so long has lost its claim, whatever machine it was on."""


def claim(target: Path) -> SoftFileLease:
    """Claim a file that is to be made, by a file beside it that names the owner.

    A claim only saves work: it is lost when its owner dies, at once if others on that machine see
    it, but also when its owner is held up, and then two may make the file. So it must be written
    under a name of its own and renamed.
    """
    return SoftFileLease(f"{target}.claim", lease_duration=LEASE_SECONDS, poll_interval=0.2)
