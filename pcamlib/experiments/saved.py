"""Slices that people named in the explorer, kept in `journal/slices.yaml`: what they are, never what was measured.

    slices:
      dim and blurred: {threshold: 0.5, bounds: {brightness: [null, 0.55], blur: [null, 3.1]}}

Notebook 06 measures each of them again whenever it runs, so a name outlives the model it was given with.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from pcamlib.config import Strict
from pcamlib.errors import DataError
from pcamlib.experiments.features import Features
from pcamlib.experiments.slices import Slice, allowed, describe, named
from pcamlib.files import write_text
from pcamlib.training.evaluate import Predictions


class Saved(Strict):
    """One named slice; an open end of a bound is null."""

    threshold: float = Field(0.5, ge=0, le=1)
    bounds: dict[str, tuple[float | None, float | None]] = Field(min_length=1)

    @field_validator("bounds")
    @classmethod
    def _may_define_a_slice(cls, bounds: dict[str, Any]) -> dict[str, Any]:
        for feature in bounds:
            try:
                allowed(feature)
            except DataError as error:
                raise ValueError(str(error)) from None
        return bounds

    @property
    def slice(self) -> Slice:
        """As masks are made of."""
        ends = {name: (-math.inf if low is None else low, math.inf if high is None else high)
                for name, (low, high) in self.bounds.items()}  # fmt: skip
        return named((name, *pair) for name, pair in ends.items())


class _File(Strict):
    slices: dict[str, Saved] = Field({})


def read(path: str | Path) -> dict[str, Saved]:
    """Named slices by name; none where there is no file.

    Raises:
        DataError: the file is no YAML, or holds something else.
    """
    try:
        return _File.model_validate_json(json.dumps(yaml.safe_load(Path(path).read_text()) or {})).slices
    except FileNotFoundError:
        return {}
    except yaml.YAMLError as error:
        raise DataError(f"{path}: no YAML ({' '.join(str(error).split())}); mend the file or delete it") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = " ".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from None


def add(path: str | Path, name: str, slice_: Slice, threshold: float) -> dict[str, Saved]:
    """Keep a slice under a name, in place of an older one of that name; returns all of them.

    Raises:
        DataError: no name, a name of several lines, a slice without bounds, or of a model's clusters.
    """
    name = name.strip()
    if not name or len(name) > 60 or not name.isprintable():
        raise DataError(f"'{name[:80]}': give the slice a name of 1 to 60 characters in one line")
    if not slice_.bounds:
        raise DataError("every patch is no slice: narrow at least one feature before saving")
    if any(bound.feature == "cluster" for bound in slice_.bounds):
        raise DataError("clusters are of one model, the next one numbers them anew: bound a measured feature instead")
    ends = {b.feature: (None if math.isinf(b.low) else b.low, None if math.isinf(b.high) else b.high)
            for b in slice_.bounds}  # fmt: skip
    found = read(path) | {name: Saved(threshold=threshold, bounds=ends)}
    plain = {key: one.model_dump(mode="json") for key, one in found.items()}
    write_text(path, yaml.safe_dump({"slices": plain}, sort_keys=False, default_flow_style=None, allow_unicode=True))
    return found


def table(found: dict[str, Saved], features: Features, predictions: Predictions) -> list[dict[str, Any]]:
    """Each named slice as measured on these predictions; one too small, or of features not measured here, says so."""
    rows = []
    for name, one in found.items():
        row: dict[str, Any] = {"name": name, "slice": str(one.slice), "threshold": one.threshold, "why not": ""}
        try:
            row |= describe(one.slice, features, predictions, one.threshold)
        except DataError as error:
            row["why not"] = str(error)
        rows.append(row)
    return rows
