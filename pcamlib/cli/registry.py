"""`pcam register`, `verify` and `checklist`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcamlib.cli.options import DataOption, RootOption
from pcamlib.sources import ROOT

commands = typer.Typer()


@commands.command("register")
def register(
    checkpoint: Path,
    name: Annotated[str, typer.Option(help="Of the model; an entry is never changed.")],
    root: RootOption = ROOT,
) -> None:
    """Copy a finished run's checkpoint to models/NAME.safetensors and enter it in models/index.yaml."""
    from pcamlib.serving import registry

    entry = registry.register(checkpoint, name, root)
    score = f"{entry.metric.name} {entry.metric.value:.4f}, n = {entry.metric.n:,} {entry.metric.split} patches"
    print(f"{entry.file}: {entry.bytes:,} bytes, {score}{' (synthetic)' if entry.synthetic else ''}")


@commands.command("verify")
def verify(data: DataOption = None, root: RootOption = ROOT) -> None:
    """Try every registered model: whole, small enough, loads, scores what was recorded; exit code 1 when one fails."""
    from pcamlib.serving import registry

    rows = registry.verify(root.resolve(), data)
    for row in rows:
        print(f"{'ok  ' if row.passed else 'FAIL'} {row.model}, {row.check}: {row.reason}")
    if not rows:
        print(f"no model in {registry.INDEX}; `pcam register` adds one")
    raise typer.Exit(0 if all(row.passed for row in rows) else 1)


@commands.command("checklist")
def checklist(data: DataOption = None, root: RootOption = ROOT) -> None:
    """The final submission checklist, ticked by checks alone; exit code 1 while a box is open."""
    from pcamlib.serving import submission

    found = submission.boxes(root.resolve(), data)
    print("\n".join(map(str, found)))
    raise typer.Exit(0 if all(box.ticked for box in found) else 1)
