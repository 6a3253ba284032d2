"""`pcam`: parse, call, print. No logic lives here; heavy imports wait until a command needs them.

pcam --help
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable

import typer

from pcamlib.cli import benchmark, cluster, data, environment, journal, registry, serving, training
from pcamlib.errors import PcamError

app = typer.Typer(help="The PCam research journal.", no_args_is_help=True, add_completion=False, rich_markup_mode=None)
for part in (data, training, journal, benchmark, cluster, environment, serving, registry):
    app.add_typer(part.commands)  # without a name: its commands become commands of `pcam`


def main(command: Callable[[], object] = app) -> None:
    """Entry point: a `PcamError` becomes one line and exit code 2, one that was told to stop has 75.

    What nobody foresaw keeps its traceback, code 3. `inference.py` calls it with a command of its own.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it tells at length how it was loaded
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # progress is visible through a pipe too
    try:
        command()
    except PcamError as error:
        if _speaks():
            print(f"pcam: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `pcam runs table | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception:
        traceback.print_exc()
        sys.exit(3)  # 1 is the answer of `audit`, `runs diff`, `runs reproduce` and `journal check`


def _speaks() -> bool:
    """Of several processes that torchrun started, one tells of an error."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from pcamlib.training import distributed

    return distributed.speaks()
