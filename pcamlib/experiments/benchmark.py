"""What one job measured of one batch size, as a file; and the table of many such files.

    pcam benchmark --data DIR --batch-size 1 --model small --out runs/benchmarks/12_0.json
    sbatch --partition=thin_course slurm/benchmark.sbatch            # a task a batch size

A file names the job, partition and device it was measured on, as Slurm and torch gave them. What was measured on a CPU
never stands for a GPU, whatever the partition is called.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pcamlib import provenance, seeding
from pcamlib.config import Strict
from pcamlib.data.patches import open_split
from pcamlib.errors import ConfigError, PcamError
from pcamlib.experiments import memory, networks, roofline, throughput
from pcamlib.training.state import choose_device, choose_precision

#: The partitions that the journal's table asks for, and the device that each must have been measured on.
PARTITIONS = {"thin_course": "cpu", "gpu_course": "cuda"}
LOCAL = "local"  # slurm/sites/local.sh
STAGE = ("end to end", "fp32")  # what the table shows: the same work on every device


class Row(Strict):
    """One stage in one precision; `img/s` and its 95 % interval, latencies in ms (None: too few calls could tell)."""

    what: str
    precision: str
    rate: float
    interval: tuple[float, float]
    p50_ms: float
    p90_ms: float | None
    p99_ms: float | None
    calls: int


class Result(Strict):
    """One file. `why` says why there are no rows; `load` is the mean number of waiting processes before and after."""

    made: str
    site: str
    model: str
    flops: int
    batch_size: int
    seconds: float
    provenance: dict[str, Any]
    load: tuple[float, float]
    floor: float | None
    ceilings: dict[str, float]
    rows: list[Row]
    why: str

    @property
    def partition(self) -> str:
        """Slurm's partition; empty outside a job."""
        return self.provenance["slurm"].get("job_partition", "")

    @property
    def job(self) -> str:
        """Slurm's job id; empty outside a job."""
        return self.provenance["slurm"].get("job_id", "")

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        return self.provenance["machine"]["device"]

    @property
    def node(self) -> str:
        """What the device is called."""
        name = self.provenance["machine"]["device_name"]
        return f"GPU ({name})" if self.device == "cuda" else f"CPU Only ({name})"

    def row(self, what: str, precision: str) -> Row | None:
        """One stage, where it was measured."""
        return next((row for row in self.rows if (row.what, row.precision) == (what, precision)), None)


def measure(folder: str | Path, *, size: int = 1, model: str = "small", seconds: float = 10.0) -> Result:
    """One batch size on this machine: loader, model and both, in float32 and in the precision that is best here.

    Args:
        folder: with the official files; the train split is fed.
        size: patches a batch.
        model: a name of `networks.MODELS`.
        seconds: of measuring, ceilings and warm-up not counted.

    Raises:
        ConfigError: a batch size or a time below what can be measured, or an unknown model.
        ImpossibleError: a rate that the device cannot reach, so the measurement is wrong.
    """
    if size < 1 or seconds <= 0:
        raise ConfigError(f"--batch-size {size} --seconds {seconds:g}: both must be above 0")
    networks.settings(model)
    threads, before = seeding.set_threads(None), os.getloadavg()[0]
    device = choose_device("auto")
    patches = open_split(folder, "train")
    limits = roofline.ceilings(device)
    network = networks.network(model, patches, device)
    precisions = dict.fromkeys(("fp32", choose_precision("auto", device)))
    rows: list[Row] = []
    floor, why = None, ""
    try:
        found = throughput.stages(
            network, patches, size, limits, precisions=list(precisions), rounds=5, seconds=seconds
        )
        floor, rows = found.floor, [_row(row) for row in found.table]
    except RuntimeError as error:
        if not memory.exhausted(error):
            raise
        why = memory.OUT
    return Result(
        made=provenance.now(),
        site=os.environ.get("PCAM_SITE", ""),
        model=model,
        flops=roofline.flops(network, networks.batch(patches, 1, device)),
        batch_size=size,
        seconds=seconds,
        provenance=provenance.capture(device, threads=threads, synthetic=patches.synthetic is not None),
        load=(before, os.getloadavg()[0]),
        floor=floor,
        ceilings={row["what"]: row["best"] * 1e9 for row in limits.table()},
        rows=rows,
        why=why,
    )


