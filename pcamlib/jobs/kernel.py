"""The kernel of a headless notebook: this interpreter, spoken to over sockets in a private folder, ended with its run.

No port is taken, so parallel kernels cannot collide and nothing crosses a shared node in clear text; no installed
kernelspec, start-up file or history of the user takes part.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from pcamlib.errors import NotebookError

SOCKET_PATH = 100  # bytes; the kernel's address, 108 on Linux and 104 on macOS with the closing zero


@dataclass
class Launch:
    """One kernel to be: its private folder, and the process once it was started."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    def end(self) -> str:
        """How the process ended, in words."""
        code = self.process.poll() if self.process else None
        if code == -signal.SIGKILL:
            return "the kernel was killed (signal 9): usually out of memory"
        log = self.log.read_text(encoding="utf-8", errors="replace").strip() if self.log.is_file() else ""
        said = f" ({log.splitlines()[-1]})" if log else ""
        if code is None:
            return f"the kernel does not answer{said}"
        return f"the kernel {f'was killed (signal {-code})' if code < 0 else f'left with exit code {code}'}{said}"

    @property
    def notebook(self) -> Path:
        """Where the notebook is saved at every cell while it runs: beside the sockets, on the node's own disk."""
        return self.folder / "notebook.ipynb"

    @property
    def log(self) -> Path:
        """What the kernel process itself printed; what cells print goes to the notebook."""
        return self.folder / "log"


class _Manager(AsyncKernelManager):
    launch: Launch

    def __init__(self, **kwargs: Any) -> None:
        folder = self.launch.folder
        super().__init__(
            **kwargs, transport="ipc", ip=str(folder / "s"), connection_file=str(folder / "connection.json")
        )

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="Python 3",
            language="python",
        )

    async def start_kernel(self, **kwargs: Any) -> None:  # type: ignore[override]
        # PYDEVD_...: no debugger attaches here, and its warning on frozen modules would be all that stderr shows
        isolation = {
            "IPYTHONDIR": str(self.launch.folder / "ipython"),
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        env = {**os.environ, **isolation}
        with open(self.launch.log, "wb") as log:
            await super().start_kernel(**kwargs, env=env, stdout=log, stderr=log)
        self.launch.process = self.provisioner.process  # type: ignore[union-attr]


def manager_class(launch: Launch) -> type[AsyncKernelManager]:
    """The kernel manager that nbclient makes its one instance of."""
    return type("Manager", (_Manager,), {"launch": launch})


@contextmanager
def private_folder() -> Iterator[Launch]:
    """A launch whose folder only this user can read; at the end folder, kernel and its children are gone.

    Raises:
        NotebookError: no folder with a path short enough for a socket can be written.
    """
    for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp")):
        with suppress(OSError):
            folder = tempfile.mkdtemp(prefix="pcam-", dir=parent)
            if len(os.fsencode(folder)) + len("/s-5") <= SOCKET_PATH:
                break
            Path(folder).rmdir()
    else:
        raise NotebookError(f"no socket can be made under {tempfile.gettempdir()} or /tmp; set TMPDIR to a short path")
    launch = Launch(Path(folder))
    try:
        yield launch
    finally:
        if launch.process:  # the kernel leads its own process group: workers that outlived it are in there
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(launch.process.pid, signal.SIGKILL)
            launch.process.wait()
        shutil.rmtree(launch.folder, ignore_errors=True)
