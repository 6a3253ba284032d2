"""Mutated pictures: each is answered or refused in one line, and neither takes long.

    python benchmarks/fuzz.py [--cases 10000] [--first 0] [--limit 5] [--json FILE]

Bytes of valid PNG, JPEG and TIFF files (plain, compressed, progressive) are changed, cut out, doubled and put in, by a
seed a case; every second TIFF is read band by band, as a region too large to be decoded whole. A case fails on any
exception but `ImageError`, on two lines, or after `--limit` seconds, when it is interrupted. It is named by its seed.
"""

from __future__ import annotations

import collections
import io
import resource
import signal
import sys
import time
import traceback
from typing import Any

import numpy as np
from _rows import arguments, finish, row
from PIL import Image

from pcamlib.serving import images, regions


def seeds() -> dict[str, bytes]:
    """Valid files of 140 x 110 pixels by kind."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(np.repeat(np.repeat(rng.integers(0, 256, (11, 14, 3)), 10, 0), 10, 1).astype(np.uint8))
    opaque, palette = picture.copy(), picture.quantize(64)
    opaque.putalpha(255)
    exif = Image.Exif()
    exif[0x112] = 6
    ways: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "png": (picture, "PNG", {}),
        "png alpha": (opaque, "PNG", {}),
        "png palette": (palette, "PNG", {}),
        "jpeg": (picture, "JPEG", {"exif": exif}),
        "jpeg progressive": (picture, "JPEG", {"progressive": True}),
        "tiff": (picture, "TIFF", {"exif": exif}),
        "tiff lzw": (picture, "TIFF", {"compression": "tiff_lzw"}),
        "tiff deflate": (opaque, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "tiff jpeg": (picture, "TIFF", {"compression": "jpeg"}),
        "tiff big": (picture, "TIFF", {"compression": "packbits", "big_tiff": True}),
    }
    found = {}
    for name, (image, kind, options) in ways.items():
        out = io.BytesIO()
        image.save(out, kind, **options)
        found[name] = out.getvalue()
    return found


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One to eight changes, half of them within the 400 bytes at either end, where headers are."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        span = len(changed) if rng.random() < 0.5 else min(len(changed), 400)
        at = int(rng.integers(0, max(span, 1)))
        at = len(changed) - 1 - at if rng.random() < 0.3 else at
        size = int(rng.integers(1, 9))
        match rng.integers(0, 6):
            case 0 | 1:
                changed[at : at + 1] = rng.bytes(1)
            case 2:
                changed[at : at + size] = rng.bytes(size)
            case 3:
                changed[at : at + size] = rng.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * size
            case 4:
                del changed[at : at + size * size]
            case 5:
                changed[at:at] = changed[at // 2 : at // 2 + size * size]
    return bytes(changed[: int(rng.integers(0, len(changed) + 1))] if rng.random() < 0.1 else changed)


def answered(data: bytes, banded: bool) -> str:
    """ "answered", or the status of the refusal."""
    try:
        if banded:
            for _ in regions.bands(regions.Region(io.BytesIO(data), "a"), 48):
                pass
        else:
            images.decode(data, "a")
    except images.ImageError as error:
        return f"refused {error.status}" if "\n" not in str(error) else "FAILED: two lines"
    return "answered"


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--limit", type=float, default=5, help="seconds a case may take")
    options = parser.parse_args()

    def stop(number: int, frame: object) -> None:
        raise BaseExceptionGroup("a case took too long", [KeyboardInterrupt()])  # not what anything here catches

    signal.signal(signal.SIGALRM, stop)
    kinds, counts, failed, slowest = seeds(), collections.Counter[str](), [], 0.0
    for name, data in kinds.items():
        if answered(data, name.startswith("tiff") and "exif" not in name and name != "tiff") != "answered":
            raise SystemExit(f"{name}: the file itself is refused")
    for case in range(options.first, options.first + options.cases):
        rng = np.random.default_rng([case, 3])
        name = str(rng.choice(list(kinds)))
        data, banded = mutated(kinds[name], rng), name.startswith("tiff") and bool(rng.random() < 0.5)
        began = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, options.limit)
        try:
            outcome = answered(data, banded)
        except BaseException:
            outcome = f"FAILED: {traceback.format_exc().splitlines()[-1]}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        slowest = max(slowest, time.perf_counter() - began)
        counts[f"{name}{', bands' if banded else ''}: {outcome}"] += 1
        if outcome.startswith("FAILED"):
            failed.append(case)
            print(f"case {case}, {name}{', bands' if banded else ''}: {outcome}", flush=True)
    for what, count in sorted(counts.items()):
        print(f"{count:6,} {what}")
    peak, n = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, options.cases
    rows = [
        row("neither answered nor refused", len(failed), "cases", n=n, bar="VALUE<=0"),
        row("answered", sum(v for k, v in counts.items() if k.endswith("answered")), "cases", n=n),
        row("slowest", slowest, "s", n=n, bar=f"VALUE<={options.limit:g}"),
        row("peak memory", peak, "MiB", n=n, bar="VALUE<=1024"),
    ]
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
