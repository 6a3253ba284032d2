"""Ten thousand mutated images, bodies and requests against the service: no 500, no hang, no trace in an answer.

    python benchmarks/fuzz_api.py [--json FILE] [--cases 10000] [--seed 0] [--checkpoint FILE --data DIR]

Two fifths are images with bytes replaced, cut out or doubled, two fifths whole bodies treated so, one fifth requests
that schemathesis makes from the service's own schema, half of them meant to be wrong, whose answers it checks against
that schema. `pcam serve` runs as a process, 127.0.0.1 only; an answer that takes over 10 s counts as a hang.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import httpx2
import numpy as np
import schemathesis
from _rows import arguments, finish, row
from hypothesis import HealthCheck, given, seed, settings
from PIL import Image
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks
from service import material, served

from pcamlib.data.patches import open_split
from pcamlib.serving.drift import Reference
from pcamlib.serving.predict import Predictor

CHECKS = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]
KNOWN = {200, 207, 400, 413, 415, 422}


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Up to eight bytes or pieces replaced, cut out or doubled, mostly near the start, where headers lie."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        at = int(rng.integers(0, max(1, min(len(found), int(rng.choice([64, 512, len(found) + 1]))))))
        length = int(rng.integers(1, 40))
        new = [rng.bytes(length), b"", bytes(found[at : at + length]) * 2][rng.integers(3)]
        found[at : at + length] = new
    return bytes(found)


def seeds(image: Image.Image) -> list[bytes]:
    """One image in every kind and mode that a service may meet."""
    found = []
    for kind, mode in (("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "I;16"), ("JPEG", "RGB"), ("JPEG", "L"),
                       ("JPEG", "CMYK"), ("TIFF", "RGB"), ("GIF", "P"), ("BMP", "RGB")):  # fmt: skip
        out = io.BytesIO()
        (image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)).save(out, kind)
        found.append(out.getvalue())
    out = io.BytesIO()
    image.save(out, "JPEG", progressive=True)
    return [*found, out.getvalue()]


def thrown(address: str, cases: int, number: int, images: list[bytes], counts: Counter[str]) -> None:
    """Mutated images and bodies."""
    rng = np.random.default_rng(number)
    with httpx2.Client(base_url=address, timeout=10) as client:
        for case in range(cases):
            data = images[rng.integers(len(images))]
            form = {"content-type": "multipart/form-data; boundary=a"}
            head = b'--a\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
            try:
                if case % 2:
                    said = client.post("/predict", files={"image": mutate(data, rng)})
                else:
                    body = mutate(head + data + b"\r\n--a--\r\n", rng)
                    said = client.post("/drift" if case % 20 == 0 else "/predict", content=body, headers=form)
                sane = said.status_code in KNOWN and "Traceback" not in said.text and 'File "' not in said.text
                if not sane or not isinstance(json.loads(said.text), dict):
                    print(said.status_code, said.text[:300])
                counts[str(said.status_code) if sane else "insane"] += 1
            except httpx2.TimeoutException:
                counts["hang"] += 1


def schemed(address: str, cases: int, number: int, counts: Counter[str]) -> None:
    """Requests made from the schema."""
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    for mode in GenerationMode:
        for path in ("/predict", "/drift"):
            strategy = schema[path]["POST"].as_strategy(generation_mode=mode)

            @seed(number)
            @settings(max_examples=cases // 4, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(strategy)
            def check(case: schemathesis.Case) -> None:
                said = case.call_and_validate(checks=CHECKS, timeout=10)
                counts[f"schema: {said.status_code}"] += 1

            try:
                check()
            except Exception as error:
                counts["insane"] += 1
                print(error)


def main() -> int:
    """The table."""
    parser = arguments(__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = material(args, folder)
        patches = open_split(args.data or folder / "data", "valid")
        Reference.build(Predictor(checkpoint), patches).save(folder / "reference.npz")
        with served(checkpoint, "--reference", str(folder / "reference.npz")) as (address, _):
            thrown(address, args.cases * 4 // 5, args.seed, seeds(Image.fromarray(patches.images[0])), counts)
            schemed(address, args.cases // 5, args.seed, counts)
            alive = httpx2.get(f"{address}/health").json()["status"] == "ok"
    print(", ".join(f"{what} {count:,}" for what, count in sorted(counts.items())))
    total = sum(counts.values())
    rows = [row("cases", total, "", n=total, bar=f"VALUE>={args.cases * 0.95:.0f}")]
    rows += [row(what, counts[what], "", n=total, bar="VALUE<=0") for what in ("insane", "hang")]
    return finish([*rows, row("healthy at the end", int(alive), "", n=1, bar="VALUE>=1")], args.json)


if __name__ == "__main__":
    sys.exit(main())
