"""The service as a process: slow and greedy clients, clients that leave, when it answers first, and leaving."""

from __future__ import annotations

import gc
import io
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import numpy as np
import pytest
import uvicorn
from PIL import Image

from pcamlib.errors import ConfigError
from pcamlib.serving import api, server
from pcamlib.serving.service import Service


@pytest.fixture
def listening(make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Service]]:
    """A server in a thread, half a second of patience: its port and service."""
    work = make_service(seconds=0.5)
    monkeypatch.setattr(server.Patient, "seconds", 0.5)
    config = uvicorn.Config(api.build(work), port=0, http=server.Patient, ws="none", log_level="error")
    one = uvicorn.Server(config)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=one.run, args=([bound],))
        thread.start()
        while not one.started:
            time.sleep(0.01)
        yield bound.getsockname()[1], work
        one.should_exit = True
        thread.join()


GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=a\r\n"


def image() -> list[tuple[str, tuple[str, bytes]]]:
    out = io.BytesIO()
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(out, "PNG")
    return [("image", ("0.png", out.getvalue()))]


def until_closed(client: socket.socket) -> bytes:
    found = b""
    while part := client.recv(4096):
        found += part
    return found


def test_a_slow_body_is_given_up_with_a_408(listening):
    with socket.create_connection(("127.0.0.1", listening[0]), 10) as client:
        client.sendall(HEAD + b"Content-Length: 1000\r\n\r\n--a")
        said = until_closed(client)
    assert said.startswith(b"HTTP/1.1 408") and b"the body took over 0.5 s" in said


@pytest.mark.parametrize("before", [b"", GET + b"\r\n"], ids=["the first", "a later one"])
@pytest.mark.parametrize("sent", [HEAD, b"GET /", b""], ids=["some headers", "a part of a line", "silence"])
def test_slow_headers_are_given_up(listening, before, sent):
    with socket.create_connection(("127.0.0.1", listening[0]), 3) as client:
        client.sendall(before)
        assert not before or client.recv(4096).startswith(b"HTTP/1.1 200")
        client.sendall(sent)
        assert until_closed(client) == b""


@pytest.mark.parametrize(
    ("sent", "drop"),
    [(GET + b"\r\n", b"\r\n"), (b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n", b"x")],
    ids=["empty lines", "a body that nobody reads"],
)
def test_drops_after_the_answer_keep_no_connection(listening, sent, drop):
    with socket.create_connection(("127.0.0.1", listening[0]), 10) as client:
        client.sendall(sent)
        assert client.recv(4096).startswith(b"HTTP/1.1 ")
        with pytest.raises(ConnectionError):
            for _ in range(50):
                time.sleep(0.1)
                client.sendall(drop)


@pytest.mark.parametrize(
    "sent",
    [GET, GET + b"\r\n" + GET, HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n-\r\n0\r\n", GET + b"one: "],
    ids=["the first", "a later request", "trailers", "one line"],
)
def test_headers_without_end_are_cut_off(listening, sent, monkeypatch):
    monkeypatch.setattr(server.Patient, "seconds", 60)
    lines = (b"x" if sent.endswith(b": ") else b"name: " + 1000 * b"y" + b"\r\n") * 1000
    with socket.create_connection(("127.0.0.1", listening[0]), 10) as client:
        client.sendall(sent)
        with pytest.raises(ConnectionError):
            for _ in range(30 * 10**6 // len(lines)):  # the system's buffers take up to 10 MB
                client.sendall(lines)


def test_long_bodies_and_many_requests_at_once_are_answered(listening):
    url = f"http://127.0.0.1:{listening[0]}/predict"
    with httpx2.Client(timeout=20) as client:
        for _ in range(2):  # over one connection
            assert client.post(url, files=image(), data={"note": 10**6 * "x"}).status_code == 200
    with socket.create_connection(("127.0.0.1", listening[0]), 10) as plain:
        plain.sendall((GET + b"\r\n") * 2000 + GET + b"Connection: close\r\n\r\n")  # 84 kB
        assert until_closed(plain).count(b"HTTP/1.1 200") == 2001


def test_clients_that_leave_harm_nobody(listening):
    port, work = listening
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(HEAD + b"Content-Length: 1000\r\n\r\n--a")
    assert httpx2.post(f"http://127.0.0.1:{port}/predict", files=image(), timeout=20).status_code == 200
    given_up, left = time.monotonic() + 10, work.telemetry.requests.labels("/predict", "499")
    while left._value.get() < 20 and time.monotonic() < given_up:
        time.sleep(0.01)
    assert left._value.get() == 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_from_its_first_line_it_takes_connections_and_heeds_signals(make_service, monkeypatch, number):
    async def lost(self: uvicorn.Server) -> None:
        pytest.fail("the signal was lost")

    def said(line: str) -> None:
        port = int(line.partition(" ")[0].rpartition(":")[2])
        clients.append(socket.create_connection(("127.0.0.1", port), 10))
        signal.raise_signal(number)

    clients: list[socket.socket] = []
    handlers = {one: signal.getsignal(one) for one in uvicorn.server.HANDLED_SIGNALS}
    monkeypatch.setattr(uvicorn.Server, "main_loop", lost)
    monkeypatch.setattr(server, "print", said, raising=False)
    monkeypatch.setattr(server.Patient, "seconds", None)  # put back afterwards
    try:
        server.run(make_service(), "127.0.0.1", 0, None)
        assert len(clients) == 1
    finally:
        gc.unfreeze()
        for one, handler in handlers.items():
            signal.signal(one, handler)
        for client in clients:
            client.close()


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [((1024, 4096), (4096, 4096)), ((1024, 10**6), (8192, 10**6)), ((1024, -1), (8192, -1)), ((-1, -1), None)],
)
def test_files_may_be_open_for_every_connection(make_service, monkeypatch, limits, wanted):
    found: list[Any] = [None]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: found.append(pair))
    monkeypatch.setattr(server.Patient, "seconds", None)
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ConfigError, match="cannot listen there"):
        server.run(make_service(), "127.0.0.1", other.getsockname()[1], None)
    assert found[-1] == wanted


@pytest.mark.slow  # a process of its own
def test_told_to_stop_it_answers_what_waits_and_leaves_with_0(checkpoint, tmp_path):
    code = (
        "import gc, sys, time; from pathlib import Path; from pcamlib.serving import server, service\n"
        "from pcamlib.serving.upload import Limits\n"
        "def engine(predictor, threads):\n"
        "    def slow(images): time.sleep(1); return predictor.probability(images)\n"
        "    return slow\n"
        "service.engine = engine\n"
        "work = server.load(Path(sys.argv[1]), Limits(batch=1), collect=Path(sys.argv[2]))\n"
        "server.run(work, '127.0.0.1', 0, None); print('left', gc.get_freeze_count() > 10**5)"
    )
    command = [sys.executable, "-c", code, str(checkpoint), str(tmp_path / "seen")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    address = process.stdout.readline().split(" ")[0]
    found: list[httpx2.Response] = []
    one = image()

    def ask() -> None:
        found.append(httpx2.post(f"{address}/predict", files=one, timeout=30))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    while "pcam_queue_patches 2" not in httpx2.get(f"{address}/metrics").text:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in found] == [200] * 3
    assert process.wait(30) == 0 and process.stdout.read() == "left True\n"
    assert len(np.load(next((tmp_path / "seen").glob("*.npz")))["probability"]) == 3
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{address}/health")
