"""The download against a local server that breaks off, lies about length and serves wrong bytes."""

from __future__ import annotations

import builtins
import errno
import gzip
import hashlib
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pcamlib.data import fetch as module
from pcamlib.data.fetch import OFFICIAL, OfficialFile, fetch
from pcamlib.errors import DataError, PcamError

PLAIN = os.urandom(200_000)
PACKED = gzip.compress(PLAIN)
X, TABLE = "camelyonpatch_level_2_split_valid_x.h5.gz", "camelyonpatch_level_2_split_valid_meta.csv"
CSV = b"coord_y,coord_x,tumor_patch,center_tumor_patch,wsi\n" * 50
PAGE = b"\n<!DOCTYPE html><html><title>Virus scan warning</title></html>"


class Server:
    """What the next answers look like: `plan` is used up one entry a request, then the server serves right."""

    def __init__(self) -> None:
        self.files = {X: PACKED, TABLE: CSV}
        self.plan: list[dict[str, Any]] = []
        self.seen: list[tuple[str, str | None, int]] = []  # name, Range header, body bytes sent
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        how = self.plan.pop(0) if self.plan else {}
        name = handler.path.strip("/")
        body, asked = how.get("body", self.files.get(name, b"")), handler.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and not how.get("ignore_range") else 0
        status = how.get("status", 206 if start else 200)
        if start and start >= len(body):
            status, start = 416, len(body)
        sent = body[start:][: how.get("break_after")]
        self.seen.append((name, asked, len(sent)))
        handler.send_response(status)
        if how.get("length", True):
            handler.send_header("Content-Length", str(len(body) - start + how.get("lie", 0)))
        handler.send_header("Content-Type", how.get("type", "application/octet-stream"))
        if status == 206:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        handler.end_headers()
        handler.wfile.write(sent)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # clusters and companies export http_proxy

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_port}/{{name}}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def official(name: str, body: bytes, *, size: bool = True) -> OfficialFile:
    return OfficialFile(name, hashlib.md5(body).hexdigest(), len(body) if size else None)


FILES = (official(X, PACKED), official(TABLE, CSV, size=False))


@pytest.fixture
def get(server: Server, tmp_path: Path) -> Callable[..., list[Path]]:
    """`fetch` into `tmp_path` from the local server, with two further attempts that do not wait."""

    def call(*files: OfficialFile, **more: Any) -> list[Path]:
        settings = {"base_url": server.url, "report": lambda line: None, "backoff": (0, 0), **more}
        return fetch(tmp_path, files=files or FILES, **settings)

    return call


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {module.MEMO}


def test_the_official_list_is_whole() -> None:
    expected = {f"camelyonpatch_level_2_split_{split}_{kind}" for split in ("train", "valid", "test")
                for kind in ("x.h5.gz", "y.h5.gz", "meta.csv")}  # fmt: skip
    assert {file.name for file in OFFICIAL} == expected
    assert len({file.md5 for file in OFFICIAL}) == 9
    assert all(re.fullmatch(r"[0-9a-f]{32}", file.md5) for file in OFFICIAL)


def test_brings_verifies_and_unpacks(server: Server, get: Callable[..., list[Path]], tmp_path: Path) -> None:
    x, table = get()
    assert (x.name, table.name) == (X.removesuffix(".gz"), TABLE)
    assert x.read_bytes() == PLAIN and table.read_bytes() == CSV
    assert names(tmp_path) == {X, x.name, TABLE}
    get()
    assert len(server.seen) == 2  # nothing was asked for again


def test_without_unpacking(get: Callable[..., list[Path]], tmp_path: Path) -> None:
    assert [path.name for path in get(unpack=False)] == [X, TABLE] == sorted(names(tmp_path), reverse=True)


