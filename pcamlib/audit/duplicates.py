"""Exact copies, also turned or mirrored: one invariant key a patch, pixels compared only where keys are equal.

The key is linear: sums over the pixels with weights of -1, 0 and 1 that are equal on every orbit of D4, so that all
eight views of a patch have the same sums. They are integers below 2**24, hence exact in float32 in any order.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pcamlib.audit.findings import Finding, Split
from pcamlib.audit.stream import Block
from pcamlib.data.layout import PATCH_BYTES, SIDE, SPLITS
from pcamlib.data.patches import take
from pcamlib.errors import DataError
from pcamlib.seeding import counter_uniform

SUMS = 16  # a patch
SHOWN = 50  # groups in the details of a finding, and members in a group
_ID = re.compile(r"[0-9a-fA-F]{40}")
_SURE = "certain: equal SHA-1 of the pixels, or every pixel compared under the symmetry"


class Member(NamedTuple):
    """A patch by split and row."""

    split: str
    row: int


@dataclass(frozen=True)
class Group:
    """Patches that are alike, two or more.

    Attributes:
        members: in the order of splits and rows.
        notes: for each, how it follows from the first; `view` is the element of D4, as `views` numbers them.
    """

    members: list[Member] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)

    def inside(self, split: str) -> np.ndarray:
        """(n,) int64: the members' rows in one split."""
        return np.array([row for name, row in self.members if name == split], np.int64)

    def add(self, member: Member, **note: Any) -> None:
        """Take one more in."""
        self.members.append(member)
        self.notes.append(note)

    def json(self) -> list[dict[str, Any]]:
        """Split, row and notes of the first members, at most `SHOWN`."""
        shown = zip(self.members[:SHOWN], self.notes, strict=False)
        return [{**member._asdict(), **note} for member, note in shown]


@cache
def _weights() -> tuple[torch.Tensor, np.ndarray]:
    """(27648, SUMS) float32 in -1, 0, 1, equal on the orbits of D4; (SUMS,) odd uint64 that mix the sums."""
    fold = np.minimum(np.arange(SIDE), SIDE - 1 - np.arange(SIDE))
    orbit = np.minimum.outer(fold, fold) * SIDE + np.maximum.outer(fold, fold)
    draws = counter_uniform(0, 0, np.arange(SIDE * SIDE), 3 * SUMS)[orbit]
    weights = (np.floor(draws * 3) - 1).astype(np.float32).reshape(PATCH_BYTES, SUMS)
    mixers = (counter_uniform(1, 0, np.arange(SUMS), 1)[:, 0] * 2**53).astype(np.uint64) << np.uint64(11)
    return torch.from_numpy(weights), mixers | np.uint64(1)


def keys(flat: torch.Tensor) -> np.ndarray:
    """(B, 27648) float32 of whole values 0..255 to (B,) uint64, equal for the eight views of a patch."""
    weights, mixers = _weights()
    sums = (flat @ weights).numpy().astype(np.int64).view(np.uint64)
    return (sums * mixers).sum(1, dtype=np.uint64)


def observe(block: Block) -> dict[str, np.ndarray]:
    """Columns of the streaming pass.

    Returns:
        `duplicates.key`: (B,) uint64, as `keys`; `duplicates.sha1`: (B, 20) uint8, SHA-1 of the HWC bytes, which is
        the patch's id in Kaggle's Histopathologic Cancer Detection.
    """
    digests = b"".join(map(_sha1, block.images))
    return {
        "duplicates.key": keys(block.flat),
        "duplicates.sha1": np.frombuffer(digests, np.uint8).reshape(-1, 20),
    }


def _sha1(image: np.ndarray) -> bytes:
    return hashlib.sha1(image.tobytes()).digest()


def views(image: np.ndarray) -> list[np.ndarray]:
    """The eight views of one (S, S, ...) patch: element e is `e % 4` quarter turns, mirrored sideways from 4 on."""
    turned = [np.rot90(image, turn) for turn in range(4)]
    return turned + [each[:, ::-1] for each in turned]


