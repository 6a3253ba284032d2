"""The data audit: rates on planted flaws with their n, ratios against brute force, and how time grows with N.

    python benchmarks/audit.py [--json FILE] [--real DIR] [--only NAME ...] [--patches N] [--source DIR]

Without --real the planted flaws lie in synthetic patches, and each row says so. `scale` audits 16,384 patches and
doublings up to --patches, generated on the spot at 700 a second.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from _rows import arguments, finish

PARTS = ("storage", "duplicates", "poison", "frequency", "labels", "scale")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--real", type=Path, help="folder with real PCam files")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--patches", type=int, default=32_768, help="largest set of the part 'scale'")
    parser.add_argument("--source", type=Path, help="folder with that many train patches, instead of generating them")
    options = parser.parse_args()
    rows = []
    for part in options.only:
        print(f"-- {part}", flush=True)
        module = importlib.import_module(f"_audit_{part}")
        more = {"patches": options.patches, "source": options.source} if part == "scale" else {}
        rows += module.rows(options.real, options.rounds, **more)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
