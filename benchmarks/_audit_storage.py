"""Storage, leakage and resampling: factors that multiply to the file, leaks of known size, estimators side by side."""

from __future__ import annotations

import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h5py
import numpy as np
from _rows import row

from pcamlib.audit import leakage, resampling, storage
from pcamlib.audit.findings import Split
from pcamlib.data.layout import PATCH_SHAPE, inspect, present, split_path
from pcamlib.data.patches import open_split
from pcamlib.data.plants import leak_slides
from pcamlib.data.rewrite import Plan
from pcamlib.data.slides import read_slides
from pcamlib.data.synthetic import generate

SIZES = {"train": 4000, "valid": 1000}
LAYOUTS: dict[str, dict[str, Any]] = {
    "(2048, 6, 6, 1) gzip": {"chunks": (2048, 6, 6, 1), "compression": "gzip"},
    "(64, 96, 96, 3) gzip": {"chunks": (64, 96, 96, 3), "compression": "gzip"},
    "(64, 96, 96, 3)": {"chunks": (64, 96, 96, 3)},
}


def _opened(folder: Path) -> dict[str, Split]:
    found = {name: open_split(folder, name) for name in present(folder)}
    return {name: Split(p, {}, read_slides(folder, name, len(p))) for name, p in found.items()}


def _layouts(images: np.ndarray, kind: str, folder: Path) -> list[dict[str, Any]]:
    rows, off = [], 0.0
    for name, options in LAYOUTS.items():
        place = folder / name.replace(" ", "")
        place.mkdir()
        with h5py.File(split_path(place, "test", "x"), "w") as file:
            file.create_dataset("x", data=images, **options)
        patches = open_split(place, "test")
        account = storage.account(patches.stored)
        off = max(off, abs(math.prod(account.factors.values()) - account.size))
        rates = storage.speed(patches.stored, patches.images)
        rows.append(row(
            f"random patches after conversion, {name}", rates["after"], "img/s", n=int(rates["n"]),
            against=f"h5py as it lies, {rates['before']:,.1f} img/s, {kind}", ratio=rates["after"] / rates["before"],
            bar="RATIO>=10",
        ))  # fmt: skip
    rows.append(row("product of the factors, off by", off, "bytes", n=len(LAYOUTS), bar="VALUE<=0.5"))
    held = storage.content(patches.stored)
    rows += [row(f"{form} leaves of a raw byte, {kind}", held[form], "", n=held["n"])
             for form in ("uint8 gzip", "float32 gzip", "float32 gzip shuffled", "png")]  # fmt: skip
    return rows


def _course(folder: Path) -> list[dict[str, Any]]:
    """The course's 17 GB file without its pixels."""
    path = split_path(folder, "train", "x")
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (157_286, *PATCH_SHAPE), np.float32)[157_285] = 1
    began = time.perf_counter()
    stored = inspect(path, "x")
    found = storage.compare(storage.account(stored), storage.official("train"), storage.content(stored))
    spent = time.perf_counter() - began
    right = [e["claim"] for e in found["explanations"] if e["verdict"] != "refuted"] == ["float32 instead of uint8"]
    return [
        row("17 GB course file explained in", spent, "s", n=1, against=found["sentence"], bar="VALUE<=5"),
        row("and by float32 alone", float(right), "", n=len(found["explanations"]), bar="VALUE>=1"),
    ]


def _strays(source: Path, folder: Path, rounds: int) -> list[dict[str, Any]]:
    hits, said, planted = 0, 0, 0
    for seed in range(rounds):
        plan = Plan(source, seed=seed)
        leak_slides(plan, 5 * 3**seed)
        truth = plan.write(folder / f"leak{seed}").rows
        (finding,) = [f for f in leakage.check(_opened(folder / f"leak{seed}")) if f.check == "leakage.slides"]
        for name, rows in finding.details["strays"].items():
            true = set(truth[f"{name}/leaked"].tolist())
            hits, said, planted = hits + len(true & set(rows)), said + len(rows), planted + len(true)
    return [
        row("exchanged rows among strays, recall", hits / planted, "", n=planted, bar="VALUE>=1"),
        row("exchanged rows among strays, precision", hits / said, "", n=said, bar="VALUE>=1"),
    ]


def _probe(splits: dict[str, Split], kind: str, rounds: int) -> list[dict[str, Any]]:
    """Groups are equal patches, so that only copies across the splits could leak."""
    groups = {name: np.array([bytes(one) for one in split.patches.ids]) for name, split in splits.items()}
    rows = []
    for planted, bar in ((0.0, "VALUE<=0.51"), (0.01, "VALUE>=0.503"), (0.1, "VALUE>=0.57")):
        found = [leakage.permutation_probe(splits, groups, planted=planted, seed=seed) for seed in range(rounds)]
        score = f"AUC on true labels {np.mean([f['score'] for f in found]):.3f}"
        if planted:
            score += f", {np.mean([f['score_without'] for f in found]):.3f} without the leak"
        rows.append(row(f"AUC under random labels, {planted:.0%} copies, {kind}",
                        float(np.mean([f["value"] for f in found])), "", n=rounds, against=score, bar=bar))  # fmt: skip
    return rows


def _resampling(splits: dict[str, Split], kind: str) -> list[dict[str, Any]]:
    began = time.process_time()
    table = resampling.reflection(splits["train"], splits["valid"])
    spent = time.process_time() - began
    once, _, plain, grouped, chosen, nested, *_ = table
    rows = [
        row(f"reflection, {sum(r['fits'] for r in table)} fits a draw, {kind}", spent, "CPU s", n=20, bar="VALUE<=30"),
        row(f"sd of one hold-out, {kind}", once["sd"], "AUC", n=20, against=f"5-fold {plain['sd']:.4f}",
            ratio=once["sd"] / plain["sd"], bar="RATIO>=1.5"),
        row(f"best of 12 over nested, {kind}", chosen["estimate"] - nested["estimate"], "AUC", n=20, bar="VALUE>=0"),
    ]  # fmt: skip
    if grouped["values"]:
        gain = plain["estimate"] - grouped["estimate"]
        rows.append(row(f"5-fold over 5-fold by slide, {kind}", gain, "AUC", n=20, bar="VALUE>=0"))
    return rows


def rows(real: Path | None, rounds: int) -> list[dict[str, Any]]:
    """Every row; slides are synthetic always, since the real subset has none."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        generate(folder / "made", seed=1, sizes=SIZES, report=lambda line: None)
        made = _opened(folder / "made")
        sets = {"synthetic": made} if real is None else {"real": _opened(real)}
        kind, splits = next(iter(sets.items()))
        table = _layouts(splits["train"].patches.images[:2048], kind, folder)
        table += _course(folder) + _strays(folder / "made", folder, min(rounds, 4)) + _probe(splits, kind, rounds)
        for kind, splits in {"synthetic": made, **sets}.items():
            table += _resampling(splits, kind)
        return table
