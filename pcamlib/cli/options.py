"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DataOption = Annotated[
    str | None, typer.Option("--data", help="Folder with the PCam files; default $PCAM_DATA, else synthetic.")
]
ScaleOption = Annotated[str, typer.Option("--scale", help="papermill_jobs/SCALE.yaml: smoke, course or full.")]
RootOption = Annotated[Path, typer.Option("--root", help="Where journal/, assets/ and JOURNAL.md are written.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As in optimizer.lr=1e-3.")]
