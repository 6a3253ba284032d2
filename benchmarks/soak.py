"""The service under good and hostile input for minutes: does it stay up, and does its memory stay flat?

    python benchmarks/soak.py [--json FILE] [--minutes 10] [--checkpoint FILE --data DIR]

Starts `pcam serve` with a reference and a folder to collect in, 127.0.0.1 only. Eight clients send patches, and one
time in three something else: broken, huge and foreign files, ten thousand files, cut bodies, wrong parameters, half a
body and good-bye. Memory is the resident set, its mean in the last tenth of the time against that in the second tenth.
"""

from __future__ import annotations

import io
import socket
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import numpy as np
from _rows import arguments, finish, row
from PIL import Image
from service import material, metrics, served

from pcamlib.data.patches import open_split
from pcamlib.serving.drift import Reference
from pcamlib.serving.predict import Predictor

CLIENTS = 8
KNOWN = {200, 207, 400, 404, 405, 408, 413, 415, 422, 503}
Send = Callable[[httpx2.Client, np.random.Generator], httpx2.Response | None]


def bomb() -> bytes:
    """A PNG whose header claims 1e9 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + bytes(4)


def shaped(size: tuple[int, int], mode: str, kind: str) -> bytes:
    """An image of a size, mode and kind."""
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind)
    return out.getvalue()


def gone(client: httpx2.Client, rng: np.random.Generator) -> None:
    """Half a request, and good-bye."""
    place = urlsplit(str(client.base_url))
    with socket.create_connection((place.hostname, place.port), 10) as one:
        one.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=a\r\n"
                    b"Content-Length: 5000\r\n\r\n--a")  # fmt: skip


def hostile(good: list[bytes]) -> list[Send]:
    """What else is sent."""
    part = b'--a\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n'
    kind = {"content-type": "multipart/form-data; boundary=a"}
    foreign = [bomb(), b"", b"no image", shaped((4000, 4000), "RGB", "PNG"), shaped((96, 96), "CMYK", "JPEG"),
               shaped((96, 96), "I;16", "PNG"), shaped((96, 96), "RGB", "GIF"),
               shaped((95, 97), "RGB", "TIFF")]  # fmt: skip

    def spoiled(client: httpx2.Client, rng: np.random.Generator) -> httpx2.Response:
        data = bytearray(good[rng.integers(len(good))])
        for at in rng.integers(0, len(data), 5):
            data[at] = rng.integers(256)
        return client.post("/predict", files={"image": bytes(data[: rng.integers(1, len(data) + 1)])})

    return [
        gone,
        spoiled,
        lambda client, rng: client.post("/predict", files={"image": foreign[rng.integers(len(foreign))]}),
        lambda client, rng: client.post("/predict", content=10_000 * part, headers=kind),
        lambda client, rng: client.post("/predict", content=bytes(6 << 20), headers=kind),
        lambda client, rng: client.post("/predict", content=part[: rng.integers(len(part))], headers=kind),
        lambda client, rng: client.post("/predict?threshold=much&heat=1", files={"image": good[0]}),
        lambda client, rng: client.post("/predict?heat=true", files={"image": good[0]}),
        lambda client, rng: client.get(f"/{'x' * int(rng.integers(2000))}"),
        lambda client, rng: client.post("/drift") if rng.random() < 0.02 else client.get("/metrics"),
    ]


def send(address: str, good: list[bytes], until: float, seed: int, counts: Counter[str]) -> None:
    """One client."""
    rng, others = np.random.default_rng(seed), hostile(good)
    with httpx2.Client(base_url=address, timeout=30) as client:
        while time.monotonic() < until:
            try:
                if rng.random() < 2 / 3:
                    some = [("image", good[at]) for at in rng.integers(0, len(good), rng.integers(1, 5))]
                    said: httpx2.Response | None = client.post("/predict", files=some)
                else:
                    said = others[rng.integers(len(others))](client, rng)
                counts["left" if said is None else str(said.status_code)] += 1
                if said is not None and (said.status_code not in KNOWN or "Traceback" in said.text):
                    print(said.status_code, said.text[:300])
                    counts["insane"] += 1
            except httpx2.WriteError:  # a body that is refused before all of it was sent
                counts["refused early"] += 1
            except httpx2.HTTPError as error:
                counts[f"broken: {type(error).__name__}"] += 1


def main() -> int:
    """The table."""
    parser = arguments(__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = material(args, folder)
        good = [path.read_bytes() for path in sorted((folder / "images").iterdir())]
        reference = folder / "reference.npz"
        Reference.build(Predictor(checkpoint), open_split(args.data or folder / "data", "valid")).save(reference)
        options = ["--reference", str(reference), "--collect", str(folder / "seen"), "--seconds", "5"]
        with served(checkpoint, *options) as (address, process):
            counts: Counter[str] = Counter()
            memory: list[float] = []
            began = time.monotonic()
            until = began + 60 * args.minutes
            clients = [
                threading.Thread(target=send, args=(address, good, until, seed, counts)) for seed in range(CLIENTS)
            ]
            for client in clients:
                client.start()
            while time.monotonic() < until:
                time.sleep(args.minutes * 60 / 200)
                memory.append(process.memory_info().rss / 2**20)
            for client in clients:
                client.join()
            told = metrics(address)
            health = httpx2.get(f"{address}/health").json()["status"]
    print(", ".join(f"{what} {count:,}" for what, count in sorted(counts.items())))
    tenth = len(memory) // 10
    print("MiB by tenths of the time:", *(f"{np.mean(part):.0f}" for part in np.array_split(memory, 10)))
    early, late = np.mean(memory[tenth : 2 * tenth]), np.mean(memory[-tenth:])
    total = sum(counts.values())
    bad = sum(count for what, count in counts.items() if what.startswith(("broken", "insane")))
    rows = [
        row("requests", total, "", n=total),
        row("500s, traces, connections that broke", bad, "", n=total, bar="VALUE<=0"),
        row("memory, last tenth to second tenth", late / early, "", n=len(memory), bar="VALUE<=1.05"),
        row("memory at the end", late, "MiB", n=len(memory)),
        row("healthy at the end", int(health == "ok"), "", n=1, bar="VALUE>=1"),
        row("patches judged", sum(v for k, v in told.items() if k.startswith("pcam_predictions_total")), "", n=total),
    ]
    return finish(rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
