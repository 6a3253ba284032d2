"""`pcam notebook ...` and `pcam journal ...`."""

from __future__ import annotations

from typing import Annotated

import typer

from pcamlib.cli.options import DataOption, RootOption, ScaleOption
from pcamlib.sources import ROOT

commands = typer.Typer()
notebook_app = typer.Typer(help="Execute notebooks headlessly.", no_args_is_help=True)
journal_app = typer.Typer(help="Make, render and check the journals.", no_args_is_help=True)
commands.add_typer(notebook_app, name="notebook")
commands.add_typer(journal_app, name="journal")

NameArgument = Annotated[str, typer.Argument(help="assignment_2, assignment_1 or dtu_exam.")]


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
def journal_make(scale: ScaleOption = "smoke", data: DataOption = None, root: RootOption = ROOT) -> None:
    """Execute what is stale, render all journals and their HTML pages, say what is still open."""
    from pcamlib import make

    make.journal(scale, root=root, data=data)


@journal_app.command("render")
def journal_render(
    name: NameArgument = "assignment_2",
    root: RootOption = ROOT,
    pdf: Annotated[bool, typer.Option("--pdf", help="Print the page as PDF too, with Chromium.")] = False,
) -> None:
    """Render a journal as Markdown and as a page from the evidence as it is."""
    from pcamlib.journal import page
    from pcamlib.journal.render import render

    written = render(name, root.resolve())
    for path in [*written, *([page.pdf(written[1])] if pdf else [])]:
        print(path)


@journal_app.command("draft")
def journal_draft(
    name: Annotated[str, typer.Argument(help="As `pcam journal check` names it.")],
    approve: Annotated[bool, typer.Option("--approve", help="It stands as it is.")] = False,
    root: RootOption = ROOT,
) -> None:
    """Take over a draft: copy it to journal/prose, where it is yours."""
    from pcamlib.journal.draft import take

    print(take(root.resolve(), name, approve))


@journal_app.command("check")
def journal_check(
    name: Annotated[str, typer.Argument(help="A journal, or the path of a filled form.")] = "assignment_2",
    root: RootOption = ROOT,
    template: Annotated[str, typer.Option(help="The form that a file is a copy of.")] = "dtu_exam",
    strict: Annotated[bool, typer.Option("--strict", help="Open places count as faults.")] = False,
    jobs: Annotated[bool, typer.Option("--jobs", help="A number that no Slurm job made is a fault.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """List what is open, stale, missing, typed by hand or out of a form's limits; exit code 1 if something is wrong."""
    from pcamlib.journal.report import report

    text, failed = report(root.resolve(), name, template, strict=strict, jobs=jobs, as_json=as_json)
    print(text)
    raise typer.Exit(failed)
