"""The whole journal from nothing, and again with nothing changed.

    python benchmarks/journal.py [--json FILE]

Executes every notebook of the smoke scale into an empty folder; the environment is installed before, data are made
within the first call where they are missing. $PCAM_DATA chooses other data, as everywhere.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _rows import arguments, finish, row


def main() -> int:
    options = arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, "-m", "pcamlib.cli", "journal", "make", "--root", folder]
        seconds = []
        for _ in range(2):
            begun = time.perf_counter()
            subprocess.run(call, check=True)
            seconds.append(time.perf_counter() - begun)
        assert (Path(folder) / "JOURNAL.md").exists()
    rows = [
        row("journal from nothing", seconds[0], "s", n=1, bar="VALUE<=180"),
        row("journal, nothing changed", seconds[1], "s", n=1, bar="VALUE<=10"),
    ]
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
