"""`pcam serve`: the service as a process that ends well.

Told to stop (TERM, INT) it takes nothing more, answers what waits, writes what was collected and leaves with code 0.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import re
import resource
import signal
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from pcamlib import seeding
from pcamlib.errors import ConfigError
from pcamlib.serving.api import build
from pcamlib.serving.drift import Reference
from pcamlib.serving.predict import Predictor
from pcamlib.serving.service import Service
from pcamlib.serving.upload import Limits

LEAVING = 30  # seconds to answer what waits
CONNECTIONS = 4096  # beyond them: 503
HEADERS = 2**16  # bytes; the read of up to 256 kB that a request begins in is not counted


class Patient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Closes a connection whose next headers, or a body after its answer, do not come in time or have no end.

    uvicorn itself waits for ever: its timer for kept connections ends with the first byte that follows an answer.
    """

    seconds = 20.0
    _late: asyncio.TimerHandle | None = None
    _bare = float("-inf")  # bytes since a message began or a body's last; h11 tells neither, and has a bound of its own

    def connection_made(self, transport: Any) -> None:
        """asyncio's."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        if self._late:
            self._late.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        self._bare += len(data)
        super().data_received(data)
        if self._bare > HEADERS:
            self.transport.close()

    def on_message_begin(self) -> None:
        """httptools': the first byte of a request."""
        super().on_message_begin()
        self._bare = 0
        self._wait()

    def on_body(self, body: bytes) -> None:
        """httptools': some of it, so that what is counted next are headers, or the trailers of a body in chunks."""
        super().on_body(body)
        self._bare = 0

    def on_response_complete(self) -> None:
        """uvicorn's."""
        super().on_response_complete()
        self._wait()

    def _wait(self) -> None:
        if self._late:
            self._late.cancel()
        self._late = self.loop.call_later(self.seconds, self._silent)

    def _silent(self) -> None:
        if self.cycle is None or self.cycle.response_complete:  # else a request is being answered
            self.transport.close()


def load(checkpoint: Path, limits: Limits, reference: Path | None = None, threads: int = 1, **more: Any) -> Service:
    """A service from files; `more` as `Service` has it.

    Raises:
        CheckpointError, DriftError: a file is missing, damaged, or made with another checkpoint.
    """
    seeding.set_threads(threads)
    predictor = Predictor(checkpoint)
    known = Reference.load(reference, predictor.model) if reference else None
    return Service(predictor, limits, known, threads=threads, **more)


def run(service: Service, host: str, port: int, token: str | None) -> None:
    """Serve until told to stop.

    Raises:
        ConfigError: nobody can listen at that address.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < 2 * CONNECTIONS:  # -1 is no limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard % 2**64, 2 * CONNECTIONS), hard))
    Patient.seconds = service.limits.seconds
    config = uvicorn.Config(
        build(service, token), host, port, http=Patient, ws="none", access_log=False, log_level="error",
        server_header=False, proxy_headers=False, limit_concurrency=CONNECTIONS, backlog=CONNECTIONS,
        timeout_keep_alive=15, timeout_graceful_shutdown=LEAVING,
    )  # fmt: skip
    try:
        socket = config.bind_socket()
        socket.listen(CONNECTIONS)  # what comes before uvicorn runs waits
    except (OSError, SystemExit):  # uvicorn has said what the system said
        raise ConfigError(f"{host}:{port}: cannot listen there; choose another --port, or end what uses it") from None
    gc.collect()
    gc.freeze()  # 500,000 objects that stay: uncounted, so that requests' cycles are looked for every second
    one = uvicorn.Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, one.handle_exit)  # heeded before it runs too; what it raises again afterwards is not
    print(f"http://{host}:{socket.getsockname()[1]} answers for {service.about['run']}")
    one.run([socket])


def read_token(file: Path | None, variable: str | None) -> str | None:
    """The token in a file, else that of the environment; None where neither is given.

    Raises:
        ConfigError: empty, short, or not plain characters.
    """
    if not file and variable is None:
        return None
    try:
        token = file.read_text(encoding="utf-8").strip() if file else str(variable)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); give a file that holds the token") from None
    if not re.fullmatch(r"[!-~]{16,}", token):
        where = file or "PCAM_TOKEN"
        raise ConfigError(f"{where}: a token is at least 16 letters or digits; `openssl rand -hex 16` makes one")
    return token


def check_host(host: str, token: str | None) -> None:
    """Raises ConfigError where others could reach a service without a token."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not token:
        raise ConfigError(f"--host {host}: others could reach it; give --token-file or PCAM_TOKEN, or leave 127.0.0.1")
