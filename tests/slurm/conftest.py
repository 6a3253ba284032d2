"""One Slurm for a session of tests: a controller and two nodes on this host, in a folder with a short path."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from cluster import Cluster, missing

from pcamlib import cli
from pcamlib.sources import ROOT


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster with nothing in its queue; a test that kills a node starts it again."""
    if lacking := missing():
        pytest.skip(f"no Slurm on this machine ({', '.join(lacking)} not found); `make slurm` installs one")
    if not (ROOT / ".venv" / "bin" / "pcam").exists():
        pytest.skip("jobs run in .venv, and there is none here: make .venv")
    with tempfile.TemporaryDirectory(prefix="pcam-slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        started = Cluster(Path(folder))
        try:
            started.start()
            yield started
        finally:
            started.stop()


@pytest.fixture(scope="session")
def login(cluster: Cluster) -> Callable[..., tuple[int, str, str]]:
    """`login("submit", ...)`: pcam as on the cluster's login node; exit code, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(cluster.folder)
            patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
            for name in ("PCAM_DATA", "PCAM_COURSE", "PCAM_CACHE", "PCAM_SITE"):
                patch.delenv(name, raising=False)
            patch.setattr(sys, "argv", ["pcam", *map(str, arguments)])
            with pytest.raises(SystemExit) as left:
                cli.main()
            for stream in (out, err):
                stream.seek(0)
            return int(left.value.code or 0), out.read(), err.read()

    return call
