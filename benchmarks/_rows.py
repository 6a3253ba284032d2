"""What every benchmark shares: interleaved rounds, a table on the terminal, rows as JSON.

A row is {name, value, unit, against, ratio, bar, met, n}: `ratio` is how much better the value is than `against`,
`bar` the floor it is held to, `n` the rounds behind the median. Absolute values depend on the neighbours of this
machine; ratios come from rounds that alternate within one process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pcamlib.files import write_json


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; the median is reported")
    return parser


def interleaved(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median rate of each contestant over rounds that alternate between them, after one uncounted round."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, measure in contestants.items():
            rate = measure()
            if number:
                rates[name].append(rate)
    return {name: statistics.median(values) for name, values in rates.items()}


def row(
    name: str, value: float, unit: str, *, n: int, against: str = "", ratio: float | None = None, bar: str = ""
) -> dict[str, Any]:
    """One result; `bar` is "RATIO>=X", "VALUE>=X" or "VALUE<=X" and decides `met`."""
    met = None
    if bar:
        what, sign, bound = bar[:5], bar[5:7], float(bar[7:])
        measured = ratio if what == "RATIO" else value
        met = measured is not None and (measured >= bound if sign == ">=" else measured <= bound)
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "against": against,
        "ratio": ratio,
        "bar": bar,
        "met": met,
        "n": n,
    }


def finish(rows: list[dict[str, Any]], target: Path | None) -> int:
    """Print the table, write the JSON; the exit code is 1 when a bar was missed."""
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(f"{'what':44s} {'value':>12s} {'unit':8s} {'ratio':>7s}  {'bar':12s} {'met':4s} {'n':>2s}  against")
    for r in rows:
        ratio = f"{r['ratio']:.2f}" if r["ratio"] is not None else ""
        met = "" if r["met"] is None else "yes" if r["met"] else "NO"
        line = f"{r['name']:44s} {r['value']:12,.4g} {r['unit']:8s} {ratio:>7s}  {r['bar']:12s} {met:4s} {r['n']:2d}"
        print(f"{line}  {r['against']}")
    if target:
        write_json(target, json.loads(json.dumps(rows)))
    return int(any(r["met"] is False for r in rows))
