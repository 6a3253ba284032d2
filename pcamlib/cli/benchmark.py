"""`pcam benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcamlib.cli.options import DataOption

commands = typer.Typer()


@commands.command("benchmark")
def benchmark(
    data: DataOption = None,
    batch_size: Annotated[int, typer.Option(help="Patches a batch.")] = 1,
    model: Annotated[str, typer.Option(help="small, or large: four times the channels.")] = "small",
    out: Annotated[Path | None, typer.Option(help="Write the result there, as JSON.")] = None,
    seconds: Annotated[float, typer.Option(help="Time to measure for, warm-up not counted.")] = 10.0,
) -> None:
    """Images a second at one batch size: loader only, model only, end to end."""
    from pcamlib.data.folder import data_folder
    from pcamlib.experiments import benchmark as bench
    from pcamlib.files import write_text

    found = bench.measure(data_folder(data), size=batch_size, model=model, seconds=seconds)
    print(bench.text(found))
    if out:
        write_text(out, found.model_dump_json(indent=1) + "\n")
        print(out)
