"""The service over HTTP: what it answers, whom it lets in, what it refuses and how, and that it stays up."""

from __future__ import annotations

import asyncio
import gc
import io
import re
import struct
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from pcamlib.data.patches import open_split
from pcamlib.errors import CheckpointError, ConfigError
from pcamlib.serving import api, collect, server, service
from pcamlib.serving.predict import Predictor
from pcamlib.serving.service import Service
from pcamlib.serving.upload import Refusal, Upload, split

TOKEN = "0123456789abcdef"
HERE = "http://127.0.0.1:8000"
Files = list[tuple[str, tuple[str, bytes]]]


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def files(*data: bytes) -> Files:
    return [("image", (f"{number}.png", one)) for number, one in enumerate(data)]


@pytest.fixture(scope="session")
def patches(synthetic_dir: Path) -> np.ndarray:
    """40 patches of the test split."""
    return np.array(open_split(synthetic_dir, "test").images[:40])


@pytest.fixture
def serve(make_service: Callable[..., Service]) -> Iterator[Callable[..., TestClient]]:
    """`serve(token=, **options of make_service)`: a client of a service that has been started."""
    open_clients: list[TestClient] = []

    def start(token: str | None = None, **options: Any) -> TestClient:
        app = api.build(make_service(**options), token)
        client = TestClient(app, base_url=HERE, raise_server_exceptions=False)
        client.__enter__()
        open_clients.append(client)
        return client

    yield start
    for client in open_clients:
        client.__exit__(None, None, None)


def counted(client: TestClient) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in lines}


# Answers


def test_answers_are_those_of_the_predictor(serve, checkpoint, patches):
    client = serve()
    said = client.post("/predict", files=files(*map(encoded, patches)))
    expected = Predictor(checkpoint).answer(patches)
    assert said.status_code == 200 and said.headers["content-type"] == "application/json"
    body = said.json()
    assert body["threshold"] == expected.threshold and body["synthetic"] is True and body["error"] is None
    for name, wanted in (("probability", expected.probability), ("confidence", expected.confidence)):
        np.testing.assert_allclose([one[name] for one in body["results"]], wanted, atol=1e-5)
    assert [one["tumour"] for one in body["results"]] == expected.tumour.tolist()
    assert [one["file"] for one in body["results"]] == [f"{n}.png" for n in range(40)]
    assert all(one["error"] is one["heat"] is one["outlying"] is None for one in body["results"])


@pytest.mark.slow  # the export of the network
def test_the_network_that_is_served_answers_as_the_checkpoint(checkpoint, patches):
    predictor = Predictor(checkpoint)
    run = service.engine(predictor, threads=1)
    for count in (1, 7, 40):
        assert np.abs(run(patches[:count]) - predictor.probability(patches[:count])).max() < 1e-5
    predictor.probability = lambda images: np.full(len(images), 0.5)  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="as ONNX its probabilities differ"):
        service.engine(predictor, threads=1)


def test_another_threshold_changes_the_call_only(serve, patches):
    client = serve()
    low, high = (client.post(f"/predict?threshold={cut}", files=files(encoded(patches[0]))).json() for cut in (0, 1))
    assert (low["results"][0]["tumour"], high["results"][0]["tumour"]) == (True, False)
    assert low["results"][0]["probability"] == high["results"][0]["probability"] and high["threshold"] == 1


def test_heat_is_what_hiding_a_square_takes_away(serve, checkpoint, patches):
    client = serve()
    heat = np.array(client.post("/predict?heat=true", files=files(encoded(patches[0]))).json()["results"][0]["heat"])
    hidden = patches[0].copy()
    hidden[24:36, 60:72] = hidden.mean((0, 1)).round()
    p, q = Predictor(checkpoint).probability(np.stack([patches[0], hidden]))
    assert heat.shape == (8, 8) and heat[2, 5] == pytest.approx(np.log(p / (1 - p)) - np.log(q / (1 - q)), abs=1e-3)
    refused = client.post("/predict?heat=true", files=files(*map(encoded, patches[:5])))
    assert refused.status_code == 422 and "at most 4 images" in refused.json()["error"]


def test_one_bad_image_spoils_no_other(serve, patches):
    client = serve()
    said = client.post("/predict", files=files(encoded(patches[0]), b"no image", encoded(patches[1])))
    assert said.status_code == 207
    errors = [one["error"] for one in said.json()["results"]]
    assert errors[0] is errors[2] is None and "1.png: no PNG, JPEG or TIFF" in errors[1]
    assert said.json()["results"][1]["probability"] is None and said.json()["error"] is None
    assert counted(client)['pcam_image_errors_total{status="415"}'] == 1


