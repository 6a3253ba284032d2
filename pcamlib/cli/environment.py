"""`pcam kernel ...` and `pcam doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer()
kernel_app = typer.Typer(help="The kernel of this environment, for JupyterLab.", no_args_is_help=True)
commands.add_typer(kernel_app, name="kernel")


@kernel_app.command("install")
def kernel_install(
    name: Annotated[str, typer.Option(help="What notebooks call the kernel.")] = "pcam",
    prefix: Annotated[
        Path | None, typer.Option(help="Root of an environment; default: your own Jupyter folder.")
    ] = None,
) -> None:
    """Offer this environment to JupyterLab under a name."""
    from pcamlib.jobs import kernelspec

    done = kernelspec.install(name, prefix)
    print(f"{done.folder}{f', which started {done.replaced}' if done.replaced else ''}")


@commands.command("doctor")
def doctor(json: Annotated[bool, typer.Option("--json", help="As a list of objects.")] = False) -> None:
    """Check Python, packages, driver, disks, locks and Slurm of this machine; exit code 1 when something fails."""
    from pcamlib.jobs.doctor import examine, report

    found = examine()
    print(report(found, json))
    raise typer.Exit(1 if any(one.level == "FAIL" for one in found) else 0)
