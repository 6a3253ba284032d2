"""`metrics.jsonl` is the truth; wandb is a copy, offline unless asked, and absent without an `if` anywhere."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any, Protocol

from pcamlib.config import Config
from pcamlib.errors import ConfigError
from pcamlib.files import write_text


class Tracker(Protocol):
    """What the training loop calls."""

    def log(self, row: dict[str, Any]) -> None:
        """Record one row: `step` and any numbers."""

    def close(self) -> None:
        """Flush and end."""


class NullTracker:
    """Tracks nothing (nanochat's DummyWandb)."""

    def log(self, row: dict[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class MetricsFile:
    """One JSON object a line, flushed at each; rows past a resumed step are dropped first, since they come again."""

    def __init__(self, path: Path, resume_at: int = 0) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= resume_at]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run

    def log(self, row: dict[str, Any]) -> None:
        """Append one row."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WandbTracker:
    """A copy to Weights & Biases: one wandb run an attempt, so that no piece of a requeued job overwrites another.

    A killed process takes up to 32 KiB of wandb's latest rows with it, for short runs all of them. So each attempt's
    copy begins with the rows that the attempts before it left in metrics.jsonl, and the last one is whole. Pieces are
    grouped by study (`tracking.group`), in it by run (the job type).
    """

    def __init__(self, config: Config, folder: Path, attempt: int) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "tracking.wandb needs the package wandb: pip install wandb, or tracking.wandb=off"
            ) from None
        self._run = wandb.init(
            project=config.tracking.project,
            group=config.tracking.group or folder.name,
            job_type=folder.name,
            name=f"{folder.name}-{attempt}",
            id=uuid.uuid4().hex[:16],  # here, or $WANDB_RUN_ID of the shell would make all pieces one run
            resume="never",
            reinit="create_new",  # never an open run of this process
            mode="online" if config.tracking.wandb == "online" else "offline",
            config=config.model_dump(),
            dir=str(folder),
            settings=wandb.Settings(silent=True),
        )
        for row in read_metrics(folder / "metrics.jsonl"):
            self.log(row)

    def log(self, row: dict[str, Any]) -> None:
        """Send a row under its step."""
        self._run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        """Finish the wandb run."""
        self._run.finish()


def wandb_tracker(config: Config, folder: Path, attempt: int) -> Tracker:
    """The copy that the configuration asks for, or the null object."""
    return NullTracker() if config.tracking.wandb == "off" else WandbTracker(config, folder, attempt)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, none where a run was killed before its first; a last line torn by a kill is left out."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
