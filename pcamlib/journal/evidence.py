"""Evidence: what a notebook may claim, with all that makes it a claim, stored where the journal finds it.

    evidence = Recorder("01_reproducibility", root, data={"train": fingerprint}, synthetic=True)
    evidence.metric("data.mlp.auc", 0.81, n=3000, interval=(0.79, 0.83), baseline={"prevalence": 0.5})
    evidence.close()

`ROOT/journal/evidence/NOTEBOOK.json` holds a notebook's evidence and one provenance record; `ROOT/assets/KEY.png` a
figure and `KEY.json` the data it was drawn from. All are written when the notebook closes its recorder, none before:
a notebook that dies leaves the journal as it was.
"""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from pcamlib import provenance, sources
from pcamlib.errors import EvidenceError, PcamError
from pcamlib.files import atomic_path, digest, read_json, sha256_file, write_json
from pcamlib.journal.claims import Evidence, Kind, Record, parse, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST = 2**20  # bytes of one figure's data: assets/ is committed


class Recorder:
    """Collects a notebook's evidence; `close` writes it.

    Args:
        notebook: name of the notebook without folder and suffix.
        root: folder that holds `journal/` and `assets/`; a scratch folder leaves the committed journal alone.
        data: fingerprint of each split that was read.
        synthetic: the data are synthetic; every figure is stamped with that.
        parameters: the notebook's parameters; of an absolute path only the last part is kept.
        device: what computed the results.
    """

    def __init__(
        self,
        notebook: str,
        root: str | Path,
        *,
        data: Mapping[str, str],
        synthetic: bool,
        parameters: Mapping[str, Any] | None = None,
        device: str = "cpu",
    ) -> None:
        self.notebook, self.root, self.synthetic = notebook, Path(root), synthetic
        self._found: dict[str, Evidence] = {}
        self._figures: dict[str, tuple[bytes, dict[str, Any]]] = {}
        self._provenance = provenance.capture(
            device,
            data=dict(data),
            parameters={name: _without_folder(value) for name, value in (parameters or {}).items()},
            command=f"notebook {notebook}",
            **foundation(self.root, notebook),
        )

    def value(
        self, key: str, value: Any, unit: str = "", n: int | None = None, note: str = "", runs: Mapping[str, str] = {}
    ) -> None:
        """Record one number, text or yes/no; `note` says what a reader must know about it."""
        self._add(key, "value", value=_plain(value, key), unit=unit, n=n, caption=note, runs=dict(runs))

    def metric(
        self,
        key: str,
        value: float,
        *,
        n: int,
        interval: tuple[float, float],
        baseline: Mapping[str, float],
        seeds: Sequence[int] = (),
        runs: Mapping[str, str] = {},
        unit: str = "",
        note: str = "",
    ) -> None:
        """Record a score over `n` patches with its 95 % interval, and what a baseline scores.

        Args:
            key: dotted name.
            value: the score; the mean when there are several seeds.
            n: patches it was taken over.
            interval: 95 % bounds.
            baseline: name and score of at least one constant answer.
            seeds: seeds averaged over.
            runs: name of each run, and the digest of its weights.
            unit: unit of value, interval and baseline.
            note: what a reader must know about it.

        Raises:
            EvidenceError: something that makes it a claim is missing, or the runs are not as many as the seeds.
        """
        self._add(
            key,
            "metric",
            value=_plain(value, key),
            n=_plain(n, key),
            interval=tuple(_plain(interval, key)) if interval is not None else None,
            baseline=_plain(dict(baseline), key),
            seeds=tuple(_plain(seeds, key)),
            runs=dict(runs),
            unit=unit,
            caption=note,
        )

    def table(
        self, key: str, rows: Any, *, n: int | None = None, caption: str = "", runs: Mapping[str, str] = {}
    ) -> None:
        """Record a table: a DataFrame or a list of dicts; None is an empty cell, a pair of numbers an interval."""
        if hasattr(rows, "to_dict"):
            text = {name for name in rows if rows[name].dtype.kind != "f"}  # pandas marks an empty text cell with NaN
            cells = rows.to_dict("records")
            rows = [{k: None if k in text and v != v else v for k, v in row.items()} for row in cells]  # noqa: PLR0124
        self._add(key, "table", value=_plain(rows, key), n=n, caption=caption, runs=dict(runs))

    def figure(
        self,
        key: str,
        figure: Figure,
        data: Mapping[str, Any],
        *,
        caption: str,
        n: int | None = None,
        runs: Mapping[str, str] = {},
    ) -> None:
        """Record a figure and the data it was drawn from, series by series (floats kept to 6 significant digits).

        Raises:
            EvidenceError: no caption, no data, a NaN in them (None is a gap), or more than 1 MiB.
        """
        series = _rounded(_plain(dict(data), key))
        if not series:
            raise EvidenceError(f"evidence '{key}': a figure needs the data it was drawn from")
        if (size := len(json.dumps(series))) > LARGEST:
            raise EvidenceError(
                f"evidence '{key}': {size:,} bytes of data; give what identifies pixels, not the pixels"
            )
        if self.synthetic and not any(text.get_gid() == "synthetic" for text in figure.texts):
            # below the axes, where the tight bounding box makes room and nothing is covered
            figure.text(1.0, -0.01, "synthetic data", ha="right", va="top", size=8, color="firebrick", gid="synthetic")
        image = io.BytesIO()
        dpi = min(110, 1200 / max(figure.get_size_inches()))  # at most 1,200 pixels a side
        figure.savefig(image, format="png", dpi=dpi, bbox_inches="tight", metadata={"Software": None})
        files = {f"assets/{key}.png": "", f"assets/{key}.json": ""}  # digests are known at close
        self._add(key, "figure", n=n, caption=caption, files=files, runs=dict(runs))
        about = {"caption": caption, "notebook": self.notebook, "synthetic": self.synthetic}
        self._figures[key] = (image.getvalue(), {**about, "series": series})

    def forget(self, key: str) -> None:
        """Take an entry back, to record it anew; `close` may be called again. Nothing happens where there is none."""
        self._found.pop(key, None)
        self._figures.pop(key, None)

    def close(self) -> None:
        """Write figures and evidence, remove the figures this notebook no longer makes, print what was recorded."""
        path = self.root / "journal" / "evidence" / f"{self.notebook}.json"
        old = _figure_files([path])
        for key, (image, data) in self._figures.items():
            claim = self._found[key]
            with atomic_path(self.root / claim.image) as part:
                part.write_bytes(image)
            write_json(self.root / claim.data, data)
            files = {file: sha256_file(self.root / file) for file in claim.files}
            self._found[key] = claim.model_copy(update={"files": files})
        record = Record(
            notebook=self.notebook,
            synthetic=self.synthetic,
            executed=provenance.now(),
            provenance=self._provenance,
            digest=digest([claim.model_dump(mode="json") for claim in self._found.values()]),
            evidence=list(self._found.values()),
        )
        write_json(path, record.model_dump(mode="json"))
        for file in old - _figure_files(path.parent.glob("*.json")):
            (self.root / file).unlink(missing_ok=True)
        kinds: Counter[str] = Counter(claim.kind for claim in self._found.values())
        counted = ", ".join(f"{kinds[kind]} {kind}{'s' * (kinds[kind] > 1)}" for kind in get_args(Kind) if kinds[kind])
        single = [f"{c.key} {show(c.value, 2)}" for c in self._found.values() if c.kind in ("value", "metric")]
        print(f"{self.notebook}: {counted or 'nothing'} recorded, on {'synthetic' if self.synthetic else 'real'} data")
        print(", ".join(single) or "no single numbers")

    def _add(self, key: str, kind: str, **fields: Any) -> None:
        if key in self._found:
            raise EvidenceError(f"evidence '{key}' is recorded twice; run again from the cell that opens the recorder")
        entry = {"key": key, "kind": kind, **fields, "notebook": self.notebook, "synthetic": self.synthetic}
        self._found[key] = parse(entry)


