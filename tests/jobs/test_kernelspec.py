"""The kernel for JupyterLab: what is installed, where, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import run_kernel
from typer.testing import CliRunner

from pcamlib import files
from pcamlib.cli.environment import commands
from pcamlib.errors import PcamError
from pcamlib.jobs import kernelspec
from pcamlib.sources import ROOT


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's Jupyter folder, an empty one."""
    folder = tmp_path / "jupyter data"
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(folder))
    return folder


def test_jupyter_starts_it_in_this_environment(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = kernelspec.install()
    assert installed == kernelspec.Installed(data_dir / "kernels" / "pcam")
    assert kernelspec.interpreter(installed.folder) == sys.executable
    assert [path.name for path in installed.folder.iterdir()] == ["kernel.json"]
    spec = KernelSpecManager().get_kernel_spec("pcam")
    assert (spec.display_name, spec.language) == (f"PCam ({ROOT.name})", "python")
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")  # a loaded module
    code = (
        "import os, site, sys; answer = f'{sys.executable} {site.ENABLE_USER_SITE} {\"/somewhere/else\" in sys.path}'"
    )
    with run_kernel(kernel_name="pcam") as client:
        reply = client.execute_interactive(code, user_expressions={"answer": "answer"}, timeout=60)
    assert reply["content"]["user_expressions"]["answer"]["data"]["text/plain"] == f"'{sys.executable} False False'"


def test_again_changes_nothing_and_a_foreign_one_is_named(data_dir: Path) -> None:
    path = kernelspec.install().folder / "kernel.json"
    first = path.read_text()
    assert kernelspec.install().replaced is None
    assert path.read_text() == first
    path.write_text(first.replace(json.dumps(sys.executable), '"/other/.venv/bin/python"'))
    assert kernelspec.install().replaced == "/other/.venv/bin/python"
    path.write_text(first[:40])  # half of one, by some other program
    assert kernelspec.interpreter(path.parent) is None
    assert kernelspec.install().replaced is None
    assert path.read_text() == first


def test_an_environment_of_its_own(tmp_path: Path, data_dir: Path) -> None:
    (tmp_path / "env").mkdir()
    result = CliRunner().invoke(commands, ["kernel", "install", "--name", "pcam-2", "--prefix", str(tmp_path / "env")])
    path = tmp_path / "env" / "share" / "jupyter" / "kernels" / "pcam-2"
    assert (result.exit_code, result.stdout) == (0, f"{path}\n")
    assert kernelspec.interpreter(path) == sys.executable
    assert not data_dir.exists()


@pytest.mark.parametrize("name", ["", "two words", "../up", "Pcam"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(PcamError, match=r"kernel name '.*': only a-z, 0-9"):
        kernelspec.install(name)


def test_what_is_refused(tmp_path: Path, data_dir: Path) -> None:
    with pytest.raises(PcamError, match="'python3' is every environment's own"):
        kernelspec.install("python3")
    with pytest.raises(PcamError, match=r"--prefix .*/gone: no such folder"):
        kernelspec.install(prefix=tmp_path / "gone")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'ipykernel'\" >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(PcamError, match=r"python cannot start a kernel \(ModuleNotFoundError.*run 'make .venv'"):
        kernelspec.install(python=str(python))
    assert not data_dir.exists()
    data_dir.write_text("a file where the folder should be")
    with pytest.raises(PcamError, match="cannot be written"):
        kernelspec.install()


def test_a_kill_in_mid_write_leaves_the_old_one(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kernelspec.install().folder / "kernel.json"
    path.write_text('{"argv": ["/other/python"]}')

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        kernelspec.install()
    assert path.read_text() == '{"argv": ["/other/python"]}'
    assert [entry.name for entry in path.parent.iterdir()] == ["kernel.json"]
