"""`pcam notebook ...` and `pcam journal ...`."""

from __future__ import annotations

from typing import Annotated

import typer

from pcamlib.cli.options import DataOption, RootOption, ScaleOption
from pcamlib.sources import ROOT

commands = typer.Typer()
notebook_app = typer.Typer(help="Execute notebooks headlessly.", no_args_is_help=True)
journal_app = typer.Typer(help="Make, render and check the journal.", no_args_is_help=True)
commands.add_typer(notebook_app, name="notebook")
commands.add_typer(journal_app, name="journal")


@notebook_app.command("run")
def notebook_run(
    name: str,
    scale: ScaleOption = "smoke",
    parameter: Annotated[
        list[str] | None, typer.Option("-p", help="name=value, checked before the kernel starts.")
    ] = None,
    data: DataOption = None,
    root: RootOption = ROOT,
    force: Annotated[bool, typer.Option(help="Run also when nothing changed.")] = False,
) -> None:
    """Execute one notebook; its evidence goes into the journal under --root."""
    from pcamlib import make

    make.notebook(name, scale, root=root, data=data, assignments=parameter or [], force=force)


@journal_app.command("make")
def journal_make(
    scale: ScaleOption = "smoke", data: DataOption = None, root: RootOption = ROOT, name: str = "assignment_2"
) -> None:
    """Execute what is stale, render JOURNAL.md and its HTML page, say what is still open."""
    from pcamlib import make

    make.journal(scale, root=root, data=data, name=name)


@journal_app.command("render")
def journal_render(name: str = "assignment_2", root: RootOption = ROOT) -> None:
    """Render JOURNAL.md and JOURNAL.html from the evidence as it is."""
    from pcamlib.journal.render import render

    for path in render(name, root.resolve()):
        print(path)


@journal_app.command("check")
def journal_check(
    name: str = "assignment_2",
    root: RootOption = ROOT,
    strict: Annotated[bool, typer.Option(help="Open places count as faults.")] = False,
    jobs: Annotated[bool, typer.Option(help="A number that no Slurm job made is a fault.")] = False,
) -> None:
    """List what is open, stale, missing or typed by hand; exit code 1 when something is wrong."""
    from pcamlib.journal.check import check

    found = check(root.resolve(), name, jobs)
    for finding in found:
        print(finding)
    faults = sum(f.severity == "fault" for f in found)
    print(f"{faults} faults, {len(found) - faults} open places")
    raise typer.Exit(1 if faults or (strict and found) else 0)
