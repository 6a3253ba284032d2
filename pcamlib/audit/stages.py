"""The stages of an audit in their order: which checks, which rules they feed, and when they are wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pcamlib import seeding
from pcamlib.audit import backdoor, duplicates, frequency, integrity, labels, leakage, near, poison, storage
from pcamlib.audit.findings import Finding, Split
from pcamlib.training import runs

Result = tuple[list[Finding], dict[str, Any]]  # findings, and facts measured whether or not anything is wrong


@dataclass(frozen=True)
class Options:
    """What is looked for beyond the streaming pass.

    Attributes:
        labels: wrong labels, by training small networks out of fold; `seconds`: CPU time for it, None: 30 and 7.5 ms
            a patch, at most 300.
        models: backdoors, by training a network and looking into it.
        ids: a list of tile ids to authenticate the patches by.
        run: a run folder whose normalisation is checked.
        seed: of everything that is drawn.
    """

    labels: bool = True
    seconds: float | None = None
    models: bool = False
    ids: Path | None = None
    run: Path | None = None
    seed: int = 0


@dataclass(eq=False)
class Subject:
    """What is audited: splits and options, and the copies among the patches, which several stages ask for."""

    splits: dict[str, Split]
    options: Options

    @cached_property
    def exact(self) -> list[duplicates.Group]:
        """Groups of equal patches."""
        return duplicates.groups(self.splits)

    @cached_property
    def near(self) -> near.Near:
        """Nearly equal patches."""
        return near.search(self.splits, self.exact)

    @cached_property
    def copies(self) -> dict[str, np.ndarray]:
        """By split, (N,) int64: equal numbers are copies over all splits; negative: a patch without any."""
        ends = np.cumsum([0, *map(len, self.splits.values())])
        alone = {name: -1 - np.arange(ends[i], ends[i + 1]) for i, name in enumerate(self.splits)}
        for number, group in enumerate([*self.near.groups, *self.exact]):
            known = [alone[split][row] for split, row in group.members if alone[split][row] >= 0]
            for split, row in group.members:
                alone[split][row] = known[0] if known else number
        return alone

    @cached_property
    def planted(self) -> list[Finding]:
        """Patterns that were planted."""
        return poison.check(self.splits)


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: as in the report, and the first part of its checks' names.
        run: makes the result.
        rules: that its findings may feed.
        wanted: whether the options ask for it.
        settings: what of the options changes its result.
    """

    name: str
    run: Callable[[Subject], Result]
    rules: tuple[str, ...] = ()
    wanted: Callable[[Options], bool] = lambda options: True
    settings: Callable[[Options], Any] = lambda options: None


def _storage(subject: Subject) -> Result:
    accounts = {}
    for name, split in subject.splits.items():
        stored = split.patches.stored
        accounts[name] = storage.compare(storage.account(stored), storage.official(name), storage.content(stored))
    first = next(iter(accounts))
    return storage.check(subject.splits), {
        "summary": f"{first} has {accounts[first]['sentence']}",
        "accounts": accounts,
    }


def _duplicates(subject: Subject) -> Result:
    findings = duplicates.check(subject.splits, subject.exact)
    if subject.options.ids:
        known = duplicates.authenticate(subject.splits, subject.options.ids)
        findings += [finding for finding in known if len(finding.rows)]
        return findings, {"summary": "; ".join(f"{finding.split}: {finding.what}" for finding in known)}
    return findings, {}


def _leakage(subject: Subject) -> Result:
    findings = leakage.check(subject.splits)
    if subject.options.run:
        findings += leakage.normalisation(runs.open_run(subject.options.run), subject.splits)
    return findings, {"assignment": leakage.assignment(subject.splits)}


def _backdoor(subject: Subject) -> Result:
    train, valid = subject.splits.get("train"), subject.splits.get("valid")
    if train is None or valid is None or train.labels is None or valid.labels is None:
        return [], {"summary": "a backdoor is looked for where train and valid have labels", "table": []}
    seed = subject.options.seed
    with seeding.workers() as pool:
        network = pool.submit(backdoor.inspect, train, valid, subject.planted, seed=seed)
        spectrum, found = pool.submit(frequency.detect, train, seed=seed).result(), network.result()
    learned = sum(verdict.success.learned for verdict in found)
    summary = f"{len(found)} patterns stamped on valid patches, {learned} of them learned as a backdoor by a network"
    ruled = np.concatenate([np.empty(0, np.int64), *(f.drop for f in subject.planted if f.split == "train")])
    both = np.count_nonzero(np.isin(spectrum.rows, ruled))
    said = f"{spectrum.text}; {both:,} of these rows are also named by the rules"
    return [], {"summary": f"{summary}. {said}.", "table": [verdict.row() for verdict in found], "frequency": said}


def _labels(subject: Subject) -> Result:
    options, patches = subject.options, sum(map(len, subject.splits.values()))
    seconds = options.seconds or min(30 + 0.0075 * patches, 300.0)
    return labels.check(subject.splits, seconds=seconds, seed=options.seed, groups=subject.copies), {}


def _ids(options: Options) -> Any:
    return options.ids and sorted(map(bytes.hex, duplicates.read_ids(options.ids)))


def _run(options: Options) -> Any:
    return options.run and runs.open_run(options.run).provenance


STAGES = (
    Stage("storage", _storage),
    Stage("integrity", lambda subject: (integrity.check(subject.splits), {})),
    Stage("duplicates", _duplicates, ("duplicates", "conflicts", "leak"), settings=_ids),
    Stage("near", lambda subject: (near.check(subject.splits, subject.exact, subject.near), {}), ("near", "leak")),
    Stage("leakage", _leakage, ("leak",), settings=_run),
    Stage("poison", lambda subject: (subject.planted, {}), ("poison",)),
    Stage("backdoor", _backdoor, wanted=lambda options: options.models, settings=lambda options: options.seed),
    Stage("labels", _labels, ("labels",), wanted=lambda options: options.labels,
          settings=lambda options: (options.seconds, options.seed)),
)  # fmt: skip
