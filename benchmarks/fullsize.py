"""One epoch through a file of PCam's full size, 262,144 patches: what it needs of memory above the model.

    python benchmarks/fullsize.py [--json FILE] [--patches N] [--source DIR] [--recipe NAME]

The file is tiled from 4,000 synthetic patches (7.2 GB of disk while it runs); --source names a folder with train and
valid files instead. Training runs in a process of its own, from the first pass over the file to SUCCESS. Pages of the
memory-mapped file count as resident (RssFile) though the system can take them back at any time; RssAnon cannot be.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _rows import arguments, finish, row
from loader import tile

from pcamlib.data.folder import SYNTHETIC, data_folder

#: Prints MiB: resident when torch and the model are there, then the peaks over the whole run.
CODE = """
import json, sys, threading, time
from pathlib import Path
import torch
from pcamlib import seeding
from pcamlib.config import parse, recipe
from pcamlib.models import build
from pcamlib.training import loop

def memory():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(lines[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM", "RssAnon", "RssFile")}

data, out, name = sys.argv[1:4]
config = parse(recipe(name), ["train.epochs=1", "data.drop=[]", *sys.argv[4:]])
seeding.seed_everything(0)
seeding.set_threads(config.train.threads)
model = build(config.model, {"mean": [128.0] * 3, "std": [50.0] * 3})
model(torch.zeros(config.loader.batch_size, 3, 96, 96, dtype=torch.uint8)).sum().backward()
torch.optim.AdamW(model.parameters()).step()
found = {"model": memory()["VmRSS"], "RssAnon": 0, "RssFile": 0}
over = threading.Event()

def watch():
    while not over.wait(0.02):
        for key in ("RssAnon", "RssFile"):
            found[key] = max(found[key], memory()[key])

watcher = threading.Thread(target=watch)
watcher.start()
begun = time.monotonic()
run = loop.train(config, data, out, report=lambda line: None)
over.set()
watcher.join()
print(json.dumps({**found, "VmHWM": memory()["VmHWM"], "seconds": time.monotonic() - begun, **run.success}))
"""


def measured(data: Path, recipe: str, *items: str) -> dict[str, Any]:
    """Peaks in MiB and the run's length, from a process that trains one epoch."""
    with tempfile.TemporaryDirectory() as where:
        command = [sys.executable, "-c", CODE, data, f"{where}/run", recipe, *items]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--patches", type=int, default=262_144)
    parser.add_argument("--source", type=Path, help="folder with train and valid files, instead of making them")
    parser.add_argument("--recipe", default="mlp", help="the cheapest by default: memory does not hang on the network")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        made = options.source or tile(
            data_folder(SYNTHETIC if SYNTHETIC.is_dir() else None), Path(scratch, "full"), options.patches, "uint8"
        )
        found = measured(made, options.recipe)
    above = found["VmHWM"] - found["model"]
    name = f"{options.patches:,} patches, {options.recipe}" if not options.source else f"{options.recipe}"
    note = f"{found['steps']:,} steps and the first pass in {found['seconds']:.0f} s"
    rows = [row(f"{name}: peak memory above the model", above, "MiB", n=1, against=note, bar="VALUE<=2048")]
    rows += [
        row(f"  {what}", found[key], "MiB", n=1)
        for what, key in (("the model, before any data", "model"), ("peak RSS (VmHWM)", "VmHWM"),
                          ("peak of RssAnon", "RssAnon"), ("peak of RssFile", "RssFile"))
    ]  # fmt: skip
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
