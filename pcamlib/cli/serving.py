"""`pcam serve`, `export`, `bundle` and `drift`."""

from __future__ import annotations

import typer

commands = typer.Typer()
