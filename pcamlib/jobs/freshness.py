"""Whether an executed notebook still stands: what it rested on, written beside it as `NAME.ipynb.json`.

It is stale when its code cells, a pcamlib file that they reach, a parameter, the data, the pinned packages or Python
changed, or when the executed notebook or a file it produced is no longer what the run wrote.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pcamlib import files
from pcamlib.errors import PcamError
from pcamlib.sources import ROOT, digests

#: Parameters that say where things lie. The data's fingerprints count, and a node may hold a copy of its own.
PLACES = ("data_dir", "course_dir", "root")


def stamp(path: Path, parameters: dict[str, Any], data: dict[str, str]) -> dict[str, Any]:
    """What a run of the notebook `path` rests on; `data` holds a fingerprint for each data set, by name.

    Where the data and the journal lie (`PLACES`) is left out.
    Take it before the run: a file that is edited meanwhile then counts as changed.
    """
    lock = ROOT / "requirements.lock"
    return {
        "sources": digests(path),
        "parameters": {name: value for name, value in parameters.items() if name not in PLACES},
        "data": data,
        "environment": {
            "requirements.lock": files.sha256_file(lock) if lock.is_file() else None,
            "python": platform.python_version(),
        },
    }


def is_fresh(output: Path, stamp: dict[str, Any]) -> tuple[bool, str]:
    """Whether `output` rests on exactly `stamp`; if not, the first thing that changed, in words."""
    if not output.is_file():
        return False, "never run"
    try:
        record = files.read_json(_beside(output))
        old, produced = record["stamp"], {_name(output): record["notebook"], **record["products"]}
        reason = _first_change(old, stamp) or _first_touched(produced)
    except (PcamError, KeyError, TypeError, AttributeError):
        return False, "no record of what its last run rested on"
    return not reason, reason or "nothing changed"


def write_stamp(output: Path, stamp: dict[str, Any], products: Sequence[Path] = ()) -> None:
    """Record that `output` and `products`, files the notebook wrote, rest on `stamp`; atomically.

    Raises:
        PcamError: a product does not exist.
    """
    missing = [product for product in products if not Path(product).is_file()]
    if missing:
        raise PcamError(f"{output.name} ran to its end, but did not write {missing[0]}")
    record = {
        "stamp": stamp,
        "notebook": files.sha256_file(output),
        "products": {_name(product): files.sha256_file(product) for product in products},
    }
    files.write_json(_beside(output), record)


def _beside(output: Path) -> Path:
    return output.with_name(output.name + ".json")


def _name(path: Path) -> str:
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def _first_change(old: dict[str, Any], new: dict[str, Any]) -> str:
    for part in ("sources", "parameters", "data", "environment"):
        for key in {**new[part], **old[part]}:
            was, now = old[part].get(key), new[part].get(key)
            if was == now and (key in old[part]) == (key in new[part]):
                continue
            if part == "parameters":
                was, now = (repr(side[part][key]) if key in side[part] else "default" for side in (old, new))
                return f"parameter {key}: {was} -> {now}"
            if key == "python":
                return f"python: {was} -> {now}"
            what = f"data {key}" if part == "data" else key
            return f"{what} changed" if was and now else f"{what} is {'new' if now else 'no longer used'}"
    return ""


def _first_touched(produced: dict[str, str]) -> str:
    for name, sha256 in produced.items():
        path = ROOT / name
        if not path.is_file():
            return f"{name} is missing"
        if files.sha256_file(path) != sha256:
            return f"{name} was changed after the run"
    return ""
