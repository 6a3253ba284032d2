"""How the time and memory of a whole audit grow with the number of patches."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from _rows import row

from pcamlib.data.layout import split_path
from pcamlib.data.synthetic import generate

CODE = """
import json, resource, sys
from pcamlib.audit import report, stages
found = report.audit(sys.argv[1], stages.Options(labels=False), lambda line: None)
print(json.dumps({**found.seconds, "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def prefix(source: Path, dest: Path, count: int) -> Path:
    """The first `count` train patches of `source` in a folder of their own."""
    dest.mkdir()
    for part in "xy":
        places = split_path(source, "train", part), split_path(dest, "train", part)
        with h5py.File(places[0]) as old, h5py.File(places[1], "w") as new:
            new.attrs.update(old.attrs)
            values = new.create_dataset(part, (count, *old[part].shape[1:]), old[part].dtype)
            for start in range(0, count, 2048):
                values[start : min(start + 2048, count)] = old[part][start : min(start + 2048, count)]
    return dest


def rows(real: Path | None, rounds: int, *, patches: int, source: Path | None) -> list[dict[str, Any]]:
    """Seconds of the pass with every stage, near copies apart; the exponent; peak memory. `real` is not used."""
    table, found = [], {}
    with tempfile.TemporaryDirectory() as where:
        if source is None:
            source = Path(where, "all")
            generate(source, seed=3, sizes={"train": patches}, report=lambda line: None)
        for count in [16_384 * 2**i for i in range(5) if 16_384 * 2**i <= patches]:
            folder = prefix(source, Path(where, str(count)), count)
            done = subprocess.run([sys.executable, "-c", CODE, folder], capture_output=True, text=True, check=True)
            spent = json.loads(done.stdout.splitlines()[-1])
            shutil.rmtree(folder)
            found[count] = sum(seconds for name, seconds in spent.items() if name not in ("MiB", "near"))
            name = f"synthetic, {count:,} patches"
            bar = "VALUE<=360" if count == 262_144 else ""
            table.append(row(f"{name}: audit without near", found[count], "s", n=1, bar=bar))
            table.append(row(f"{name}: near copies", spent["near"], "s", n=1))
            table.append(row(f"{name}: peak memory", spent["MiB"], "MiB", n=1, bar="VALUE<=2048"))
    if len(found) > 1:
        power = float(np.polyfit(np.log(list(found)), np.log(list(found.values())), 1)[0])
        table.append(row("exponent of time over patches", power, "", n=len(found), bar="VALUE<=1.1"))
    return table
