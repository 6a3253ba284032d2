"""`pcam data ...` and `pcam audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcamlib.cli.options import DataOption, RootOption
from pcamlib.sources import ROOT

commands = typer.Typer()
data_app = typer.Typer(help="Fetch, generate and describe patches.", no_args_is_help=True)
commands.add_typer(data_app, name="data")


@data_app.command("fetch")
def data_fetch(folder: Path) -> None:
    """Download the nine official files (7.5 GiB packed), verified, resumed where a download broke off."""
    from pcamlib.data.fetch import fetch

    fetch(folder)


@data_app.command("synthetic")
def data_synthetic(
    folder: Path,
    train: int = 4000,
    valid: int = 1000,
    test: int = 1000,
    seed: int = 0,
    course: Annotated[Path | None, typer.Option(help="Also write the course's flawed kind of files there.")] = None,
) -> None:
    """Generate H&E-like patches in the official layout."""
    from pcamlib.data.flaws import course_like
    from pcamlib.data.synthetic import generate

    generate(folder, seed=seed, sizes={"train": train, "valid": valid, "test": test})
    if course:
        course_like(folder, course, seed=seed)


@data_app.command("info")
def data_info(data: DataOption = None) -> None:
    """Splits, class counts, storage and flagged patches of a folder."""
    from pcamlib.data.folder import data_folder
    from pcamlib.experiments import explore

    splits = explore.opened(data_folder(data))
    print(explore.split_table(splits).to_string(index=False))
    print(explore.outlier_table(splits).to_string(index=False))


@data_app.command("lock")
def data_lock(
    root: RootOption = ROOT,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 where the two disagree.")] = False,
) -> None:
    """Write data.lock: the version of every data set that the journal's evidence rests on."""
    from pcamlib.journal import datalock

    if check:
        datalock.read(root)  # a missing lock is an error here
        found = datalock.findings(root)
        for where, what, do in found:
            print(f"{where}: {what}; {do}")
        raise typer.Exit(1 if found else 0)
    print(datalock.write(root))


@commands.command("audit")
def audit(
    folder: Annotated[
        str | None, typer.Argument(help="Folder with the PCam files; default $PCAM_DATA, else synthetic.")
    ] = None,
    labels: Annotated[bool, typer.Option(help="Also look for wrong labels: trains small networks, minutes.")] = True,
    models: Annotated[bool, typer.Option(help="Also look for backdoors in a trained network.")] = False,
    ids: Annotated[Path | None, typer.Option(help="List of tile ids (SHA-1) to authenticate the patches by.")] = None,
    run: Annotated[Path | None, typer.Option(help="A run whose normalisation is checked against these splits.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the whole report there, every row number included.")] = None,
) -> None:
    """Size, integrity, duplicates, leakage, labels, poisoning; exit code 1 when anything is found, 2 when unreadable.

    The rows to leave out are kept beside the data: train on the rest with data.clean=true.
    """
    from pcamlib.audit import report
    from pcamlib.audit.stages import Options
    from pcamlib.data.folder import data_folder
    from pcamlib.files import write_json

    where = data_folder(folder)
    if json:
        write_json(json, {"folder": str(where), "findings": None})  # a place that cannot be written is told now
    found = report.audit(where, Options(labels=labels, models=models, ids=ids, run=run))
    print(found.text())
    if json:
        write_json(json, found.json())
    raise typer.Exit(1 if found.findings else 0)