def groups(splits: dict[str, Split]) -> list[Group]:
    """Groups of equal patches over all splits jointly, ordered by their first member; flagged rows are left out."""
    names = list(splits)
    rows = [np.flatnonzero(splits[name].valid) for name in names]
    keys = np.concatenate([
        np.empty(0, np.uint64),
        *(splits[name].columns["duplicates.key"][here] for name, here in zip(names, rows, strict=True)),
    ])  # fmt: skip
    order, ends = np.argsort(keys, kind="stable"), np.cumsum([0, *map(len, rows)])
    edges = np.flatnonzero(np.r_[True, np.diff(keys[order]) != 0, True]) if len(keys) else np.empty(0, np.int64)
    repeated = np.flatnonzero(np.diff(edges) > 1)
    found: list[tuple[int, Group]] = []
    for start, stop in zip(edges[repeated], edges[repeated + 1], strict=True):
        same = order[start:stop]
        place = np.searchsorted(ends, same, "right") - 1
        members = [Member(names[p], int(rows[p][i - ends[p]])) for p, i in zip(place, same, strict=True)]
        found += [(int(same[0]), group) for group in _verify(splits, members)]
    return [group for _, group in sorted(found, key=lambda each: each[0])]


def _verify(splits: dict[str, Split], members: Sequence[Member]) -> list[Group]:
    """Part members of equal keys by their pixels: by SHA-1, and distinct ones under the eight views."""
    classes: list[tuple[list[np.ndarray], Group]] = []
    known: dict[bytes, tuple[Group, int]] = {}
    for member in members:
        image = take(splits[member.split].patches.images, member.row)
        digest = _sha1(image)
        if digest not in known:
            like = ((group, view) for seen, group in classes for view in range(8) if np.array_equal(seen[view], image))
            known[digest] = next(like, (Group(), 0))
            if not known[digest][0].members:
                classes.append((views(image), known[digest][0]))
        group, view = known[digest]
        group.add(member, view=view)
    return [group for _, group in classes if len(group.members) > 1]


def check(splits: dict[str, Split], found: list[Group] | None = None) -> list[Finding]:
    """Findings `duplicates.exact`, `duplicates.conflict` and `duplicates.leak`, at most one of each for a split.

    Args:
        splits: by name, with the columns of `observe`.
        found: what `groups` returned; None: search.
    """
    found = groups(splits) if found is None else found
    findings = [finding for name in splits for finding in _exact(name, found)]
    advice = "leave out every one: at most one of the two labels is right, and the pixels do not say which"
    findings += conflicts(splits, found, "duplicates.conflict", "equal pixels", _SURE, "conflicts", advice)
    return findings + leaks(splits, found, "duplicates.leak", "equal", _SURE)


def _exact(name: str, found: list[Group]) -> list[Finding]:
    inside = [(group, rows) for group in found if len(rows := group.inside(name)) > 1]
    if not inside:
        return []
    turned = 0
    for group, _ in inside:
        elements = [
            note["view"] for note, member in zip(group.notes, group.members, strict=True) if member.split == name
        ]
        turned += sum(element != elements[0] for element in elements)
    drop = np.sort(np.concatenate([rows[1:] for _, rows in inside]))
    as_is = len(drop) - turned
    return [
        Finding(
            "duplicates.exact", name,
            f"{len(drop):,} patches repeat {len(inside):,} others: {as_is:,} unchanged, {turned:,} turned or mirrored",
            np.sort(np.concatenate([rows for _, rows in inside])), _SURE,
            "keep the first of each group: a repeated patch counts twice in the loss and in every metric",
            "duplicates", drop,
            {"groups": len(inside), "identical": as_is, "turned": turned,
             "largest": max(len(rows) for _, rows in inside), "shown": [group.json() for group, _ in inside[:SHOWN]]},
        )
    ]  # fmt: skip


