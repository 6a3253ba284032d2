"""Training through a file of twice the size needs no more memory; `benchmarks/fullsize.py` takes PCam's full size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from pcamlib.data.layout import PATCH_BYTES, PATCH_SHAPE, split_path

CODE = """
import sys
from pathlib import Path
from pcamlib.config import parse
from pcamlib.training import loop
tiny = {"model": {"name": "mlp", "crop": 32, "hidden_units": [8]}, "train": {"epochs": 1, "threads": 1}}
run = loop.train(parse(tiny), sys.argv[1], sys.argv[2], report=lambda line: None)
lines = Path("/proc/self/status").read_text().splitlines()
print(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10, run.success["steps"])
"""


def peak(folder: Path, patches: int) -> int:
    """Peak bytes in memory, mapped pages included, of a process that makes the first pass and trains one epoch."""
    block = np.random.default_rng(0).integers(0, 256, (500, *PATCH_SHAPE), np.uint8)
    folder.mkdir()
    for split, size in (("train", patches), ("valid", 500)):
        with h5py.File(split_path(folder, split, "x"), "w") as x, h5py.File(split_path(folder, split, "y"), "w") as y:
            images = x.create_dataset("x", (size, *PATCH_SHAPE), np.uint8)
            for start in range(0, size, 500):
                images[start : start + 500] = block
            y["y"] = (np.arange(size) % 2).astype(np.uint8).reshape(-1, 1, 1, 1)
    command = [sys.executable, "-c", CODE, str(folder), str(folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    most, steps = map(int, done.stdout.split())
    assert steps == -(-patches // 128)
    return most


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    small, large = peak(tmp_path / "small", 20_000), peak(tmp_path / "large", 40_000)
    assert large - small < 0.2 * 20_000 * PATCH_BYTES
