"""Server: artifacts over HTTP, from the loading of the models to the last answer."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from h1export.errors import H1ExportError
from h1export.serve.app import Api
from h1export.serve.keys import ApiKeys
from h1export.serve.metrics import Metrics
from h1export.serve.model import Room, ServedModel
from h1export.targets import Kernels

BACKLOG = 2048
IDLE = 30  # seconds that a connection without a request stays open
MOST_HEAD = 64 << 10  # bytes of a request's head


@dataclass(frozen=True)
class Place:
    """Where a server listens, and how it ends.

    Attributes:
        host: The address; 127.0.0.1 is this machine alone.
        port: The port; 0 means any free one.
        drain: Seconds that answers may take after the first SIGTERM or SIGINT.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    drain: int = 30


class Server:
    """Serves artifacts until it is stopped.

    Args:
        outs: Name -> the artifact's folder.
        place: Where it listens.
        room: What each artifact may take.
        keys: The file of API keys, or None.
        threads: The argument of ``h1export.load``.
        kernels: The argument of ``h1export.load``.
        verify: The file of the public key that must have signed the artifacts, or None.
        report: Is called with lines for the operator.

    Raises:
        H1ExportError: An artifact cannot be served, the keys cannot be read, or the port is taken.
    """

    def __init__(
        self,
        outs: Mapping[str, Path],
        place: Place,
        room: Room,
        *,
        keys: Path | None = None,
        threads: int = 0,
        kernels: Kernels = "auto",
        verify: Path | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        known = None if keys is None else ApiKeys.read(keys)
        self._report = report
        self._place = place
        self._socket = _listening(place)
        metrics = Metrics()
        self.models: dict[str, ServedModel] = {}
        try:
            for name, out in outs.items():
                watch = metrics.watch(name, report)
                self.models[name] = ServedModel(
                    name, out, room, watch=watch, threads=threads, kernels=kernels, verify=verify
                )
                if self.models[name].runner.provenance.fallback:
                    report(self.models[name].runner.provenance.fallback)
        except BaseException:
            self.close()
            raise
        config = uvicorn.Config(
            Api(self.models, metrics, known, report=report).application(),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            ws="none",
            http="h11",
            loop="asyncio",
            timeout_keep_alive=IDLE,
            timeout_graceful_shutdown=place.drain,
            h11_max_incomplete_event_size=MOST_HEAD,
        )
        self._server = uvicorn.Server(config)
        logging.getLogger("uvicorn.error").addHandler(logging.NullHandler())  # requests that are no HTTP are no news

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, or until ``stop``; then finish what was begun, as long as it may take."""
        try:
            with _signals_end_it():
                self._server.run(sockets=[self._socket])
        finally:
            self.close()

    def stop(self) -> None:
        """Let ``run`` return, in another thread."""
        self._server.should_exit = True

    def close(self) -> None:
        """End all work, and free the port."""
        for model in self.models.values():
            model.close()
        self._socket.close()


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """Let the signals that end a server do nothing else: uvicorn raises them again when it has finished."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def named(outs: Sequence[str]) -> dict[str, Path]:
    """Return name -> folder of arguments FOLDER or NAME=FOLDER; a folder's own name is that of its model.

    Raises:
        H1ExportError: A name is empty or given twice.
    """
    found: dict[str, Path] = {}
    for out in outs:
        name, given, folder = out.partition("=")
        if not given or Path(out).is_dir():
            name, folder = Path(out).resolve().name, out
        if not name or not name.isprintable() or name in found:
            what = f"the name {name!r} is given twice" if name in found else "has no name"
            raise H1ExportError(out, what, "give NAME=OUT, with names that differ")
        found[name] = Path(folder)
    return found


def _listening(place: Place) -> socket.socket:
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((place.host, place.port))
        found.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        found.close()
        what = f"cannot listen there ({getattr(error, 'strerror', None) or 'no such address'})"
        raise H1ExportError(f"{place.host}:{place.port}", what, "choose another --host or --port") from None
    return found