def test_a_verified_file_is_not_hashed_again(get: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    get()
    monkeypatch.setattr(module.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    get()


def test_the_archive_may_be_deleted_after_unpacking(server: Server, get: Callable[..., list[Path]]) -> None:
    x, _ = get()
    x.with_name(X).unlink()
    get()
    assert len(server.seen) == 2


def test_a_broken_download_goes_on_by_range(server: Server, get: Callable[..., list[Path]]) -> None:
    server.plan = [{"break_after": 70_000}, {"break_after": 50_000}]
    lines: list[str] = []
    assert get(FILES[0], report=lines.append)[0].read_bytes() == PLAIN
    assert [asked for _, asked, _ in server.seen] == [None, "bytes=70000-", "bytes=120000-"]
    assert sum(sent for *_, sent in server.seen) == len(PACKED)  # no byte came twice
    assert any("broke off after 70,000" in line for line in lines)


def test_a_broken_download_goes_on_in_the_next_call(
    server: Server, get: Callable[..., list[Path]], tmp_path: Path
) -> None:
    server.plan = [{"break_after": 70_000}, {"break_after": 0}, {"break_after": 0}]
    with pytest.raises(DataError, match=r"broke off after 70,000 of .* gave up after 3 attempts.* run again"):
        get(FILES[0])
    assert names(tmp_path) == {f"{X}.part"}
    get(FILES[0])
    assert server.seen[-1][1:] == ("bytes=70000-", len(PACKED) - 70_000)


def test_attempts_count_only_while_nothing_new_comes(server: Server, get: Callable[..., list[Path]]) -> None:
    server.plan = [{"break_after": 20_000}] * 8
    get(FILES[0])
    assert len(server.seen) == 9


def test_a_server_that_ignores_range_starts_over(server: Server, get: Callable[..., list[Path]]) -> None:
    server.plan = [{"break_after": 70_000}, {"ignore_range": True}]
    assert get(FILES[0])[0].read_bytes() == PLAIN
    assert server.seen[1][1:] == ("bytes=70000-", len(PACKED))


def test_a_server_without_range_that_always_breaks_is_given_up(server: Server, get: Callable[..., list[Path]]) -> None:
    server.plan = [{"break_after": 70_000 - 10_000 * (i % 2), "ignore_range": True} for i in range(20)]
    with pytest.raises(DataError, match="gave up"):
        get(FILES[0])


@pytest.mark.parametrize("lie", [-1000, 1000])
def test_a_wrong_length_is_refused_before_the_download(
    server: Server, get: Callable[..., list[Path]], tmp_path: Path, lie: int
) -> None:
    server.plan = [{"break_after": 70_000}, {"lie": lie}]
    with pytest.raises(DataError, match=rf"{X}: {len(PACKED) + lie:,} bytes announced, expected {len(PACKED):,}"):
        get(FILES[0])
    assert names(tmp_path) == set()
    get(FILES[0])
    assert server.seen[-1][1] is None  # started clean


@pytest.mark.parametrize(("lie", "message"), [(-100, "MD5 .* expected MD5"), (100, "broke off after .* gave up")])
def test_a_wrong_length_where_none_is_published(
    server: Server, get: Callable[..., list[Path]], tmp_path: Path, lie: int, message: str
) -> None:
    server.plan = [{"lie": lie, "ignore_range": True}] * 5
    with pytest.raises(DataError, match=message):
        get(FILES[1])
    server.plan = []
    assert get(FILES[1])[0].read_bytes() == CSV
    assert names(tmp_path) == {TABLE}


def test_no_length_announced(server: Server, get: Callable[..., list[Path]]) -> None:
    server.plan = [{"length": False, "break_after": 70_000}, {"length": False}]
    assert get()[0].read_bytes() == PLAIN
    assert server.seen[1][1] == "bytes=70000-"


def test_wrong_bytes_of_the_right_length(server: Server, get: Callable[..., list[Path]], tmp_path: Path) -> None:
    wrong = PACKED[:5000] + bytes(1000) + PACKED[6000:]
    server.plan = [{"body": wrong}]
    with pytest.raises(DataError, match=rf"{X}.*MD5 {hashlib.md5(wrong).hexdigest()}, expected MD5 {FILES[0].md5}"):
        get()
    assert names(tmp_path) == set()
    assert get()[0].read_bytes() == PLAIN


@pytest.mark.parametrize("how", [{"body": PAGE}, {"body": PAGE, "type": "text/html; charset=utf-8"}])
def test_a_web_page(server: Server, get: Callable[..., list[Path]], tmp_path: Path, how: dict[str, Any]) -> None:
    for file in FILES:
        server.plan = [how]
        with pytest.raises(DataError, match="web page") as error:
            get(file)
        assert "\n" not in str(error.value)
    assert names(tmp_path) == set()


def test_a_web_page_in_place_of_the_rest_keeps_what_came(server: Server, get: Callable[..., list[Path]]) -> None:
    server.plan = [{"break_after": 70_000}, {"body": PAGE, "type": "text/html", "ignore_range": True}]
    with pytest.raises(DataError, match="web page"):
        get(FILES[0])
    get(FILES[0])
    assert server.seen[-1][1] == "bytes=70000-"


def test_not_found_is_final(server: Server, get: Callable[..., list[Path]], tmp_path: Path) -> None:
    server.plan = [{"status": 404, "body": PAGE, "type": "text/html"}]
    with pytest.raises(DataError, match=rf"{X}: the server answers 404 Not Found; check the address"):
        get()
    assert len(server.seen) == 1 and names(tmp_path) == set()


def test_a_busy_server_is_asked_again(server: Server, get: Callable[..., list[Path]]) -> None:
    server.plan = [{"status": 503, "body": b""}, {"status": 429, "body": b""}]
    assert get()[0].read_bytes() == PLAIN


def test_a_server_that_stays_busy_is_given_up(server: Server, get: Callable[..., list[Path]]) -> None:
    server.plan = [{"status": 503, "body": b""}] * 3
    with pytest.raises(DataError, match="503 Service Unavailable; gave up after 3 attempts"):
        get()


def test_nobody_listens(get: Callable[..., list[Path]]) -> None:
    with pytest.raises(DataError, match="refused"):
        get(base_url="http://127.0.0.1:9/{name}")


def test_a_part_longer_than_the_file_starts_over(
    server: Server, get: Callable[..., list[Path]], tmp_path: Path
) -> None:
    (tmp_path / f"{X}.part").write_bytes(PACKED + b"more")
    assert get(FILES[0])[0].read_bytes() == PLAIN
    assert [sent for *_, sent in server.seen] == [0, len(PACKED)]


def test_a_complete_part_is_verified_without_asking(
    server: Server, get: Callable[..., list[Path]], tmp_path: Path
) -> None:
    (tmp_path / f"{X}.part").write_bytes(PACKED)
    get(FILES[0])
    assert server.seen == []


def test_files_that_lie_there_already(server: Server, get: Callable[..., list[Path]], tmp_path: Path) -> None:
    (tmp_path / X).write_bytes(PACKED)
    (tmp_path / TABLE).write_bytes(PAGE)
    with pytest.raises(DataError, match=rf"{TABLE}: is a web page, .*; delete or move it"):
        get()
    assert server.seen == []  # the right one was verified where it lies
    assert (tmp_path / TABLE).read_bytes() == PAGE  # and the wrong one, which may be precious, left alone


def test_a_foreign_h5_is_never_overwritten(server: Server, get: Callable[..., list[Path]], tmp_path: Path) -> None:
    foreign = tmp_path / X.removesuffix(".gz")
    foreign.write_bytes(b"the course's own file")
    with pytest.raises(DataError, match="not unpacked by this command"):
        get()
    assert foreign.read_bytes() == b"the course's own file" and server.seen == []


def test_a_full_disk_keeps_the_part(
    server: Server, get: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > 100_000:
                super().write(data[: 100_000 - self.tell()])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def small(path: Path, mode: str) -> Any:
        return Full(path, mode) if mode in ("ab", "wb") else builtins.open(path, mode)

    monkeypatch.setattr(module, "open", small, raising=False)
    with pytest.raises(DataError, match=r"\.part: No space left on device; .*what came is kept"):
        get(FILES[0])
    monkeypatch.undo()
    assert (tmp_path / f"{X}.part").read_bytes() == PACKED[:100_000]
    assert get(FILES[0])[0].read_bytes() == PLAIN
    assert server.seen[-1][1] == "bytes=100000-"


def test_a_full_disk_while_unpacking(
    get: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.shutil, "copyfileobj", full)
    with pytest.raises(PcamError, match="the disk is full"):
        get(FILES[0])
    assert names(tmp_path) == {X}


def test_a_folder_that_cannot_be(get: Callable[..., list[Path]], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: cannot be made"):
        fetch(tmp_path / "file", base_url="http://127.0.0.1:9/{name}")


def test_progress_is_said(server: Server, get: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRESS_SECONDS", 1e-9)
    monkeypatch.setattr(module, "BLOCK", 1 << 15)
    lines: list[str] = []
    get(report=lines.append)
    assert any(re.fullmatch(rf"{X}: 0\.[12] of 0\.2 MB, \d+%, \d+\.\d MB/s", line) for line in lines), lines
    assert f"{X}: checking MD5" in lines and f"{X.removesuffix('.gz')}: unpacking" in lines