def find(root: Path, relative: str) -> Path:
    """`relative` under `root`, or in the repository of this package where `root` has none of its own."""
    return root / relative if (root / relative).exists() else sources.ROOT / relative


def foundation(root: Path, notebook: str) -> dict[str, Any]:
    """Digests of the sources a notebook rests on (`sources`) and of requirements.lock (`lock`), as they are now.

    Raises:
        EvidenceError: there is no such notebook.
    """
    path, lock = find(root, f"notebooks/{notebook}.ipynb"), find(root, "requirements.lock")
    if not path.is_file():
        raise EvidenceError(f"notebooks/{notebook}.ipynb: no such notebook; evidence needs one that makes it")
    return {"sources": sources.digests(path), "lock": sha256_file(lock) if lock.is_file() else None}


def records(root: str | Path) -> dict[str, Record]:
    """Every notebook's record under `root`, by notebook name; empty when none was made yet.

    Raises:
        EvidenceError: a file is damaged, an entry is no claim, or two entries have one key.
    """
    found: dict[str, Record] = {}
    owner: dict[str, str] = {}
    for path in sorted((Path(root) / "journal" / "evidence").glob("*.json")):
        place = f"journal/evidence/{path.name}"
        try:
            text = read_json(path)
            for claim in map(parse, text["evidence"]):
                if claim.key in owner:
                    raise EvidenceError(f"evidence '{claim.key}' is also in {owner[claim.key]}")
                owner[claim.key] = place
            record = Record.model_validate_json(json.dumps(text))
            if record.notebook != path.stem:
                raise EvidenceError(f"is the evidence of {record.notebook}")
            found[path.stem] = record
        except PcamError as error:
            raise EvidenceError(f"{place}: {str(error).removeprefix(f'{path}: ')}; run the notebook again") from None
        except (ValidationError, KeyError, TypeError):
            raise EvidenceError(f"{place}: is no evidence of a notebook; run the notebook again") from None
    return found


def load(root: str | Path) -> dict[str, Evidence]:
    """All evidence under `root` by key; errors as in `records`."""
    return {claim.key: claim for record in records(root).values() for claim in record.evidence}


def _without_folder(value: Any) -> Any:
    text = str(value) if isinstance(value, str | Path) else ""
    return Path(text).name if text.startswith(("/", "~")) else _plain(value, "parameters")


def _plain(value: Any, key: str) -> Any:
    """Python's own types, from numpy's, torch's and pandas' too; NaN and infinity are refused."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v, key) for k, v in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v, key) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise EvidenceError(f"evidence '{key}': {value} is no result; where there is none, say None")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise EvidenceError(f"evidence '{key}': {type(value).__name__} cannot be stored; give numbers and text")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _figure_files(paths: Iterable[Path]) -> set[str]:
    """Image and data paths listed by evidence files; a damaged file lists none."""
    files: set[str] = set()
    for path in paths:
        try:
            entries = [parse(entry) for entry in read_json(path)["evidence"]]
        except (PcamError, KeyError, TypeError):
            continue
        files |= {file for entry in entries if entry.kind == "figure" for file in entry.files}
    return files
