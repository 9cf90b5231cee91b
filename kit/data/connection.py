"""Reading files behind an address, from a server or a bucket, with patience."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from aiohttp import ClientError, ClientTimeout

from kit.errors import InputError, disk_full

DRIVERS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}
"""Kinds of addresses, and the package that reads each; those for buckets come as an extra."""

EXTRA = "charakit[remote]"

_T = TypeVar("_T")

log = logging.getLogger(__name__)


class Refused(InputError):
    """The other side says no, and would say so again."""


@dataclass(frozen=True)
class Patience:
    """How much a slow or failing connection is borne.

    Attributes:
        attempts: for each file.
        pause_seconds: between the first two attempts; each pause is twice the one before.
        stall_seconds: without a byte, after which an attempt has failed; for http.
    """

    attempts: int = 5
    pause_seconds: float = 1.0
    stall_seconds: float = 60.0


@dataclass(frozen=True)
class Connection:
    """Reads files behind an address, again and again if need be.

    Attributes:
        address: folder, without a slash at its end.
        patience: with it.
    """

    address: str
    patience: Patience

    def __post_init__(self) -> None:
        """Refuse an address that no one can read.

        Raises:
            InputError: the kind of address is not known, its driver is not installed, or the
                address tells secrets, which would be stored with the run.
        """
        parts = urlsplit(self.address)
        if parts.scheme not in DRIVERS:
            valid = ", ".join(f"{scheme}://" for scheme in DRIVERS)
            raise InputError(f"'{self.address}' is no address of shards; valid: {valid}, a folder")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise InputError(
                f"{parts.scheme}://{parts.hostname}: an address must hold no name, password or "
                "signature; give them by the environment, as the service's own tools take them"
            )
        driver = DRIVERS[parts.scheme]
        if find_spec(driver) is None:
            raise InputError(
                f"{parts.scheme}://{parts.netloc} needs {driver}; install it with "
                f"`pip install '{EXTRA}'`"
            )

    def read(self, name: str) -> bytes:
        """Read a small file."""
        content: bytes = self._patiently(name, lambda url: self._files().cat_file(url))
        return content

    def fetch(self, name: str, target: Path, num_bytes: int) -> None:
        """Copy a file of a known size to a place here."""

        def copy(url: str) -> None:
            self._files().get_file(url, str(target))
            found = target.stat().st_size
            if found != num_bytes:
                raise OSError(f"{found} bytes came instead of {num_bytes}")

        self._patiently(name, copy)

    def _files(self) -> Any:
        # fsspec remembers connections, and makes new ones in a forked process.
        scheme = urlsplit(self.address).scheme
        if scheme.startswith("http"):
            stall = self.patience.stall_seconds
            # aiohttp's own limit is five minutes for a whole file.
            limits = ClientTimeout(total=None, sock_connect=stall, sock_read=stall)
            return fsspec.filesystem(scheme, client_kwargs={"timeout": limits})
        return fsspec.filesystem(scheme)

    def _patiently(self, name: str, act: Callable[[str], _T]) -> _T:
        url, pause = f"{self.address}/{name}", self.patience.pause_seconds
        for left in reversed(range(self.patience.attempts)):
            try:
                return act(url)
            except (OSError, ClientError) as error:
                if disk_full(error):
                    raise
                reason = _reason(error)
                if _is_final(error):
                    raise Refused(f"{url} cannot be read: {reason}") from error
                if not left:
                    tries = self.patience.attempts
                    raise InputError(
                        f"{url} cannot be read, tried {tries} times: {reason}"
                    ) from error
            log.info("%s: %s; trying again in %g s", url, reason, pause)
            time.sleep(pause)
            pause *= 2
        raise AssertionError("at least one attempt is made")


def is_address(path: str) -> bool:
    """Tell an address from a path here."""
    return "://" in path


def _is_final(error: BaseException) -> bool:
    if isinstance(error, FileNotFoundError | PermissionError):
        return True
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, TimeoutError):
        return "nothing came for too long"
    return str(error) or type(error).__name__
