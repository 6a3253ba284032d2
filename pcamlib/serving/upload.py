"""The files of a multipart/form-data request, within limits that are kept while the bytes come in.

    uploads = await Reader(Limits()).read(request)

Written by hand: cutting the body at its boundary is one pass in C with a bounded number of parts, where a push parser
calls back six times a part, which a body of a million empty parts turns into seconds of an event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import NamedTuple

from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from pcamlib.config import Strict
from pcamlib.errors import PcamError

FIELD = "image"
_OTHERS = 16  # parts of other names that a form may have
_HEAD = 4_096  # bytes: the longest name takes 1 kB; 4 MB of semicolons took 2.5 s of the event loop


class Limits(Strict):
    """What one service takes on.

    Attributes:
        bytes: of a request's body.
        files: images a request.
        pixels: of an image, told from its header.
        seconds: for a body to arrive.
        flight: bytes of all bodies that are arriving, and again of all images that wait for their answer.
        batch: patches that are answered together.
        room: patches that may wait.
        patience: seconds that they may be expected to wait.
    """

    bytes: int = 4 << 20
    files: int = 64
    pixels: int = 1 << 16
    seconds: float = 20
    flight: int = 256 << 20
    batch: int = 64
    room: int = 512
    patience: float = 1


class Refusal(PcamError):
    """A request that is not taken on.

    Attributes:
        status: of HTTP.
        headers: to be sent along.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] = {}) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class Upload(NamedTuple):
    """One file of a request."""

    name: str
    data: bytes


class Reader:
    """Reads bodies; all that are arriving share `limits.flight` bytes."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self._held = limits, 0

    async def read(self, request: Request) -> list[Upload]:
        """The parts called `image`.

        Raises:
            Refusal: 400 no multipart body, 408 too slow, 413 too much, 415 another content type, 422 no image,
                503 too many bodies at once.
            ClientDisconnect: the client has left.
        """
        kind, options = _options(request.headers.get("content-type", ""))
        if kind != b"multipart/form-data":
            raise Refusal(415, f"send multipart/form-data with one or more files called '{FIELD}'")
        return split(await self._body(request), options.get(b"boundary", b""), self.limits.files)

    async def _body(self, request: Request) -> bytes:
        length, most, body = request.headers.get("content-length", "0"), self.limits.bytes, bytearray()
        large = Refusal(413, f"more than {most:,} bytes; send fewer or smaller images a request")
        if not length.isdecimal() or len(length) > 18 or int(length) > most:
            raise large
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for chunk in request.stream():
                    body += chunk
                    self._held += len(chunk)
                    if len(body) > most:
                        raise large
                    if self._held > self.limits.flight:
                        raise Refusal(503, "too many requests arrive at once; ask again soon", {"Retry-After": "2"})
        except TimeoutError:
            message = f"the body took over {self.limits.seconds:g} s; send less, or over a faster line"
            raise Refusal(408, message, {"Connection": "close"}) from None
        finally:
            self._held -= len(body)
        return bytes(body)


def _options(header: str | bytes) -> tuple[bytes, dict[bytes, bytes]]:
    if len(header) > _HEAD:
        raise Refusal(400, f"a header of over {_HEAD:,} bytes; give the file a shorter name")
    return parse_options_header(header)


def split(body: bytes, boundary: bytes, most: int) -> list[Upload]:
    """The files called `image` of a multipart body, at most `most`; errors as `Reader.read`."""
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary, most + _OTHERS + 2)
    ends = next((at for at, part in enumerate(parts) if at and part.startswith(b"--")), None)
    if not 0 < len(boundary) <= 70 or (ends is None and len(parts) < most + _OTHERS + 3):
        raise Refusal(400, "not a whole multipart body with the boundary that its content type names")
    uploads: list[Upload] = []
    for part in parts[1:ends]:
        head, gap, data = part.lstrip(b" \t").partition(b"\r\n\r\n")
        if not head.startswith(b"\r\n") or not gap:
            raise Refusal(400, "a part of the multipart body has no headers")
        lines = (line.partition(b":") for line in head.split(b"\r\n", 16))
        said = next((value.strip() for name, _, value in lines if name.lower() == b"content-disposition"), b"")
        _, options = _options(said)
        if options.get(b"name") == FIELD.encode():
            name = options.get(b"filename", b"").decode(errors="replace")[-100:]
            name = "".join(one if one.isprintable() else "\ufffd" for one in name)  # it is told: no escapes, one line
            uploads.append(Upload(name or f"{FIELD} {len(uploads) + 1}", data))
    if ends is None or len(uploads) > most:
        raise Refusal(413, f"more than {most} images; send them in several requests")
    if not uploads:
        raise Refusal(422, f"no file is called '{FIELD}'; send one or more")
    return uploads
