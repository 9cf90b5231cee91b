"""A server of files that can fail as servers do."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


class Server(ThreadingHTTPServer):
    """Serves a folder on this machine.

    Attributes:
        folder: what is served.
        asked: how often each file was asked for, by its name.
        faults: what goes wrong with the next answers about a file, in order: `503`, or another
            status; `cut`, the answer ends too early; `stall`, it never ends.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder = folder
        self.asked: Counter[str] = Counter()
        self.faults: defaultdict[str, list[str]] = defaultdict(list)
        self.stopped = False

    def handle_error(self, *request: object) -> None:
        """Say nothing of clients that hang up."""

    @property
    def address(self) -> str:
        """Where the folder is."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve a folder for a while."""
    with Server(folder) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server
        finally:
            server.stopped = True
            server.shutdown()


class _Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:  # noqa: N802 - a name of the library's
        name = self.path.lstrip("/")
        self.server.asked[name] += 1
        faults = self.server.faults[name]
        fault = faults.pop(0) if faults else ""
        path = self.server.folder / name
        if fault.isdigit() or not path.is_file():
            self.send_error(int(fault or 404))
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if not fault else content[: len(content) // 2])
        while fault == "stall" and not self.server.stopped:
            time.sleep(0.05)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""
