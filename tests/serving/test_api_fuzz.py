"""Whatever is sent, the answer is one that the schema names, in JSON, and no 500.

A quick part of benchmarks/fuzz_api.py, which sends 10,000.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from pcamlib.serving import api
from pcamlib.serving.service import Service

#: The same cases in every run, few enough for seconds.
QUICK = settings(
    max_examples=120, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
CHECKS = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]
HERE = {"host": "localhost"}
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8))


def encoded(kind: str) -> bytes:
    out = io.BytesIO()
    IMAGE.save(out, kind)
    return out.getvalue()


SEEDS = [encoded(kind) for kind in ("PNG", "JPEG", "TIFF", "GIF")]
BODY = b'--a\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n\r\n' + SEEDS[1] + b"\r\n--a--"


@st.composite
def mutated(draw: Callable[[Any], Any], seeds: list[bytes]) -> bytes:
    """A seed with some bytes replaced, a piece cut out or doubled, most often near the start, where headers lie."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        most = draw(st.sampled_from([64, 512, len(data)]))
        at, length = draw(st.integers(0, min(most, len(data)))), draw(st.integers(0, 40))
        piece = draw(st.sampled_from(["replace", "cut", "double"]))
        new = {"replace": draw(st.binary(max_size=8)), "cut": b"", "double": data[at : at + length] * 2}[piece]
        data[at : at + (len(new) if piece == "replace" else length)] = new
    return bytes(data)


@pytest.fixture
def app(make_service: Callable[..., Service], reference: Any) -> Any:
    return api.build(make_service(reference=reference, seconds=5))


@pytest.fixture
def client(app: Any) -> Iterator[TestClient]:
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as one:
        yield one


def sane(said: Any, statuses: set[int]) -> None:
    assert said.status_code in statuses and said.headers["content-type"] == "application/json", said.text
    assert said.status_code in (200, 207) or "\n" not in said.json()["error"]
    assert "Traceback" not in said.text and 'File "' not in said.text


def test_mutated_images(client):
    @QUICK
    @given(mutated(SEEDS))
    def check(data: bytes) -> None:
        sane(client.post("/predict", files=[("image", ("x", data))]), {200, 413, 415, 422})

    check()


def test_mutated_bodies_and_content_types(client):
    @QUICK
    @given(
        mutated([BODY]),
        st.sampled_from(["a", "a", "a", "", '"a"', "b", "a; charset=x"]),
        st.sampled_from(["/predict", "/drift"]),
    )
    def check(body: bytes, boundary: str, path: str) -> None:
        headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
        sane(client.post(path, content=body, headers=headers), {200, 207, 400, 413, 415, 422})

    check()


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize(("path", "method"), [("/predict", "POST"), ("/drift", "POST"), ("/health", "GET")])
def test_every_answer_is_one_that_the_schema_names(app, mode, path, method):
    operation = schemathesis.openapi.from_asgi("/openapi.json", app, headers=HERE)[path][method]
    if mode == GenerationMode.NEGATIVE and not (operation.query or operation.body):
        pytest.skip("takes nothing that could be wrong")

    @settings(QUICK, max_examples=40)
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        said = case.call_and_validate(checks=CHECKS, headers=HERE)
        assert said.status_code != 500 and "Traceback" not in said.text

    check()
