"""Registered models: checkpoints that are committed, each with what it must reproduce.

    pcam register runs/first/checkpoints/best.safetensors --name first
    pcam verify                     # every registered model: whole, small enough, loads, scores what was recorded

`models/index.yaml` holds one entry a model, and `models/NAME.safetensors` its weights. An entry is never changed: a new
model gets a new name, and the old one can still be gone back to.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pcamlib import provenance
from pcamlib.config import Strict, read_yaml, validate
from pcamlib.data.folder import data_folder
from pcamlib.data.patches import open_split
from pcamlib.errors import CheckpointError, ConfigError, DataError, PcamError
from pcamlib.files import atomic_path, sha256_file, write_text
from pcamlib.serving.predict import Predictor
from pcamlib.training import metrics
from pcamlib.training.decision import Decision
from pcamlib.training.evaluate import evaluate

INDEX = "models/index.yaml"
METRIC = "auc"  # no threshold in it, so rounding moves it least
LARGEST = 100_000_000  # bytes of one file; GitHub takes 4.9 % more
#: Of the metric. Recorded in bf16, answered in float32: .908695 against .908683 on 3,000 real patches.
TOLERANCE = 0.001
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_HEAD = "# Written by `pcam register`, held to by `pcam verify`; an entry is never changed.\n"


class Metric(Strict):
    """A score, and the patches it was taken on."""

    name: str
    value: float
    interval: list[float]
    n: int
    split: str
    fingerprint: str
    best_of: int


class Entry(Strict):
    """One registered model."""

    name: str
    file: str
    sha256: str
    bytes: int
    model: dict[str, Any]
    metric: Metric
    decision: Decision
    data: dict[str, str]
    synthetic: bool
    commit: str
    registered: str


@dataclass(frozen=True)
class Row:
    """One check of one model, and what it showed."""

    model: str
    check: str
    passed: bool
    reason: str


def entries(root: Path) -> list[Entry]:
    """The models that `root` registers; none where there is no index.

    Raises:
        ConfigError: models/index.yaml is damaged.
    """
    if not (root / INDEX).is_file():
        return []
    try:
        return [validate(Entry, entry) for entry in read_yaml(root / INDEX)["models"]]
    except (ConfigError, KeyError, TypeError) as error:
        raise ConfigError(f"{INDEX}: no list of models ({error}); bring it back with git") from None


def register(checkpoint: str | Path, name: str, root: Path) -> Entry:
    """Copy the checkpoint of a finished run to models/NAME.safetensors and enter it in the index.

    Raises:
        ConfigError: a name that is taken or no file name.
        CheckpointError: damaged, too large for a repository, or of a run that did not finish.
    """
    known = entries(root)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name '{name}': lower-case letters, digits, - and _ only, as in cnn-1")
    if name in {entry.name for entry in known}:
        raise ConfigError(f"'{name}' is registered already, and an entry is never changed; choose another name")
    path, inscribed = Path(checkpoint), _inscribed(Predictor(checkpoint))
    if (size := path.stat().st_size) > LARGEST:
        raise CheckpointError(f"{path}: {size:,} bytes; a repository takes {LARGEST:,} at most: train a smaller model")
    with atomic_path(root / "models" / f"{name}.safetensors") as part:
        shutil.copyfile(path, part)
        sha = sha256_file(part)
    file = f"models/{name}.safetensors"
    entry = Entry(name=name, file=file, sha256=sha, bytes=size, **inscribed, registered=provenance.now())
    listed = {"models": [one.model_dump() for one in [*known, entry]]}
    write_text(root / INDEX, _HEAD + yaml.safe_dump(listed, sort_keys=False))
    return entry


def _inscribed(predictor: Predictor) -> dict[str, Any]:
    """The fields of an entry that the checkpoint itself tells."""
    meta = predictor.meta
    if "recorded" not in meta:
        lacks = "carries no recorded score: its run did not finish; `pcam resume` finishes it"
        raise CheckpointError(f"{predictor.path}: {lacks}")
    recorded, origin = meta["recorded"], meta["provenance"]
    score = recorded["metrics"][METRIC]
    return {
        "model": meta["model"],
        "metric": Metric(name=METRIC, **score, **{k: recorded[k] for k in ("n", "split", "fingerprint", "best_of")}),
        "decision": validate(Decision, meta["decision"]),
        "data": {split: origin["data"][split] for split in ("train", "valid")},
        "synthetic": meta["synthetic"],
        "commit": (origin["code"]["commit"] or "none") + (" + local changes" if origin["code"]["dirty"] else ""),
    }


def verify(root: Path, data: str | None = None) -> list[Row]:
    """Try every registered model: file, digest, size, loading, one answer, its entry, and the recorded score.

    Args:
        root: of the repository.
        data: folder with the patches the scores were taken on; None: $PCAM_DATA, else the synthetic default set.

    Raises:
        ConfigError: as `entries`.
    """
    known = entries(root)
    rows = [Row(entry.name, *result) for entry in known for result in _tried(entry, root, data)]
    strays = {path.relative_to(root).as_posix() for path in root.glob("models/*.safetensors")}
    lacks = f"not in {INDEX}; `pcam register` enters it"
    return rows + [Row(Path(file).stem, "index", False, lacks) for file in sorted(strays - {e.file for e in known})]


def _tried(entry: Entry, root: Path, data: str | None) -> Iterator[tuple[str, bool, str]]:
    path = root / entry.file
    if not path.is_file():
        yield "file", False, f"{entry.file} is missing"
        return
    sha, size = sha256_file(path), path.stat().st_size
    yield "file", sha == entry.sha256, f"sha256 {sha[:12]}, {entry.sha256[:12]} in the index"
    yield "size", size <= LARGEST, f"{size / 1e6:.2f} MB, {LARGEST / 1e6:.0f} at most"
    try:
        predictor = Predictor(path)
        told = entry.model_copy(update={"bytes": size, **_inscribed(predictor)})
    except PcamError as error:
        yield "loads", False, str(error).removeprefix(f"{path}: ")
        return
    noise = np.random.default_rng(0).integers(0, 256, (1, 96, 96, 3), np.uint8)
    probability = float(predictor.answer(noise).probability[0])
    yield "loads", 0 <= probability <= 1, f"answers one patch of noise with {probability:.3f}"
    lies = provenance.difference(entry.model_dump(), told.model_dump())  # of sha256 "file" tells
    yield from (("index", False, f"{key} {here} in the index, {there} in the checkpoint") for key, here, there in lies)
    if not lies:
        yield "score", *_reproduced(entry, predictor, data)


def _reproduced(entry: Entry, predictor: Predictor, data: str | None) -> tuple[bool, str]:
    wanted = entry.metric
    try:
        patches = open_split(data_folder(data, report=lambda line: None), wanted.split, labels=True)
        if patches.fingerprint != wanted.fingerprint:
            raise DataError(f"recorded on {wanted.fingerprint[:12]}, here is {patches.fingerprint[:12]}")
    except DataError as error:
        return False, f"not reproduced here: data absent ({error})"
    said = evaluate(predictor.model, patches)
    n = len(said.label)
    found = float(metrics.scores(said.label, said.probability, np.ones((1, n)))[wanted.name][0])
    low, high = wanted.interval
    what = f"{wanted.name} {found:.4f}, recorded {wanted.value:.4f} ({low:.4f} to {high:.4f}), n = {n:,}"
    return abs(found - wanted.value) <= TOLERANCE, f"{what} {wanted.split} patches{' (synthetic)' * entry.synthetic}"
