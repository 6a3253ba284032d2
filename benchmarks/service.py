"""The service under load: 1,000 users on the same machine, whose load generator takes a core of its own.

    python benchmarks/service.py [--json FILE] [--checkpoint FILE --data DIR] [--users 1000] [--rate 500] [--seconds 60]
        [--think 1.5] [--reference FILE]

Starts `pcam serve` as a process and Locust against it, 127.0.0.1 only. Each user sends one patch of 96 x 96 pixels
(half PNG, half JPEG), thinks for --think seconds on average, and sends the next; 1,000 users thus ask for up to
1,000 / think patches a second. Rates are those of the seconds after all users have come. Without --checkpoint and
--data a small network is trained on synthetic patches first.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from _rows import arguments, finish, row
from PIL import Image

from pcamlib.config import parse, recipe
from pcamlib.data.patches import open_split
from pcamlib.data.synthetic import generate
from pcamlib.training import loop

IMAGES = 200
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def material(args: argparse.Namespace, folder: Path) -> Path:
    """Images in `folder`/images; returns the checkpoint."""
    data = args.data
    if not data:
        data = folder / "data"
        generate(data, seed=0, sizes={"train": 512, "valid": 256, "test": 256}, report=lambda line: None)
    checkpoint = args.checkpoint
    if not checkpoint:
        changes = ["train.epochs=null", "train.steps=32"]
        done = loop.train(parse(recipe("cnn"), changes), data, folder / "run", report=lambda line: None)
        checkpoint = done.best
    (folder / "images").mkdir()
    for number, image in enumerate(open_split(data, "valid").images[:IMAGES]):
        name = f"{number}.jpg" if number % 2 else f"{number}.png"
        Image.fromarray(image).save(folder / "images" / name, quality=90)
    return checkpoint


@contextmanager
def served(checkpoint: Path, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """A `pcam serve` on a free port: its address and process; on leaving it must end with code 0."""
    command = [sys.executable, "-m", "pcamlib.cli", "serve", "--checkpoint", str(checkpoint), "--port", "0", *options]
    server = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        said = server.stdout.readline()
        if " answers" not in said:
            raise SystemExit(f"the service did not start: {said}")
        yield said.split(" answers")[0], psutil.Process(server.pid)
    finally:
        server.send_signal(signal.SIGTERM)
        if server.wait(60):
            raise SystemExit(f"the service left with code {server.returncode}")


def metrics(address: str) -> dict[str, float]:
    """The service's own count, by name with labels."""
    text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#"]
    return {name: float(value) for name, value in lines}


def load(address: str, folder: Path, args: argparse.Namespace) -> list[dict[str, str]]:
    """Locust's table of percentiles, one row a name and one for all of them."""
    out = folder / "locust"
    command = [sys.executable, "-m", "locust", "-f", str(Path(__file__).with_name("_locustfile.py")), "--headless",
               "-H", address, "-u", str(args.users), "-r", str(args.rate), "-t", f"{args.seconds}s", "--csv", str(out),
               "--reset-stats", "--only-summary", "--stop-timeout", "10", "--exit-code-on-error", "0"]  # fmt: skip
    more = {"PCAM_IMAGES": str(folder / "images"), "PCAM_THINK": str(args.think)}
    subprocess.run(
        command, env={**ENVIRONMENT, **more}, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with open(f"{out}_stats.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def main() -> int:
    """The table."""
    parser = arguments(__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--rate", type=int, default=500, help="users that come a second")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--think", type=float, default=1.5, help="seconds, on average")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = material(args, folder)
        options = ["--reference", str(args.reference)] if args.reference else []
        with served(checkpoint, *options) as (address, process):
            busy, began = sum(process.cpu_times()[:2]), time.monotonic()
            found = {one["Name"]: one for one in load(address, folder, args)}
            busy = (sum(process.cpu_times()[:2]) - busy) / (time.monotonic() - began)
            told, memory = metrics(address), process.memory_info().rss / 2**20
    rows = report(found, args)
    batch = told["pcam_batch_patches_sum"] / told["pcam_batch_patches_count"]
    rows += [row("patches a batch, mean", batch, "", n=1), row("server's cores", busy, "cores", n=1),
             row("server's memory", memory, "MiB", n=1)]  # fmt: skip
    return finish(rows, args.json)


def report(found: dict[str, dict[str, str]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of Locust's table."""
    answered, refused = found["/predict"], found.get("503 with Retry-After", {})
    count, failures = int(answered["Request Count"]), int(found["Aggregated"]["Failure Count"])
    users = f"{args.users:,} users, {args.think:g} s to think"
    return [
        row("answered", float(answered["Requests/s"]), "req/s", n=count, bar="VALUE>=243", against=users),
        row("failures", failures, "", n=count, bar="VALUE<=0"),
        row("asked-for 503s", int(refused.get("Request Count", 0)), "", n=count),
        *(row(f"p{p} of what was answered", float(answered[f"{p}%"]), "ms", n=count,
              bar="VALUE<=2000" if p == 95 else "") for p in (50, 95, 99)),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
