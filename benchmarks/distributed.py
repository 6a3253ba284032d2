"""Training by two processes of one thread against one process of two threads and of one, in interleaved rounds.

    python benchmarks/distributed.py [--json FILE] [--rounds N]

Each measurement is a run of its own in fresh processes; its rate is that of the steps after the first ones, from the
run's own metrics. Ratios are taken round by round, so that a neighbour's load meets all sides of a ratio.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _rows import arguments, finish, row

from pcamlib.data.folder import SYNTHETIC, data_folder
from pcamlib.training import runs

WARM, STEPS = 10, 50
#: name: (processes, threads of each)
SIDES = {"2 x 1 thread": (2, 1), "1 x 2 threads": (1, 2), "1 x 1 thread": (1, 1)}


def rate(data: Path, model: str, batch: int, processes: int, threads: int) -> float:
    """Patches a second of a run's steps after the first `WARM`, all processes together."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    items = [f"train.steps={STEPS}", f"train.threads={threads}", f"loader.batch_size={batch}", "train.device=cpu"]
    with tempfile.TemporaryDirectory() as where:
        command = [sys.executable, *launch, "-m", "pcamlib.cli", "train", "--recipe", model, "--data", data]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run([*command, "--out", f"{where}/run", *items], env=environment, capture_output=True, check=True)
        seconds = [entry["seconds"] for entry in runs.open_run(f"{where}/run").metrics()]
    return batch * (STEPS - WARM - 1) / (seconds[-2] - seconds[WARM - 1])  # the last step's row holds the evaluation


def compared(data: Path, model: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Two processes over one of two threads, and over one of one thread: median ratio, smallest and largest."""
    found = [{name: rate(data, model, batch, *side) for name, side in SIDES.items()} for _ in range(rounds)]
    ours, *others = SIDES
    table = []
    for other in others:
        ratios = sorted(one[ours] / one[other] for one in found)
        note = (
            f"{other}: {statistics.median(one[other] for one in found):,.0f}; ratios {ratios[0]:.2f}..{ratios[-1]:.2f}"
        )
        mine = statistics.median(one[ours] for one in found)
        table.append(row(f"{model}, batch {batch}: {ours}", mine, "img/s", n=rounds, against=note,
                         ratio=statistics.median(ratios)))  # fmt: skip
    return table


def main() -> int:
    options = arguments(__doc__).parse_args()
    data = data_folder(SYNTHETIC if SYNTHETIC.is_dir() else None)
    rows = [entry for model in ("cnn", "mlp") for entry in compared(data, model, 128, options.rounds)]
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
