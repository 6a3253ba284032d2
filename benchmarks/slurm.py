"""The smoke journal through a Slurm of two nodes on this machine, against the same notebooks one after the other.

    python benchmarks/slurm.py [--scale smoke] [--json FILE]

Both start from nothing, each in a folder of its own; a node has half of this machine's cores, the other way has all.
The Slurm is started before and stopped after the measurement. Minutes; $PCAM_DATA chooses other data, as everywhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _rows import arguments, finish, row

from pcamlib.jobs import ledger
from pcamlib.sources import ROOT

sys.path.insert(0, str(ROOT / "tests" / "slurm"))
from cluster import NODES, Cluster, missing


def through_slurm(cluster: Cluster, pcam: list[str], scale: str, root: Path) -> float:
    """Seconds from the submission until the last job is over."""
    begun = time.perf_counter()
    call = [*pcam, "submit", "journal", "--site", "local", "--scale", scale, "--root", str(root)]
    subprocess.run(call, check=True, env=cluster.environment)
    ids = [entry.id for entry in ledger.read(root / "runs" / "slurm")]
    states = cluster.wait(ids, 3600)
    seconds = time.perf_counter() - begun
    if set(states) != {"COMPLETED"}:
        subprocess.run([*pcam, "jobs", "--root", str(root)], check=True, env=cluster.environment)
        raise SystemExit(f"jobs ended as {states}")
    return seconds


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--scale", default="smoke", help="of which journal")
    options = parser.parse_args()
    if lacking := missing():
        print(f"no Slurm on this machine ({', '.join(lacking)} not found): nothing measured")
        return finish([], options.json)
    pcam = [sys.executable, "-m", "pcamlib.cli"]
    with tempfile.TemporaryDirectory(prefix="pcam-", dir="/tmp") as folder:  # sockets need a short path
        subprocess.run([*pcam, "data", "info"], check=True, stdout=subprocess.DEVNULL)  # made for both beforehand
        begun = time.perf_counter()
        subprocess.run([*pcam, "journal", "make", "--scale", options.scale, "--root", f"{folder}/one"], check=True)
        alone = time.perf_counter() - begun
        cluster = Cluster(Path(folder) / "cluster")
        cluster.folder.mkdir()
        cluster.start(cpus=max(1, len(os.sched_getaffinity(0)) // len(NODES)))
        try:
            slurm = through_slurm(cluster, pcam, options.scale, Path(folder) / "two")
        finally:
            cluster.stop()
    against = f"{alone:.0f} s one after the other"
    rows = [row("journal through Slurm, two nodes", slurm, "s", n=1, against=against, ratio=alone / slurm),
            row("wall time, of that without Slurm", slurm / alone, "", n=1, bar="VALUE<=1.3")]  # fmt: skip
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
