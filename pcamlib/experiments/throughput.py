"""Images a second: of the model alone, of the loader alone, of both, and over batch sizes.

    pcam benchmark --data DIR --batch-size 1 --model small --out FILE.json

MLPerf's names for what is measured: SingleStream is the 90 % latency of batch 1, Offline the best images a second of
any batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pcamlib.data.loader import Batch, Loader
from pcamlib.data.patches import Patches
from pcamlib.experiments import memory, roofline, timing
from pcamlib.experiments.networks import batch, forward
from pcamlib.models import Classifier

COLUMNS = (
    "img/s", "95 %", "p50 ms", "p90 ms", "p99 ms", "calls", "GB/s", "share of copy", "GFLOP/s", "share of product",
)  # fmt: skip
TOLERANCE = 0.05  # a batch within 5 % of the best is as good


def endless(loader: Loader) -> Iterator[Batch]:
    """Its batches, epoch after epoch."""
    while True:
        yield from loader


def rate(timed: timing.Timed, seconds: np.ndarray) -> dict[str, Any]:
    """What rounds say of one kind: `img/s` (median), its interval `95 %`, latency.

    Args:
        timed: the kind.
        seconds: (rounds,) of a call.
    """
    value, interval = timing.median(timed.images / seconds)
    return {"img/s": value, "95 %": interval, **timing.latency(timed.each)}


def kinds(
    model: Classifier, patches: Patches, size: int, *, precisions: Sequence[str] = ("fp32",), device: str = "cpu"
) -> dict[tuple[str, str], timing.Timed]:
    """What is to be timed at one batch size, by name and precision: the model, both in turn, and the loader.

    The loader gathers whole patches in file order and sends them to the device; the model has one batch there already;
    end to end, the logits also come back to the host.
    """
    rows = np.resize(np.arange(len(patches)), size * max(1, len(patches) // size))  # whole batches alone
    shared = endless(Loader(patches, rows, batch_size=size, sampler="sequential", device=device, pin=device == "cuda"))
    images = batch(patches, size, device)
    found = {}
    for name in precisions:
        run = forward(model, name)
        found["model only", name] = timing.Timed(lambda run=run: run(images), size, device)  # type: ignore[misc]
        found["end to end", name] = timing.Timed(
            lambda run=run: run(next(shared).images).cpu(),  # type: ignore[misc]
            size,
            device,
        )
    return found | {("loader only", ""): timing.Timed(lambda: next(shared), size, device)}


def single_stream(
    model: Classifier, patches: Patches, *, precision: str = "fp32", device: str = "cpu", calls: int = 200
) -> dict[str, float | int | None]:
    """`timing.latency` of one patch at a time, from the file to the logits on the host, over this many patches."""
    timed = kinds(model, patches, 1, precisions=(precision,), device=device)["end to end", precision]
    timed.calls = calls
    timed()
    return timing.latency(timed.each)


@dataclass(frozen=True)
class Stages:
    """The stages at one batch size.

    Attributes:
        table: rows `what`, `precision`, `batch size`, those of `rate` and `roofline.implied`.
        floor: A against A, of the model alone in the first precision.
        serial: time of a batch end to end over that of loader and model added up, by precision, with its interval.
        rounds: behind each number.
    """

    table: list[dict[str, Any]]
    floor: float
    serial: dict[str, tuple[float, tuple[float, float]]]
    rounds: int


def stages(
    model: Classifier,
    patches: Patches,
    size: int,
    limits: roofline.Ceilings,
    *,
    precisions: Sequence[str] = ("fp32",),
    rounds: int = 11,
    seconds: float | None = None,
) -> Stages:
    """Loader only, model only and end to end at one batch size, in interleaved rounds, checked against the ceilings.

    Args:
        model: in eval mode, on the device.
        patches: which to feed.
        size: patches a batch.
        limits: of the device.
        precisions: fp32, bf16, fp16.
        rounds: of each stage; with `seconds` at least.
        seconds: as many rounds as fit.

    Raises:
        ImpossibleError: a rate that the device cannot reach, so the measurement is wrong.
    """
    found = kinds(model, patches, size, precisions=precisions, device=limits.device)
    if seconds is not None:
        rounds = max(rounds, round(seconds / sum(timed() * timed.calls for timed in found.values())))
    taken = timing.alternating(list(found.values()), rounds)
    column = dict(zip(found, taken.T, strict=False))
    work = roofline.flops(model, batch(patches, 1, limits.device))
    table = []
    for (what, precision), timed in found.items():
        row = {"what": what, "precision": precision, "batch size": size, **rate(timed, column[what, precision])}
        claim = roofline.Claim(row["img/s"], roofline.PATCH, work if precision else 0, precision or "fp32")
        row |= roofline.check(claim, limits)
        table.append(row if precision else {**row, "GFLOP/s": None, "share of product": None})
    added = {name: column["loader only", ""] + column["model only", name] for name in precisions}
    serial = {name: timing.ratio(column["end to end", name], added[name]) for name in precisions}
    return Stages(table, timing.floor(taken), serial, rounds)


@dataclass(frozen=True)
class Plateau:
    """Where more patches a batch stop paying: the smallest batch whose rate is within `tolerance` of the best.

    `low` to `high` is the 95 % interval of that batch over resampled rounds; `reached` says whether a larger batch was
    measured, so that there is a plateau to see.
    """

    size: int
    low: int
    high: int
    reached: bool
    tolerance: float


def plateau(sizes: Sequence[int], seconds: np.ndarray, floor: float) -> Plateau:
    """The plateau of (rounds, sizes) seconds of a batch; what lies within 5 %, or the floor if larger, is the same."""
    tolerance = max(TOLERANCE, floor)
    rates = np.asarray(sizes) / seconds

    def smallest(chosen: np.ndarray) -> np.ndarray:
        medians = np.median(rates[chosen], -2)
        return np.asarray(sizes)[np.argmax(medians >= (1 - tolerance) * medians.max(-1, keepdims=True), -1)]

    drawn = smallest(timing.resampled(len(rates)))
    low, high = np.percentile(drawn, [2.5, 97.5], method="nearest")
    size = int(smallest(np.arange(len(rates))))
    return Plateau(size, int(low), int(high), size < max(sizes), tolerance)


@dataclass(frozen=True)
class Scaling:
    """Throughput over batch sizes.

    Attributes:
        table: rows `model`, `batch size`, `precision`, those of `rate` and `roofline.implied` (None where a size was
            not measured), and `why` it was not.
        plateaus: by model.
        floors: A against A at the middle one of the sizes, by model.
    """

    table: list[dict[str, Any]]
    plateaus: dict[str, Plateau]
    floors: dict[str, float]

    def plateau_rows(self) -> list[dict[str, Any]]:
        """A row a model: where it is flat, its best rate, and whether a larger batch was measured at all."""
        return [
            {
                "model": name,
                "batch size": flat.size,
                "95 %": (flat.low, flat.high),
                "reached": flat.reached,
                "best img/s": max(row["img/s"] for row in self.table if row["model"] == name and row["img/s"]),
                "tolerance": flat.tolerance,
            }
            for name, flat in self.plateaus.items()
        ]


def scaling(
    models: Mapping[str, Classifier],
    patches: Patches,
    sizes: Sequence[int],
    limits: roofline.Ceilings,
    *,
    precision: str = "fp32",
    rounds: int = 7,
    longest: float = 1.0,
) -> Scaling:
    """The models alone at each batch size, sizes alternating within a round.

    Args:
        models: by name.
        patches: which to feed.
        sizes: rising.
        limits: of the device.
        precision: fp32, bf16 or fp16.
        rounds: of each size.
        longest: seconds that one batch may take; a larger batch is left out, and its row says so.
    """
    table, plateaus, floors = [], {}, {}
    for name, model in models.items():
        timed, gone = _sized(forward(model, precision), patches, sizes, limits.device, longest)
        there = list(timed)
        middle = len(there) // 2  # comes first, and so is compared with itself: small batches are all noise
        order = [*there[middle:], *there[:middle]]
        taken = timing.alternating([timed[size] for size in order], rounds)
        seconds = dict(zip(order, taken.T, strict=False))
        work = roofline.flops(model, batch(patches, 1, limits.device))
        for size in sizes:
            row: dict[str, Any] = {"model": name, "batch size": size, "precision": precision, **dict.fromkeys(COLUMNS)}
            if size in timed:
                row |= rate(timed[size], seconds[size])
                row |= roofline.check(roofline.Claim(row["img/s"], roofline.PATCH, work, precision), limits)
            table.append({**row, "why": gone.get(size, "")})
        floors[name] = timing.floor(taken)
        plateaus[name] = plateau(there, np.stack([seconds[size] for size in there], 1), floors[name])
    return Scaling(table, plateaus, floors)


def _sized(
    run: Callable[[torch.Tensor], object], patches: Patches, sizes: Sequence[int], device: str, longest: float
) -> tuple[dict[int, timing.Timed], dict[int, str]]:
    """What can be timed, by size, and why the others cannot."""
    timed: dict[int, timing.Timed] = {}
    gone: dict[int, str] = {}
    for size in sizes:
        expected = timed[max(timed)].about * size / max(timed) if timed else 0.0
        if expected > longest:
            gone[size] = f"left out: a batch would take about {expected:.2g} s"
            continue
        try:
            images = batch(patches, size, device)
            timed[size] = timing.Timed(lambda images=images: run(images), size, device)  # type: ignore[misc]
        except RuntimeError as error:
            if not memory.exhausted(error):
                raise
            gone[size] = "out of memory"
    return timed, gone


def plot_scaling(found: Scaling, used: Sequence[Mapping[str, Any]], limit: float) -> Figure:
    """Images a second and memory over the batch size, a line a model; a ring marks the plateau, a cross what failed.

    Args:
        found: what was measured.
        used: rows of `memory.measure`, of all models.
        limit: MiB that a batch was allowed.
    """
    figure, (fast, full) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, flat in found.plateaus.items():
        rows = [row for row in found.table if row["model"] == name and row["img/s"]]
        x, y = [row["batch size"] for row in rows], [row["img/s"] for row in rows]
        bars = np.abs(np.array([row["95 %"] for row in rows]).T - y)
        drawn = fast.errorbar(x, y, bars, marker=".", capsize=2, label=name)[0]
        fast.plot(flat.size, y[x.index(flat.size)], "o", ms=11, mfc="none", color=drawn.get_color())
        held = [row for row in used if row["model"] == name]
        fits = [row for row in held if row["MiB"] is not None]
        full.plot([row["batch size"] for row in fits], [row["MiB"] for row in fits], ".-", color=drawn.get_color())
        failed = [row["batch size"] for row in held if row["MiB"] is None]
        full.plot(failed, [limit] * len(failed), "x", ms=8, mew=2, color=drawn.get_color())
    full.axhline(limit, ls=":", lw=1, color="gray")
    fast.set(xscale="log", yscale="log", xlabel="batch size", ylabel="images a second")
    full.set(xscale="log", yscale="log", xlabel="batch size", ylabel="memory of a batch (MiB)")
    for axis in (fast.xaxis, fast.yaxis, full.xaxis, full.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.0f}"))
    fast.legend(frameon=False)
    return figure
