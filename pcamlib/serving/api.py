"""The service: patches in, probabilities out, over HTTP.

    pcam serve --checkpoint best.safetensors --reference reference.npz
    curl -F image=@a.png -F image=@b.png http://127.0.0.1:8000/predict

Every answer is JSON, but for plain text before any route: 400 to what is no HTTP, 503 where 4096 connections are open.
An error is `{"error": one line}`, never a trace. Of several images some may be bad: 207 then has an `error` for these
and an answer for the others, and only where none could be judged is the status that of the first.
Nothing here fetches from another host: `/docs` is a page of ours, as FastAPI's loads its scripts from one.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pcamlib.errors import PcamError
from pcamlib.serving.service import GRID, HEATED, Outcome, Service
from pcamlib.serving.upload import FIELD, Reader, Refusal

PAGES = {"/": "page.html", "/docs": "docs.html"}
OPEN = (*PAGES, "/health", "/openapi.json")  # without a token too: nothing in them is anybody's
PATHS = (*OPEN, "/predict", "/drift", "/metrics")
WATCH = 60  # seconds between two comparisons of the newest patches with the reference
_HOSTS = re.compile(rb"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?")
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]
_TEXTS = {
    400: "No multipart body, or not asked for by a name of this machine", 401: "No token, or a wrong one",
    403: "Sent by a page of another site", 408: "The body took too long", 409: "The service has no reference",
    413: "Too many bytes, images or pixels", 415: "Not multipart, or no image that is read",
    422: "A field is missing or wrong, an image broken, or too few", 503: "Too much waits; see Retry-After",
}  # fmt: skip


class Problem(BaseModel):
    """What was wrong and what to do."""

    error: str


class About(BaseModel):
    """The checkpoint that answers."""

    run: str
    commit: str | None
    synthetic: bool = Field(description="it was trained on synthetic patches")


class Result(BaseModel):
    """One image: `error`, or everything else."""

    file: str
    error: str | None
    probability: float | None = Field(description="of tumour, as the network gives it")
    confidence: float | None = Field(description="of tumour, calibrated on the validation split")
    tumour: bool | None = Field(description="probability >= threshold")
    outlying: bool | None = Field(description="unlike the reference's patches; null without a reference")
    heat: list[list[float]] | None = Field(
        description=f"{GRID} x {GRID} squares, row by row: by how much the logit of tumour falls when one is hidden"
    )


class Prediction(About):
    """The images in the order in which they came."""

    threshold: float
    error: str | None = Field(description="where no image could be judged, why not the first")
    results: list[Result]


class Health(About):
    """`ok`, `degraded` (answers, but see `problems`), or `down` with status 503."""

    status: str
    problems: list[str]


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(value), status, headers, "application/json")


def _responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem, "description": _TEXTS[status]} for status in statuses}


def _body(required: bool) -> dict[str, Any]:
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    files = {FIELD: {"type": "array", "minItems": 1, "items": file}}
    schema = {"type": "object", "required": [FIELD], "properties": files}
    return {"requestBody": {"required": required, "content": {"multipart/form-data": {"schema": schema}}}}


class Gate:
    """What every request passes: may it be asked, headers that browsers heed, count and clock.

    Without a token the service listens to this machine only; then a page of another site, which a browser on this
    machine has open, is kept out by its `Host` and `Sec-Fetch-Site`.
    """

    def __init__(self, app: ASGIApp, service: Service, token: str | None) -> None:
        self.app, self._counts, self._token = app, service.telemetry, token and token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        try:
            await (self._refused(scope["path"], dict(scope["headers"])) or self.app)(scope, receive, sending)
        except ClientDisconnect:
            status = 499  # as nginx has it: the client left first
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self._counts.requests.labels(path, str(status)).inc()
            self._counts.latency.labels(path).observe(time.perf_counter() - began)

    def _refused(self, path: str, headers: dict[bytes, bytes]) -> Response | None:
        if not self._token:
            if not _HOSTS.fullmatch(headers.get(b"host", b"")):
                return _json({"error": "ask for localhost or 127.0.0.1; other names need a service with a token"}, 400)
            if headers.get(b"sec-fetch-site") == b"cross-site":
                return _json({"error": "sent by a page of another site"}, 403)
        elif path not in OPEN:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(given.strip(), self._token) or kind.lower() != b"bearer":
                error = {"error": "send the token: Authorization: Bearer TOKEN"}
                return _json(error, 401, {"WWW-Authenticate": "Bearer"})
        return None


def problem(request: Request, error: Exception) -> Response:
    """An error as one line."""
    if isinstance(error, PcamError):
        return _json({"error": str(error)}, getattr(error, "status", 422), dict(getattr(error, "headers", {})))
    if isinstance(error, HTTPException):
        return _json({"error": error.detail}, error.status_code, dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return _json({"error": f"{first['loc'][-1]}: {first['msg']}"}, 422)
    return _json({"error": "a bug of ours; the service's log has it"}, 500)


def build(service: Service, token: str | None = None) -> FastAPI:
    """The application of a service; its end is the service's."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(service.watch(WATCH))
        yield
        watching.cancel()
        await asyncio.to_thread(service.close)

    about = (__doc__ or "").split("\n\n")[2]
    app = FastAPI(title="PCam patches", description=about, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, service=service, token=token)
    for kind in (PcamError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, problem)
    reader, chosen = Reader(service.limits), service.predictor.decision
    shut = (401,) if token else (400, 403)
    errors = _responses(400, *shut, 408, 413, 415, 422, 503)
    partly: dict[int | str, dict[str, Any]] = {207: {"model": Prediction, "description": "Some images were judged"}}

    @app.post("/predict", response_model=Prediction, responses=errors | partly, openapi_extra=_body(True))
    async def predict(
        request: Request,
        threshold: Annotated[float, Query(ge=0, le=1)] = chosen.threshold if chosen else 0.5,
        heat: Annotated[bool, Query(description=f"for at most {HEATED} images")] = False,
    ) -> Response:
        """Judge one or more patches of 96 x 96 pixels, PNG, JPEG or TIFF."""
        uploads = await reader.read(request)
        if heat and len(uploads) > HEATED:
            raise Refusal(422, f"heat is drawn for at most {HEATED} images a request, not {len(uploads)}")
        return _answer(service, [upload.name for upload in uploads], await service.predict(uploads, heat), threshold)

    @app.post("/drift", responses=errors | _responses(409), openapi_extra=_body(False))
    async def drift(request: Request) -> Response:
        """Compare the images sent, or without any the newest patches that were judged, with the reference."""
        uploads = await reader.read(request) if "content-type" in request.headers else None
        return _json(await asyncio.to_thread(service.drift, uploads))

    @app.get("/health", response_model=Health, responses={503: {"model": Health, "description": "Down"}})
    async def health() -> Response:
        """Whether the service answers, and what is wrong with it."""
        status, problems = service.state
        return _json({**service.about, "status": status, "problems": problems}, 503 if status == "down" else 200)

    @app.get("/metrics", responses=_responses(*shut) | {200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """What Prometheus reads."""
        return Response(generate_latest(service.telemetry.registry), media_type=CONTENT_TYPE_LATEST)

    for path, name in PAGES.items():
        app.get(path, include_in_schema=False)(_page((Path(__file__).parent / name).read_text(encoding="utf-8")))
    return app


def _answer(service: Service, names: Sequence[str], outcomes: Sequence[Outcome], threshold: float) -> Response:
    """The JSON of a prediction: 200 all were judged, 207 some, else the status of the first error."""
    results: list[dict[str, Any]] = []
    for name, one in zip(names, outcomes, strict=True):
        row: dict[str, Any] = dict.fromkeys(Result.model_fields) | {"file": name}
        if one.error:
            row["error"] = str(one.error)
        else:
            row |= {"probability": one.probability, "tumour": one.probability >= threshold, "outlying": one.outlying}
            row["confidence"] = float(service.predictor.calibrated(np.array(one.probability)))
            row["heat"] = None if one.heat is None else one.heat.round(4).tolist()
            service.telemetry.predictions.labels("tumour" if row["tumour"] else "normal").inc()
        results.append(row)
    errors = [one.error for one in outcomes if one.error]
    none = len(errors) == len(outcomes)
    status = errors[0].status if none else 207 if errors else 200
    answer = {**service.about, "threshold": threshold, "error": str(errors[0]) if none else None, "results": results}
    return _json(answer, status)


def _page(text: str) -> Any:
    """A route that sends a page whose own script and style, and nothing else, may run."""
    policy = "default-src 'none'; img-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'"
    policy += "; frame-ancestors 'none'"
    for tag, inside in re.findall(r"<(script|style)>(.*?)</", text, re.DOTALL):
        policy += f"; {tag}-src 'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}

    async def page() -> Response:
        return Response(text, 200, headers, "text/html")

    return page
