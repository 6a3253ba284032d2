"""What a claim is: a value, metric, table or figure, with all that must stand beside it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from pcamlib.config import Strict
from pcamlib.errors import EvidenceError

Scalar = bool | int | float | str | None
Row = dict[str, Scalar | list[Scalar]]
Kind = Literal["value", "metric", "table", "figure"]

KEY = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)+")


class Evidence(Strict):
    """One claim.

    A `metric` needs n, a 95 % interval that holds the value, and a baseline; over k seeds it needs k runs of k
    different contents. `runs` maps a run's name to the digest of its weights. `files` maps a figure's image and data
    to their SHA-256. The `value` of a table is its rows.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    key: str
    kind: Kind
    value: Scalar | list[Row] = None
    unit: str = ""
    n: int | None = Field(None, gt=0)
    seeds: tuple[int, ...] = ()
    interval: tuple[float, float] | None = None
    baseline: dict[str, float] = Field({})
    runs: dict[str, str] = Field({})
    caption: str = ""
    files: dict[str, str] = Field({})
    notebook: str
    synthetic: bool

    @property
    def image(self) -> str:
        """Path of a figure's image, relative to the root."""
        return f"assets/{self.key}.png"

    @property
    def data(self) -> str:
        """Path of the data a figure was drawn from, relative to the root."""
        return f"assets/{self.key}.json"

    @model_validator(mode="after")
    def _is_a_claim(self) -> Evidence:
        if not KEY.fullmatch(self.key):
            raise ValueError("a key is dotted and lower-case, as in data.mlp.auc")
        if self.kind == "metric":
            self._is_a_metric()
        elif self.kind == "table" and not (isinstance(self.value, list) and self.value):
            raise ValueError("a table needs rows")
        elif self.kind == "value" and (self.value is None or isinstance(self.value, list)):
            raise ValueError("a value is one number, text, or yes or no")
        elif self.kind == "figure" and (set(self.files) != {self.image, self.data} or not self.caption):
            raise ValueError(f"a figure needs a caption, {self.image} and {self.data}")
        return self

    def _is_a_metric(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise ValueError("a metric is a number")
        if self.n is None:
            raise ValueError("a metric without n; say over how many patches it was taken")
        if self.interval is None:
            raise ValueError("a metric without an interval; give (low, high)")
        if not self.baseline:
            raise ValueError("a metric without a baseline; give what a constant answer scores, as {name: value}")
        low, high = self.interval
        if not low <= self.value <= high:
            raise ValueError(f"the interval {low:g} to {high:g} does not hold the value {self.value:g}")
        if repeated := _repeated(self.seeds):
            raise ValueError(f"seed {repeated[0]} is listed more than once")
        if self.seeds and len(self.runs) != len(self.seeds):
            raise ValueError(f"{len(self.seeds)} seeds need as many runs; got {len(self.runs)}")
        if self.seeds and (same := _repeated(self.runs.values())):
            names = " and ".join(name for name, content in self.runs.items() if content == same[0])
            raise ValueError(f"{len(self.seeds)} seeds, but {names} are one run: their weights are equal")


class Record(Strict):
    """What one notebook closed with: its evidence, a digest that shows edits by hand, and what it rests on."""

    notebook: str
    synthetic: bool
    executed: str
    provenance: dict[str, Any]
    digest: str
    evidence: list[Evidence]

    @property
    def commit(self) -> str:
        """The commit that made it, in words."""
        commit, dirty = self.provenance["code"]["commit"], self.provenance["code"]["dirty"]
        return (f"commit `{commit[:7]}`" if commit else "no commit") + (" + local changes" if dirty else "")

    @property
    def job(self) -> str:
        """The Slurm job that made it, with node and partition; nothing where none did."""
        job = self.provenance["slurm"]
        if "job_id" not in job:
            return ""
        partition = f" ({job['job_partition']})" if "job_partition" in job else ""
        return f"job {job['job_id']} on {job.get('slurmd_nodename', self.provenance['machine']['host'])}{partition}"

    @model_validator(mode="after")
    def _says_where_it_comes_from(self) -> Record:
        if missing := {"code", "data", "lock", "machine", "slurm", "sources", "torch"} - set(self.provenance):
            raise ValueError(f"provenance lacks {', '.join(sorted(missing))}")
        if strangers := {claim.notebook for claim in self.evidence} - {self.notebook}:
            raise ValueError(f"evidence of {', '.join(sorted(strangers))} among that of {self.notebook}")
        return self


def parse(entry: Any) -> Evidence:
    """Validate one entry, from a recorder or from a file.

    Raises:
        EvidenceError: the entry is no claim; the message names its key and what is missing.
    """
    try:
        return Evidence.model_validate_json(json.dumps(entry))
    except ValidationError as error:
        first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    field = f"{first['loc'][0]}: " if first["loc"] else ""
    raise EvidenceError(f"evidence '{entry.get('key', '?') if isinstance(entry, dict) else '?'}': {field}{message}")


def show(value: Any, digits: int = 3) -> str:
    """A value as a reader wants it: 3,000, 0.913, yes, 1.2e-05; a pair of numbers as an interval."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, list | tuple):
        numbers = len(value) == 2 and all(isinstance(v, int | float) for v in value)
        return (" to " if numbers else ", ").join(show(v, digits) for v in value)
    if isinstance(value, int) or (isinstance(value, float) and abs(value) >= 10 ** max(digits, 3)):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _repeated(items: Iterable[Any]) -> list[Any]:
    return [item for item, count in Counter(items).items() if count > 1]
