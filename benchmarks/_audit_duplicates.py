"""Copies: the invariant key against eight hashes a patch; near copies planted into real or synthetic patches."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from _rows import interleaved, row

from pcamlib.audit import duplicates, near
from pcamlib.audit.duplicates import Member
from pcamlib.audit.findings import Split
from pcamlib.audit.stream import Block
from pcamlib.data.layout import SPLITS, split_path
from pcamlib.data.patches import Patches, open_split
from pcamlib.data.plants import copies
from pcamlib.data.rewrite import Plan
from pcamlib.data.synthetic import generate

KINDS: tuple[Literal["jpeg", "shift", "brightness"], ...] = ("jpeg", "shift", "brightness")
BLOCK = 64


def observed(patches: Patches) -> Split:
    """The split with the columns of `duplicates` and `near`."""
    columns: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(patches), BLOCK):
        images = np.array(patches.images[start : start + BLOCK])
        block = Block(start, images, images, np.zeros(len(images), np.uint8))
        for module in (duplicates, near):
            for name, column in module.observe(block).items():
                columns.setdefault(name, []).append(column)
    return Split(patches, {name: np.concatenate(parts) for name, parts in columns.items()})


def eight_hashes(patches: Patches) -> list[list[int]]:
    """Groups of equal patches by the smallest SHA-1 of the eight views."""
    found: dict[bytes, list[int]] = {}
    for i, image in enumerate(patches.images):
        views = (np.ascontiguousarray(view) for view in duplicates.views(np.asarray(image)))
        found.setdefault(min(hashlib.sha1(view).digest() for view in views), []).append(i)
    return [rows for rows in found.values() if len(rows) > 1]


def by_key(patches: Patches) -> list[list[int]]:
    """The same by `duplicates`: key of every patch, pixels of those whose keys are equal."""
    keys = []
    for start in range(0, len(patches), BLOCK):
        images = np.array(patches.images[start : start + BLOCK])
        keys.append(duplicates.keys(torch.from_numpy(images).flatten(1).float()))
    found = duplicates.groups({"train": Split(patches, {"duplicates.key": np.concatenate(keys)})})
    return [group.inside("train").tolist() for group in found]


def exact(source: Path, folder: Path, label: str, rounds: int) -> list[dict[str, Any]]:
    """Speed and agreement on 2,000 patches, 10 % of them copies."""
    plan = Plan(source, seed=1)
    plan.keep("train", np.arange(2000))
    copies(plan, 100, how="exact")
    copies(plan, 100, how="d4")
    plan.write(folder)
    patches = open_split(folder, "train")
    assert patches.valid.all()
    results: dict[str, list[list[int]]] = {}

    def rate(name: str, way: Any) -> float:
        began = time.perf_counter()
        results[name] = way(patches)
        return len(patches) / (time.perf_counter() - began)

    ways = {"key": by_key, "eight": eight_hashes}
    rates = interleaved({name: lambda name=name: rate(name, ways[name]) for name in ways}, rounds)
    ours, truth = ({pair for rows in results[name] for pair in pairwise(rows)} for name in ways)
    return [
        row(f"exact copies under D4, {label}", rates["key"], "patch/s", n=rounds, against="8 SHA-1 a patch",
            ratio=rates["key"] / rates["eight"], bar="RATIO>=8"),
        row("  recall", len(ours & truth) / len(truth), "", n=len(truth), against="8 SHA-1 a patch", bar="VALUE>=1"),
        row("  precision", len(ours & truth) / len(ours), "", n=len(ours), against="8 SHA-1 a patch", bar="VALUE>=1"),
    ]  # fmt: skip


def repeated(splits: dict[str, Split]) -> list[dict[str, Any]]:
    """The counts that are known of the real subset."""
    found = duplicates.groups(splits)
    labels = splits["train"].labels
    assert labels is not None
    extra = sum(int(labels[group.inside("train")[1:]].sum()) for group in found)
    across = sum(len({member.split for member in group.members}) > 1 for group in found)
    return [
        row("repeated positives in train, real", extra, "patches", n=len(splits["train"]), bar="VALUE>=829"),
        row("groups across splits, real", across, "groups", n=len(found), bar="VALUE<=0"),
    ]


def alike(splits: dict[str, Split]) -> dict[Member, set[Member]]:
    """What the clean data hold of themselves: equal patches and overlapping cut-outs, to be told from the planted."""
    groups = duplicates.groups(splits)
    found: dict[Member, set[Member]] = {}
    pairs = [(pair.first, pair.second) for pair in near.search(splits, groups).pairs]
    for one, two in pairs + [(group.members[0], other) for group in groups for other in group.members[1:]]:
        found.setdefault(one, set()).add(two)
        found.setdefault(two, set()).add(one)
    return found


def planted(source: Path, folder: Path, clean: dict[str, Split], label: str) -> list[dict[str, Any]]:
    """Recall by kind, precision over all: a pair is right when its origins are the same, or alike in the clean data."""
    count = 600 if len(clean["train"]) >= 20_000 else 200
    plan = Plan(source, seed=2)
    for kind in KINDS:
        copies(plan, count, how=kind)
    copies(plan, count // 3, how="jpeg", into="valid")
    truth = plan.write(folder)
    splits = {name: observed(open_split(folder, name)) for name in clean}
    groups, natural = duplicates.groups(splits), alike(clean)
    began = time.perf_counter()
    found = [(p.first, p.second) for p in near.search(splits, groups).pairs if p.evidence.copied]
    seconds = time.perf_counter() - began
    first = {member: group.members[0] for group in groups for member in group.members}

    def origin(member: Member) -> Member:
        number, place = plan.origin[member.split][member.row]
        return Member(SPLITS[number], int(place))

    def right(one: Member, two: Member) -> bool:
        one, two = origin(one), origin(two)
        return one == two or bool(({one} | natural.get(one, set())) & ({two} | natural.get(two, set())))

    couples = {frozenset(pair) for pair in found}
    rows = []
    for key, pairs in truth.rows.items():
        here, there = ["train", "valid"] if ">" in key else ["train", "train"]
        wanted = {frozenset(first.get(m, m) for m in (Member(here, int(a)), Member(there, int(b)))) for a, b in pairs}
        wanted = {pair for pair in wanted if len(pair) == 2}
        rows.append(row(f"near copies, {label}: {key}", len(wanted & couples) / len(wanted), "recall",
                        n=len(wanted), bar="VALUE>=0.95"))  # fmt: skip
    precision = float(np.mean([right(*pair) for pair in found]))
    size = sum(map(len, splits.values()))
    return [
        *rows,
        row(f"near copies, {label}: all", precision, "precision", n=len(found), bar="VALUE>=0.95"),
        row(f"near copies, {label}: search", size / seconds, "patch/s", n=1),
    ]


def rows(real: Path | None, rounds: int) -> list[dict[str, Any]]:
    """All rows; on synthetic patches where there are no real ones."""
    with tempfile.TemporaryDirectory() as place:
        cache, os.environ["PCAM_CACHE"] = os.environ.get("PCAM_CACHE"), f"{place}/cache"
        try:
            source, label = real or Path(place, "source"), "real" if real else "synthetic"
            if real is None:
                generate(source, seed=0, sizes={"train": 4000, "valid": 500}, report=lambda line: None)
            found = exact(source, Path(place, "exact"), label, rounds)
            names = [name for name in ("train", "valid") if split_path(source, name, "x").exists()]
            clean = {name: observed(open_split(source, name)) for name in names}
            found += repeated(clean) if real else []
            return found + planted(source, Path(place, "near"), clean, label)
        finally:
            os.environ.pop("PCAM_CACHE")
            if cache is not None:
                os.environ["PCAM_CACHE"] = cache
