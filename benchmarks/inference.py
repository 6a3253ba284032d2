"""Inference as a command: `inference.py` on an H5 of 32,768 patches against a loop over single patches.

    python benchmarks/inference.py --checkpoint best.safetensors [--data DIR] [--json FILE] [--rounds 3]

Patches are those of `--data`, repeated as often as needed, or generated. Rates are end to end, with Python and torch
starting, reading and the CSV. The loop is one patch at a time with the same weights, in one process of this script,
without its start: in float32, as one would write it.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
from _rows import arguments, finish, row

from pcamlib.data.patches import open_split, take
from pcamlib.data.synthetic import generate
from pcamlib.serving.predict import Predictor

FACE = Path(__file__).resolve().parent.parent / "inference.py"
LOOP = 512  # patches that the loop is timed on


def write(path: Path, data: Path | None, count: int) -> str:
    """An H5 of so many patches with labels; returns where they are from."""
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            generate(folder, seed=1, sizes={"train": 2048}, report=lambda line: None)
        patches = open_split(data or folder, "train")
        assert patches.labels is not None
        with h5py.File(path, "w") as file:
            x = file.create_dataset("x", (count, 96, 96, 3), np.uint8)
            file["y"] = np.resize(patches.labels, count).reshape(-1, 1, 1, 1)
            for start in range(0, count, 1024):
                rows = np.arange(start, min(start + 1024, count)) % len(patches)
                x[start : start + len(rows)] = take(patches.images, rows)
    return "synthetic" if data is None else "real"


def command(*arguments: str | Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak MiB of one `inference.py`."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, FACE, *arguments], stdout=subprocess.DEVNULL)
    peak, done, usage = 0, 0, None
    while not done:  # rusage's peak would be this script's where that is larger
        if found := re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text()):
            peak = int(found[1])
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        time.sleep(0 if done else 0.05)
    assert usage is not None
    if status:
        raise SystemExit("inference.py failed")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, peak / 1024


def loop(checkpoint: Path, path: Path) -> float:
    """Patches a second, one at a time."""
    predictor = Predictor(checkpoint)
    with h5py.File(path) as file:
        predictor.probability(file["x"][:1])
        began = time.perf_counter()
        for number in range(LOOP):
            predictor.probability(file["x"][number : number + 1])
    return LOOP / (time.perf_counter() - began)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder with PCam files; synthetic patches without it")
    parser.add_argument("--patches", type=int, default=32_768)
    options = parser.parse_args()
    rows, found = [], {"bf16": [], "fp32": []}
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "many.h5", Path(folder) / "out.csv"
        kind = write(path, options.data, options.patches)
        loops = []
        for number in range(options.rounds + 1):  # the first is not counted
            for precision in found:
                result = command("--checkpoint", options.checkpoint, path, "--out", out, "--precision", precision)
                found[precision] += [result] if number else []
            loops += [loop(options.checkpoint, path)] if number else []
        naive, n = statistics.median(loops), options.rounds
        rows.append(row("one patch at a time, fp32", naive, "1/s", n=n, against=f"{LOOP} {kind} patches"))
        for precision, results in found.items():
            seconds, cpu, peak = (statistics.median(column) for column in zip(*results, strict=True))
            rate, against = options.patches / seconds, f"{options.patches:,} {kind} patches, with metrics"
            bar = "VALUE>=2500" if precision == "bf16" else ""
            rows.append(
                row(
                    f"inference.py, {precision}", rate, "1/s", n=n, against="one at a time", ratio=rate / naive, bar=bar
                )
            )
            rows.append(
                row(f"inference.py, {precision}, a core's second", options.patches / cpu, "1/s", n=n, against=against)
            )
            rows.append(row(f"inference.py, {precision}, peak memory", peak, "MiB", n=n, bar="VALUE<=1024"))
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
