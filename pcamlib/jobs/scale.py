"""One scale of the whole journal: for each notebook its parameters, time limit, predecessors and Slurm resources.

papermill_jobs/smoke.yaml   minutes on a laptop, the notebooks' own defaults
papermill_jobs/course.yaml  a course cluster's job
papermill_jobs/full.yaml    all of PCam
"""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from pcamlib.config import Strict, read_yaml, validate
from pcamlib.errors import ConfigError, nearest
from pcamlib.sources import ROOT


class Resources(Strict):
    """What Slurm is asked for."""

    cpus: int = Field(2, gt=0)
    memory: str = Field("8G", pattern=r"^\d+[MG]$")
    gpus: int = Field(0, ge=0)
    time: str = Field("00:30:00", pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$", description="[days-]hours:minutes:seconds")

    @property
    def seconds(self) -> int:
        """The time asked for."""
        return seconds(self.time)

    @property
    def megabytes(self) -> int:
        """The memory of each node asked for, in MiB, as Slurm counts."""
        return int(self.memory[:-1]) * (1024 if self.memory.endswith("G") else 1)

    @field_validator("time", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML 1.1 counts 1:00:00 in base 60
            raise ValueError("put it in quotes, as in '01:00:00'; YAML reads it as a number")
        return value


class Job(Strict):
    """One notebook at one scale."""

    parameters: dict[str, Any] = Field({}, description="empty: the notebook's own defaults")
    timeout: Annotated[float, Field(gt=0, description="seconds for the whole notebook")] = 600.0
    after: list[str] = Field([], description="notebooks that must have run before")
    resources: Resources = Resources()


def seconds(text: str) -> int:
    """Seconds of a time as Slurm writes it: `1-02:00:00`, `02:00:00` or `30:00`."""
    days, _, clock = text.rpartition("-")
    total = 0
    for part in clock.split(":"):
        total = total * 60 + int(part)
    return total + int(days or 0) * 86_400


def load(name: str, folder: Path = ROOT / "papermill_jobs", notebooks: Path = ROOT / "notebooks") -> dict[str, Job]:
    """The jobs of a scale, by notebook, in an order in which every notebook follows those it is `after`.

    Args:
        name: `smoke`, or the path of a YAML file.
        folder: where the scales lie.
        notebooks: where the notebooks lie.

    Raises:
        ConfigError: an unknown scale, notebook or key (with the nearest), a wrong value, or a cycle.
    """
    known = {path.stem: path for path in folder.glob("*.yaml")}
    if not name.endswith((".yaml", ".yml")) and name not in known:
        raise ConfigError(f"unknown scale '{name}'{nearest(name, known)}")
    path = known.get(name, Path(name))
    stems = [notebook.stem for notebook in notebooks.glob("*.ipynb")]
    jobs: dict[str, Job] = {}
    for stem, mapping in read_yaml(path).items():
        if stem not in stems:
            raise ConfigError(f"{path}: unknown notebook '{stem}'{nearest(str(stem), stems)}")
        if not isinstance(mapping, dict):
            raise ConfigError(f"{path}: {stem}: expected `key: value` lines, found {type(mapping).__name__}")
        try:
            jobs[stem] = validate(Job, mapping)
        except ConfigError as error:
            raise ConfigError(f"{path}: {stem}: {error}") from None
    for stem, job in jobs.items():
        for other in job.after:
            if other not in jobs:
                raise ConfigError(f"{path}: {stem}: after: unknown notebook '{other}'{nearest(other, jobs)}")
    try:
        order = list(TopologicalSorter({stem: job.after for stem, job in jobs.items()}).static_order())
    except CycleError as error:
        raise ConfigError(f"{path}: these notebooks wait for each other: {' -> '.join(error.args[1])}") from None
    return {stem: jobs[stem] for stem in order}
