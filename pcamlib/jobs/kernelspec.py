"""The kernel that JupyterLab offers under the name `pcam`: this environment, whatever else the user has installed.

    pcam kernel install

Headless notebooks do not use it (see `kernel`); an Open OnDemand session, or a JupyterLab of another environment, does.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_core.paths import jupyter_data_dir

from pcamlib import files
from pcamlib.errors import PcamError
from pcamlib.sources import ROOT

NAME = "pcam"
NAMES = re.compile(r"[a-z0-9._-]+")  # what jupyter_client takes for a kernel's name


@dataclass(frozen=True)
class Installed:
    """A kernelspec that was written: its folder, and the Python of the one it replaced (None: none, or the same)."""

    folder: Path
    replaced: str | None = None


def folder(name: str = NAME, prefix: Path | None = None) -> Path:
    """Where the kernelspec `name` lies: under `prefix`, an environment's root, or in the user's Jupyter folder."""
    share = Path(prefix).expanduser().absolute() / "share" / "jupyter" if prefix else Path(jupyter_data_dir())
    return share / "kernels" / name


def interpreter(spec: Path) -> str | None:
    """The Python that the kernelspec in the folder `spec` starts; None where there is none, or a broken one."""
    try:
        return str(files.read_json(spec / "kernel.json")["argv"][0])
    except (PcamError, OSError, LookupError, TypeError):
        return None


def install(name: str = NAME, prefix: Path | None = None, python: str = sys.executable) -> Installed:
    """Write a kernelspec that starts `python`, without the packages of ~/.local and of a loaded module.

    It is whole or absent, and installing it again changes nothing.

    Raises:
        PcamError: the name is none, or is Jupyter's own; `python` has no ipykernel; the folder cannot be written.
    """
    if not NAMES.fullmatch(name):
        raise PcamError(f"kernel name '{name}': only a-z, 0-9, '.', '_' and '-'")
    if name == "python3":  # the name in most notebooks: those of other projects would run here from then on
        raise PcamError("kernel name 'python3' is every environment's own kernel; choose another, such as 'pcam'")
    if prefix is not None and not prefix.expanduser().is_dir():
        raise PcamError(f"--prefix {prefix}: no such folder; name the root of an environment, such as .venv")
    found = subprocess.run([python, "-I", "-c", "import ipykernel"], check=False, capture_output=True, text=True)
    if found.returncode:
        said = (found.stderr.strip().splitlines() or [f"exit code {found.returncode}"])[-1]
        raise PcamError(
            f"{python} cannot start a kernel ({said}): run 'make .venv', then .venv/bin/pcam kernel install"
        )
    target = folder(name, prefix)
    before = interpreter(target)
    files.write_json(target / "kernel.json", _spec(python))
    return Installed(target, before if before != python else None)


def _spec(python: str) -> dict[str, Any]:
    return {
        "argv": [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": f"PCam ({ROOT.name})",
        "language": "python",
        "env": {"PYTHONNOUSERSITE": "1", "PYTHONPATH": ""},  # empty counts as none
        "metadata": {"debugger": True},
    }
