"""data.lock: the version of every data set that the journal's evidence rests on.

    pcam data lock             # written from the evidence, as `make journal` does at its end
    pcam data lock --check     # exit code 1: evidence rests on other data than the lock names

One entry a data set: what the notebooks call it, its fingerprint (SHA-256 over pixels, flags and labels), whether it is
synthetic, and which notebooks rest on it. Committed, so that a merge of results made on different data is a conflict in
one line, and a workflow can start when data change (`.github/workflows/data.yml`).
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from pcamlib.config import Strict, validate
from pcamlib.errors import ConfigError, DataError, EvidenceError, PcamError
from pcamlib.files import read_json, write_json
from pcamlib.journal.evidence import records

NAME = "data.lock"


class Entry(Strict):
    """One version of one data set."""

    name: str
    fingerprint: str
    synthetic: bool
    notebooks: list[str]


def entries(root: Path) -> list[Entry]:
    """What the evidence under `root` rests on, by name; two versions of one name are two entries.

    Raises:
        EvidenceError: as `evidence.records`.
    """
    found: dict[tuple[str, str, bool], list[str]] = {}
    for notebook, record in records(root).items():
        for name, fingerprint in record.provenance["data"].items():
            found.setdefault((name, fingerprint, record.synthetic), []).append(notebook)
    return [
        Entry(name=name, fingerprint=fingerprint, synthetic=synthetic, notebooks=notebooks)
        for (name, fingerprint, synthetic), notebooks in sorted(found.items())
    ]


def write(root: Path) -> Path:
    """Write data.lock under `root` from its evidence; errors as `entries`."""
    path = root / NAME
    write_json(path, [entry.model_dump() for entry in entries(root)])
    return path


def read(root: Path) -> list[Entry]:
    """What data.lock says.

    Raises:
        DataError: missing, or not what `write` writes.
    """
    try:
        stored: Any = read_json(root / NAME)
        return [validate(Entry, entry) for entry in stored]
    except (ConfigError, TypeError) as error:
        raise DataError(f"{NAME}: no list of data sets ({error}); `pcam data lock` writes it again") from None
    except PcamError as error:
        raise DataError(f"{NAME}: {str(error).rpartition(': ')[2]}; `pcam data lock` writes it") from None


def findings(root: Path) -> list[tuple[str, str, str]]:
    """Where evidence and data.lock disagree: place, what is wrong, what to do; empty where there is no lock.

    Damaged evidence is not told here: it is a finding of its own.
    """
    if not (root / NAME).is_file():
        return []
    try:
        locked = _versions(read(root))
    except DataError as error:
        return [(NAME, str(error).removeprefix(f"{NAME}: ").partition(";")[0], "`pcam data lock` writes it again")]
    now: dict[tuple[str, str], tuple[str, str]] = {}
    with suppress(EvidenceError):
        now = _versions(entries(root))
    found = []
    for notebook, name in sorted({*locked, *now}):
        wanted, used = locked.get((notebook, name)), now.get((notebook, name))
        place = f"journal/evidence/{notebook}.json"
        if used is None and now:
            found.append((NAME, f"{notebook} does not rest on a data set '{name}'", "`pcam data lock` writes it again"))
        elif wanted is None:
            found.append((place, f"its data set '{name}' is not in {NAME}", "`pcam data lock` adds it"))
        elif used and used != wanted:
            locked_as, ran_on = (f"{kind} {fingerprint[:12]}" for kind, fingerprint in (wanted, used))
            what = f"data set '{name}' is {locked_as} in {NAME}, and {notebook} ran on {ran_on}"
            found.append((place, what, "`make journal` on the new data; `pcam data lock` if the evidence is right"))
    return found


def _versions(listed: list[Entry]) -> dict[tuple[str, str], tuple[str, str]]:
    """Kind and fingerprint by notebook and name."""
    kinds = {True: "synthetic", False: "real"}
    return {(by, one.name): (kinds[one.synthetic], one.fingerprint) for one in listed for by in one.notebooks}