def huge_png() -> bytes:
    """A PNG whose header claims 1e9 pixels."""
    head = struct.pack(">IIBBBBB", 50_000, 20_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    return b"\x89PNG\r\n\x1a\n" + chunk + encoded(np.zeros((96, 96, 3), np.uint8))[33:]


RNG = np.random.default_rng(0)
COLOUR = Image.fromarray(RNG.integers(0, 256, (96, 96, 3)).astype(np.uint8))
WHOLE = encoded(COLOUR, "JPEG")
BAD: dict[str, tuple[bytes, int]] = {
    "16 bits": (encoded(Image.fromarray(RNG.integers(0, 65536, (96, 96)).astype(np.uint16))), 415),
    "transparent": (encoded(np.dstack([np.array(COLOUR), np.full((96, 96), 9, np.uint8)])), 415),
    "CMYK": (encoded(COLOUR.convert("CMYK"), "JPEG"), 415),
    "animated GIF": (encoded(COLOUR, "GIF", save_all=True, append_images=[COLOUR.rotate(90)]), 415),
    "zero bytes": (b"", 422),
    "cut off": (WHOLE[: len(WHOLE) // 2], 422),
    "1e9 pixels": (huge_png(), 413),
    "another size": (encoded(COLOUR.resize((95, 96))), 422),
    "larger than a patch": (encoded(COLOUR.resize((300, 300))), 413),
    "no image": (b"<html>", 415),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_image_has_its_own_status_and_one_line(serve, what):
    data, status = BAD[what]
    said = serve().post("/predict", files=files(data))
    assert said.status_code == status
    assert said.json()["error"].startswith("0.png: ") and "\n" not in said.json()["error"]
    assert said.json()["error"] == said.json()["results"][0]["error"]


def test_what_converts_without_loss_is_answered(serve):
    palette, opaque = COLOUR.quantize(256), COLOUR.convert("RGBA")
    said = serve().post(
        "/predict", files=files(encoded(palette), encoded(opaque), encoded(COLOUR), encoded(COLOUR, "TIFF"))
    )
    results = said.json()["results"]
    assert said.status_code == 200 and len({one["probability"] for one in results[1:]}) == 1


# Requests


@pytest.mark.parametrize(
    ("content", "kind", "status", "told"),
    [
        (b"{}", "application/json", 415, "send multipart/form-data"),
        (b"x", None, 415, "send multipart/form-data"),
        (b"", "multipart/form-data", 400, "not a whole multipart body"),
        (b"nonsense", "multipart/form-data; boundary=a", 400, "not a whole multipart body"),
        (b"--a\r\n\r\n", "multipart/form-data; boundary=a", 400, "not a whole multipart body"),
        (b"--a\r\nx\r\n--a--", "multipart/form-data; boundary=a", 400, "has no headers"),
        (b"--a--", "multipart/form-data; boundary=a", 422, "no file is called 'image'"),
        (b'--a\r\nContent-Disposition: form-data; name="picture"\r\n\r\nx\r\n--a--', "multipart/form-data; boundary=a",
         422, "no file is called 'image'"),
    ],
)  # fmt: skip
def test_a_request_that_is_none_is_told_what_to_send(serve, content, kind, status, told):
    headers = {"content-type": kind} if kind else {}
    said = serve().post("/predict", content=content, headers=headers)
    assert said.status_code == status and told in said.json()["error"] and "\n" not in said.json()["error"]


def test_a_form_is_split_as_it_was_put_together():
    body = (
        b'--a\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n'
        b'--a \r\ncontent-type: image/png\r\nContent-disposition: form-data; name="image"; filename="x.png"\r\n\r\n'
        b"\r\n-- a\r\n\r\n--b\r\n"
        b'--a\r\nContent-Disposition: form-data; name="image"\r\n\r\n\r\n--a--\r\nepilogue'
    )
    assert [tuple(one) for one in split(body, b"a", 2)] == [("x.png", b"\r\n-- a\r\n\r\n--b"), ("image 2", b"")]
    with pytest.raises(Refusal, match="more than 1 images"):
        split(body, b"a", 1)


def test_long_heads_are_refused_before_they_are_parsed(serve):
    said = b'--a\r\nContent-Disposition: form-data; name="image"; filename="x"%s\r\n\r\nx\r\n--a--'
    assert split(said % (b";" * 4_000), b"a", 1)[0].name == "x"
    with pytest.raises(Refusal, match="over 4,096 bytes") as caught:
        split(said % (b";" * 4_100), b"a", 1)
    assert caught.value.status == 400
    headers = {"content-type": "multipart/form-data; boundary=a" + ";" * 4_100}
    told = serve().post("/predict", content=said % b"", headers=headers)
    assert told.status_code == 400 and "over 4,096 bytes" in told.json()["error"]


def test_a_name_cannot_steer_a_terminal():
    body = '--a\r\nContent-Disposition: form-data; name="image"; filename="é a\n\x1b[31m\u202e.png"\r\n\r\nx\r\n--a--'
    assert split(body.encode(), b"a", 1)[0].name == "é a\ufffd\ufffd[31m\ufffd.png"


def test_ten_thousand_files_are_too_many(serve):
    part = b'--a\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\nx\r\n'
    headers = {"content-type": "multipart/form-data; boundary=a"}
    said = serve().post("/predict", content=10_000 * part + b"--a--", headers=headers)
    assert said.status_code == 413 and "more than 64 images" in said.json()["error"]


def test_too_many_bytes_are_refused_while_they_come(serve):
    client, sent = serve(bytes=10_000), []
    said = client.post("/predict", files=files(bytes(20_000)))
    assert said.status_code == 413 and "more than 10,000 bytes" in said.json()["error"]

    async def stream() -> dict:
        async def receive() -> dict:
            sent.append(1)
            return {"type": "http.request", "body": bytes(1_000), "more_body": True}

        async def send(message: dict) -> None:
            answers.append(message)

        answers: list[dict] = []
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"multipart/form-data; boundary=a")]
        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": headers}
        await client.app(scope, receive, send)
        return answers[0]

    assert asyncio.run(stream())["status"] == 413 and len(sent) == 11  # and not one more


def test_bodies_that_arrive_share_their_memory(serve, patches):
    said = serve(flight=5_000).post("/predict", files=files(*map(encoded, patches[:3])))
    assert said.status_code == 503 and said.headers["retry-after"] == "2"


@pytest.mark.parametrize("query", ["threshold=2", "threshold=x", "threshold=nan", "heat=perhaps"])
def test_a_wrong_parameter_is_named(serve, patches, query):
    said = serve().post(f"/predict?{query}", files=files(encoded(patches[0])))
    assert said.status_code == 422 and said.json()["error"].startswith(query.split("=")[0])


def test_a_full_queue_says_when_to_come_back(serve, make_service, patches):
    client = serve(room=1, batch=1)
    work = client.app.user_middleware[0].kwargs["service"]
    gate, entered, answer = threading.Event(), threading.Event(), work._batcher._answer

    def wait(jobs: Any) -> Any:
        entered.set()
        assert gate.wait(10)
        return answer(jobs)

    work._batcher._answer = wait
    found: list[httpx2.Response] = []
    one = files(encoded(patches[0]))
    threads = [threading.Thread(target=lambda: found.append(client.post("/predict", files=one))) for _ in range(2)]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    while not work._batcher.waiting:
        time.sleep(0.01)
    refused = client.post("/predict", files=one)
    gate.set()
    for thread in threads:
        thread.join()
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    assert [one.status_code for one in found] == [200, 200]
    assert counted(client)["pcam_queue_full_total"] == 1


def test_bytes_that_wait_are_bounded(make_service, patches):
    data = encoded(patches[0])
    work, gate = make_service(flight=2 * len(data)), threading.Event()
    answer = work._batcher._answer

    def wait(jobs: Any) -> Any:
        assert gate.wait(2)
        return answer(jobs)

    work._batcher._answer = wait

    async def go() -> list[Any]:
        waiting = [asyncio.create_task(work.predict([Upload(name, data)])) for name in "abc"]
        with pytest.raises(Refusal, match="more images wait") as caught:
            await waiting.pop()
        assert caught.value.status == 503 and caught.value.headers["Retry-After"] == "1"
        gate.set()
        found = [await one for one in waiting]
        return [*found, await work.predict([Upload("d", data)])]  # there is room again

    assert [one.error for (one,) in asyncio.run(go())] == [None] * 3
    assert work.telemetry.full._value.get() == 1


def test_what_was_refused_is_let_go_at_once(make_service, patches):
    class Name(str):
        """One that can be watched."""

    names = [Name("bad.png"), Name("cut.png"), Name("good.png")]
    watched = [weakref.ref(name) for name in names]
    whole = encoded(patches[0])
    uploads = [Upload(*pair) for pair in zip(names, (b"no image", whole[:-300], whole), strict=True)]
    gc.disable()
    try:
        outcomes = asyncio.run(make_service().predict(uploads))
        assert [outcome.error is None for outcome in outcomes] == [False, False, True]
        del uploads, names, outcomes
        until = time.monotonic() + 10  # the worker may still be on its way out
        while any(name() for name in watched) and time.monotonic() < until:
            time.sleep(0.01)
        assert [name() for name in watched] == [None] * 3, "held until somebody collects the cycle"
    finally:
        gc.enable()


def test_a_bug_of_ours_shows_no_trace(serve, patches):
    client = serve()
    client.app.user_middleware[0].kwargs["service"]._batcher._answer = lambda jobs: 1 / 0
    said = client.post("/predict", files=files(encoded(patches[0])))
    assert said.status_code == 500 and said.json() == {"error": "a bug of ours; the service's log has it"}
    assert counted(client)['pcam_requests_total{path="/predict",status="500"}'] == 1


# Who is let in


@pytest.mark.parametrize(
    "given", [None, "Bearer wrong-wrong-wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer", "Bearer " + 16 * "\xff"]
)
def test_without_the_token_nothing_is_answered(serve, patches, given):
    client, headers = serve(token=TOKEN), {"authorization": given.encode("latin-1")} if given else {}
    for method, path in (("POST", "/predict"), ("POST", "/drift"), ("GET", "/metrics"), ("GET", "/other")):
        said = client.request(method, path, headers=headers)
        assert (said.status_code, said.headers["www-authenticate"]) == (401, "Bearer")


def test_with_the_token_all_is_answered_under_any_name(serve, patches):
    headers = {"authorization": f"bearer {TOKEN}", "host": "node7.cluster:8000"}
    client = serve(token=TOKEN)
    assert client.post("/predict", files=files(encoded(patches[0])), headers=headers).status_code == 200
    assert [client.get(path).status_code for path in ("/", "/docs", "/health", "/openapi.json")] == [200] * 4


def test_without_a_token_other_sites_and_names_are_kept_out(serve):
    client = serve()
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/health", headers={"host": "localhost.evil.example"}).status_code == 400
    assert client.post("/predict", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    for host in ("localhost", "127.0.0.1:8000", "[::1]:80"):
        assert client.get("/health", headers={"host": host, "sec-fetch-site": "none"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "node7", ""])
def test_others_may_reach_it_only_with_a_token(host):
    with pytest.raises(ConfigError, match="others could reach it"):
        server.check_host(host, None)
    server.check_host(host, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_this_machine_needs_none(host):
    assert server.check_host(host, None) is None


def test_a_token_is_read_from_a_file_or_the_environment(tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert server.read_token(file, None) == server.read_token(None, TOKEN) == TOKEN
    assert server.read_token(None, None) is None
    for text in ("", "short", "with a space in it, long"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="at least 16 letters"):
            server.read_token(file, TOKEN)  # a file that is given is not passed over
    with pytest.raises(ConfigError, match="cannot be read"):
        server.read_token(tmp_path / "none", None)
    with pytest.raises(ConfigError, match="PCAM_TOKEN"):
        server.read_token(None, "")


def test_the_command_refuses_before_it_loads(pcam, tmp_path):
    code, _, told = pcam("serve", "--checkpoint", tmp_path / "none.safetensors", "--host", "0.0.0.0")
    assert code == 2 and "others could reach it" in told
    code, _, told = pcam("serve", "--checkpoint", tmp_path / "none.safetensors")
    assert code == 2 and "none.safetensors" in told


# Pages, schema, metrics


def test_pages_fetch_nothing_from_elsewhere_and_may_not(serve):
    client = serve()
    for path in ("/", "/docs"):
        said = client.get(path)
        policy = said.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
        assert not re.search(r"https?://|src=|@import|url\(", said.text)
    schema = client.get("/openapi.json").json()
    assert sorted(schema["paths"]) == ["/drift", "/health", "/metrics", "/predict"]
    assert {"200", "207", "400", "413", "415", "422", "503"} <= set(schema["paths"]["/predict"]["post"]["responses"])


def test_a_path_that_is_not_there_and_a_wrong_method(serve):
    client = serve()
    assert (client.get("/nothing").status_code, client.get("/nothing").json()) == (404, {"error": "Not Found"})
    assert client.get("/predict").status_code == 405 and client.get("/predict").headers["allow"] == "POST"


def test_metrics_count_what_was_asked(serve, patches):
    client = serve()
    client.post("/predict?threshold=0", files=files(*map(encoded, patches[:3])))
    client.get("/nothing/at/all")
    found = counted(client)
    assert (
        found['pcam_predictions_total{called="tumour"}'] == 3 and found['pcam_predictions_total{called="normal"}'] == 0
    )
    assert found['pcam_requests_total{path="/predict",status="200"}'] == 1
    assert found['pcam_latency_seconds_count{path="/predict"}'] == 1 and found["pcam_batch_patches_sum"] == 3
    assert found['pcam_requests_total{path="other",status="404"}'] == 1 and found["process_resident_memory_bytes"] > 1e8
    assert (
        found['pcam_info{commit="' + str(client.get("/health").json()["commit"]) + '",run="run",synthetic="True"}'] == 1
    )


# Drift and collecting


def test_without_a_reference_drift_says_how_to_get_one(serve):
    said = serve().post("/drift")
    assert said.status_code == 409 and "pcam drift reference" in said.json()["error"]


def test_drift_of_images_and_of_the_newest_patches(serve, reference, patches):
    client = serve(reference=reference)
    few = client.post("/drift")
    assert few.status_code == 422 and "\n" not in few.json()["error"]
    dark = patches // 2
    for part in (dark[:20], dark[20:]):
        results = client.post("/predict", files=files(*map(encoded, part))).json()["results"]
        assert all(one["outlying"] is True for one in results)
    said = client.post("/drift")
    assert said.status_code == 200 and said.json()["drifted"] is True and said.json()["n"] == 40
    found = counted(client)
    assert found["pcam_drifted"] == 1 and found["pcam_outlying_total"] == 40
    assert found['pcam_drift_statistic{feature="brightness"}'] > 0.9
    sent = client.post("/drift", files=files(*map(encoded, patches)))
    assert sent.status_code == 200 and sent.json()["features"]["brightness"]["statistic"] < 0.5
    assert client.post("/drift", files=files(b"no image")).status_code == 415


def test_the_newest_patches_are_watched_without_being_asked(serve, reference, patches, monkeypatch):
    monkeypatch.setattr(api, "WATCH", 0.05)
    monkeypatch.setattr(service, "_FRESH", 30)
    client = serve(reference=reference)
    client.post("/predict", files=files(*map(encoded, patches // 2)))
    given_up = time.monotonic() + 20
    while not counted(client)["pcam_drifted"] and time.monotonic() < given_up:
        time.sleep(0.05)
    assert counted(client)["pcam_drifted"] == 1


def test_what_is_collected_are_measurements_answers_and_pixels_when_asked(serve, patches, tmp_path):
    for pixels in (False, True):
        client = serve(collect=tmp_path / str(pixels), pixels=pixels)
        said = client.post("/predict", files=files(*map(encoded, patches[:3]))).json()["results"]
        assert counted(client)["pcam_collecting"] == 1
        client.app.user_middleware[0].kwargs["service"].close()
        (path,) = (tmp_path / str(pixels)).glob("*.npz")
        stored = np.load(path, allow_pickle=False)
        assert stored["probability"].tolist() == [one["probability"] for one in said]
        assert stored["values"].shape == (3, 19) and ("images" in stored) == pixels
        assert not pixels or (stored["images"] == patches[:3]).all()


def test_a_full_disk_fails_no_request(serve, patches, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "ROWS", 2)

    def full(*arguments: Any, **columns: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    client = serve(collect=tmp_path)
    for _ in range(5):
        assert client.post("/predict", files=files(*map(encoded, patches[:3]))).status_code == 200
    given_up = time.monotonic() + 10
    while client.get("/health").json()["status"] == "ok" and time.monotonic() < given_up:
        time.sleep(0.01)
    health = client.get("/health")
    assert health.status_code == 200 and health.json()["status"] == "degraded"
    assert "the disk is full" in health.json()["problems"][0]
    found = counted(client)
    assert found["pcam_collect_failures_total"] == 1 and found["pcam_collecting"] == 0
    assert client.post("/predict", files=files(encoded(patches[0]))).status_code == 200


def test_a_worker_that_died_is_told(serve, make_service):
    client = serve()
    assert client.get("/health").json()["status"] == "ok"
    client.app.user_middleware[0].kwargs["service"]._batcher.close()
    assert (client.get("/health").status_code, client.get("/health").json()["status"]) == (503, "down")