def conflicts(
    splits: dict[str, Split], found: Iterable[Group], check: str, how: str, sure: str, rule: str | None, advice: str
) -> list[Finding]:
    """One finding for each split that has members of groups in which both labels occur."""
    labels = {name: split.labels for name, split in splits.items()}

    def torn(group: Group) -> bool:
        known = {int(here[row]) for name, row in group.members if (here := labels[name]) is not None}
        return len(known) > 1

    disputed, findings = [group for group in found if torn(group)], []
    for name in splits:
        here = [group for group in disputed if len(group.inside(name))]
        if here:
            rows = np.unique(np.concatenate([group.inside(name) for group in here]))
            what = f"{len(rows):,} patches of {len(here):,} groups of {how} under both labels"
            details = {"groups": len(here), "shown": [group.json() for group in here[:SHOWN]]}
            drop = rows if rule else np.empty(0, np.int64)
            findings.append(Finding(check, name, what, rows, sure, advice, rule, drop, details))
    return findings


def leaks(splits: dict[str, Split], found: Iterable[Group], check: str, how: str, sure: str) -> list[Finding]:
    """One finding for each split whose rows have their like in a later one: train before valid before test."""
    order, findings = [name for name in SPLITS if name in splits], []
    crossing = [group for group in found if len({member.split for member in group.members}) > 1]
    for place, name in enumerate(order):
        later = order[place + 1 :]
        here = [group for group in crossing if len(group.inside(name)) and any(len(group.inside(s)) for s in later)]
        if here:
            rows = np.unique(np.concatenate([group.inside(name) for group in here]))
            across = {other: len({row for group in here for row in group.inside(other)}) for other in later}
            others = " and ".join(f"{count:,} of {other}" for other, count in across.items() if count)
            what = f"{len(rows):,} patches are {how} to {others}"
            advice = f"leave them out of {name}: a model that has seen them is measured too well"
            details = {"groups": len(here), "across": across, "shown": [group.json() for group in here[:SHOWN]]}
            findings.append(Finding(check, name, what, rows, sure, advice, "leak", rows, details))
    return findings


def read_ids(path: str | Path) -> set[bytes]:
    """Published ids: a SHA-1 in hex a line, or a CSV with them in column `id`, else the first; a header may lead.

    Raises:
        DataError: unreadable, without ids, or a line without one, with its number.
    """
    column, ids = 0, set()
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            for number, cells in enumerate(csv.reader(handle), 1):
                names = [cell.strip().lower() for cell in cells]
                if number == 1 and all(name.isidentifier() and not _ID.fullmatch(name) for name in names):
                    column = names.index("id") if "id" in names else 0
                elif any(names):
                    value = names[column].removesuffix(".tif") if column < len(names) else ""
                    if not _ID.fullmatch(value):
                        raise DataError(f"{path}: line {number}: '{value[:50]}' is no id (SHA-1, 40 hex digits)")
                    ids.add(bytes.fromhex(value))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a list of ids ({error})") from None
    if not ids:
        raise DataError(f"{path}: holds no ids; a SHA-1 of 40 hex digits a line is expected")
    return ids


def authenticate(splits: dict[str, Split], ids_file: str | Path) -> list[Finding]:
    """How many patches carry a published id, one finding `duplicates.authentic` a split; its rows are the unknown ones.

    Kaggle's Histopathologic Cancer Detection names its PCam patches, each distinct one once, by the SHA-1 of their
    bytes; one changed pixel makes a patch unknown. Flagged rows are left out.

    Raises:
        DataError: as `read_ids`.
    """
    ids, findings = read_ids(ids_file), []
    for name, split in splits.items():
        rows = np.flatnonzero(split.valid)
        digests = split.columns["duplicates.sha1"]
        known = np.array([digests[row].tobytes() in ids for row in rows], bool)
        findings.append(
            Finding(
                "duplicates.authentic", name,
                f"{known.sum():,} of {len(rows):,} patches carry one of {len(ids):,} published ids",
                rows[~known], "certain: SHA-1 of the bytes compared with the list",
                "look at the unknown ones: changed in at least one pixel, or from a part that the list does not cover",
                details={"known": int(known.sum()), "patches": len(rows), "ids": len(ids)},
            )
        )  # fmt: skip
    return findings