def text(found: Result) -> str:
    """A result for the terminal."""
    where = f"job {found.job} in {found.partition}" if found.job else "no Slurm job"
    lines = [f"{found.model} model, batch {found.batch_size}, {found.node}, {where}"]
    for row in found.rows:
        low, high = row.interval
        lines.append(f"{row.what:12s} {row.precision:5s} {row.rate:10,.0f} img/s   95 % {low:,.0f} to {high:,.0f}")
    if found.floor is not None:
        lines.append(f"A against A differs by {found.floor:.1%}: no difference below it is one")
    return "\n".join([*lines, *([found.why] if found.why else [])])


def read(folder: str | Path) -> list[Result]:
    """Every result in a folder, the newest of each site, partition, device, model and batch size; none where none is.

    Raises:
        PcamError: a file is damaged.
    """
    newest: dict[tuple[Any, ...], Result] = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            found = Result.model_validate_json(path.read_bytes())
            key = (found.site, found.partition, found.device, found.model, found.batch_size)
        except (ValidationError, KeyError) as error:
            first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"no {error}"
            raise PcamError(f"{path}: no result of `pcam benchmark` ({first}); delete it, or measure again") from None
        if key not in newest or newest[key].made <= found.made:
            newest[key] = found
    return list(newest.values())


def jobs(
    results: Iterable[Result], partitions: Mapping[str, str] = PARTITIONS, size: int = 1, model: str = "small"
) -> list[dict[str, Any]]:
    """The journal's table: each partition asked for, and each other that was measured, at one batch size.

    A partition of the local test cluster stands in only where no other site's was measured.

    Returns:
        rows `Partition`, `Node Type`, `Throughput (img/s)`, `Job ID` (None where no job measured it), `img/s`, `95 %`,
        `threads`, `host`, `site`, `why`.
    """
    own = [found for found in results if found.job and (found.batch_size, found.model) == (size, model)]
    own.sort(key=lambda found: (found.site == LOCAL, found.made))
    asked = dict(partitions) | {found.partition: found.device for found in own if found.partition not in partitions}
    rows = []
    for partition, device in asked.items():
        there = [found for found in own if found.partition == partition]
        right = next((found for found in there if found.device == device and found.row(*STAGE)), None)
        rows.append({"Partition": f"`{partition}`", **(_measured(right) if right else _missing(device, there))})
    return rows


def table(results: Iterable[Result]) -> list[dict[str, Any]]:
    """A row a batch size that a job measured, with partition, device, model and job."""
    rows = []
    for found in sorted(results, key=lambda found: (found.partition, found.device, found.model, found.batch_size)):
        row = found.row(*STAGE)
        if found.job:
            about: dict[str, Any] = {"Partition": f"`{found.partition}`", "Node Type": found.node, "model": found.model}
            about |= {"batch size": found.batch_size, "img/s": row.rate if row else None}
            rows.append({**about, "95 %": row.interval if row else None, "Job ID": found.job, "why": found.why})
    return rows


def _measured(found: Result) -> dict[str, Any]:
    row = found.row(*STAGE)
    assert row is not None  # `jobs` looked
    machine = found.provenance["machine"]
    return {
        "Node Type": found.node,
        "Throughput (img/s)": f"{row.rate:,.0f}",
        "Job ID": found.job,
        "img/s": row.rate,
        "95 %": row.interval,
        "threads": machine["threads"],
        "host": machine["host"],
        "site": found.site,
        "why": "",
    }


def _missing(device: str, there: list[Result]) -> dict[str, Any]:
    why = "no job has measured it"
    if there:
        first = there[0]
        kinds = {"cpu": "CPU", "cuda": "GPU"}
        why = f"job {first.job}: {first.why or f'ran there on a {kinds[first.device]}, not on a {kinds[device]}'}"
    names = ("Throughput (img/s)", "Job ID", "img/s", "95 %", "threads", "host", "site")
    return {"Node Type": "CPU Only" if device == "cpu" else "GPU", **dict.fromkeys(names), "why": why}


def _row(row: Mapping[str, Any]) -> Row:
    """A row of `throughput.Stages` as it is stored."""
    return Row(
        what=row["what"],
        precision=row["precision"],
        rate=row["img/s"],
        interval=row["95 %"],
        p50_ms=row["p50 ms"],
        p90_ms=row["p90 ms"],
        p99_ms=row["p99 ms"],
        calls=row["calls"],
    )
