"""A notebook executed headlessly and strictly: parameters checked first, a verdict taken afterwards.

    pcam notebook run 01 --scale smoke

papermill does the executing; this front refuses what papermill lets pass (see `parameters` and `verdict`), limits the
time of the whole notebook, and leaves either a finished notebook or `NAME.failed.ipynb`, never half of one.
"""

from __future__ import annotations

import errno
import functools
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat

from pcamlib import files
from pcamlib.errors import NotebookError, nearest
from pcamlib.jobs.freshness import is_fresh, stamp, write_stamp
from pcamlib.jobs.kernel import Launch, manager_class, private_folder
from pcamlib.jobs.parameters import validate_parameters
from pcamlib.jobs.verdict import Verdict, code_cells, judge, read
from pcamlib.sources import ROOT

HEARTBEAT = 10.0  # seconds of silence after which a running cell is reported again
START = 120  # seconds that a kernel may take to answer: importing from a busy shared disk takes tens
Report = Callable[[str], None]
say: Report = functools.partial(print, flush=True)


@dataclass(frozen=True)
class Outcome:
    """An executed notebook: where it lies, whether it was run just now and why, code cells, seconds."""

    output: Path
    ran: bool
    reason: str
    cells: int = 0
    seconds: float = 0.0


def find(name: str, folder: Path = ROOT / "notebooks") -> Path:
    """The notebook called `01`, `01_reproducibility` or by its path.

    Raises:
        NotebookError: there is none; names the nearest.
    """
    if name.endswith(".ipynb") and Path(name).is_file():
        return Path(name).resolve()
    known = {path.stem: path.resolve() for path in sorted(folder.glob("*.ipynb"))}
    wanted = Path(name).name.removesuffix(".ipynb")
    prefix = f"{wanted.zfill(2)}_" if wanted.isdigit() else None
    matches = [path for stem, path in known.items() if stem == wanted or (prefix and stem.startswith(prefix))]
    if len(matches) != 1:
        raise NotebookError(f"unknown notebook '{name}' in {folder}{nearest(wanted, known)}")
    return matches[0]


def run(
    path: Path,
    parameters: dict[str, Any],
    output: Path,
    *,
    timeout: float,
    report: Report = say,
) -> Outcome:
    """Execute the notebook `path` at the repository root in a kernel of this interpreter, and write it to `output`.

    Args:
        path: the notebook; it may be `output` itself.
        parameters: name and value; none leaves the notebook's cells as they are.
        output: written whole at the end. On failure it stays as it was and `NAME.failed.ipynb` lies beside it.
        timeout: seconds for the whole notebook, kernel start included.
        report: takes a line when a cell begins and every `HEARTBEAT` seconds while it runs.

    Raises:
        NotebookError: a parameter does not fit, or the notebook did not reach its end: which cell, why, and where
            the partial notebook is. Ctrl-C and SIGTERM leave the same behind and pass on.
    """
    path, output = Path(path).resolve(), Path(output).resolve()
    checked = validate_parameters(path, parameters)
    source = read(path)
    progress = _Progress(path.stem, report)
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    if output == path and checked:
        raise NotebookError(f"{path.stem}: parameters would become part of the notebook; choose another output")
    with _terminable():
        with private_folder() as launch, progress.heartbeat():
            stop, reason = _execute(path, checked, launch, progress, timeout)
            executed = _load(launch.notebook)
        verdict = Verdict(False, reason, progress.cell) if reason else judge(executed, source)
        if executed is not None:
            executed.metadata.papermill.update(input_path=path.name, output_path=output.name)  # no machine's paths
        if verdict.ok:
            files.write_text(output, nbformat.writes(executed) + "\n")
        else:
            failure = f"{path.stem}, {_place(verdict.cell)}: {verdict.reason}"
            if executed is not None:
                executed.metadata["pcam"] = {"ok": False, "reason": verdict.reason, "cell": verdict.cell}
                files.write_text(failed, nbformat.writes(executed) + "\n")
                failure += f"; what it got to: {failed}"
            if stop is None:
                raise NotebookError(failure)
            report(failure)
            raise stop
    failed.unlink(missing_ok=True)
    seconds = progress.elapsed()
    report(f"{path.stem}  done, {progress.total} cells in {seconds:.1f} s")
    return Outcome(output, True, "asked for", progress.total, seconds)


def run_if_stale(
    path: Path,
    parameters: dict[str, Any],
    output: Path,
    *,
    timeout: float,
    data: dict[str, str] | None = None,
    products: Callable[[], Sequence[Path]] = tuple,
    report: Report = say,
) -> Outcome:
    """`run`, unless `output` still rests on the same code, parameters, data and packages (see `freshness`).

    Args:
        path, parameters, output, timeout, report: as in `run`.
        data: a fingerprint for each data set the notebook reads, by name.
        products: called after the run; the files that the notebook wrote, which are then watched too.
    """
    path, output = Path(path).resolve(), Path(output).resolve()
    basis = stamp(path, validate_parameters(path, parameters), data or {})
    fresh, reason = is_fresh(output, basis)
    if fresh:
        report(f"{path.stem}  up to date")
        return Outcome(output, False, reason)
    report(f"{path.stem}  runs: {reason}")
    done = run(path, parameters, output, timeout=timeout, report=report)
    write_stamp(output, basis, products())
    return Outcome(output, True, reason, done.cells, done.seconds)


@dataclass
class _Progress:
    """Says on which code cell a notebook is; its methods are nbclient's hooks."""

    name: str
    report: Report
    began: float = field(default_factory=time.monotonic)
    cell: int | None = None
    total: int = 0
    spoken: float = field(default_factory=time.monotonic)
    _numbers: dict[int, int] = field(default_factory=dict)

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def notebook_starts(self, notebook: Any) -> None:
        runs = [id(cell) for cell in code_cells(notebook)]
        places = [place for place, cell in enumerate(notebook.cells) if id(cell) in runs]
        self._numbers = {place: number for number, place in enumerate(places, start=1)}
        self.total = len(places)

    def cell_starts(self, cell: Any, cell_index: int) -> None:
        self.cell = self._numbers[cell_index]
        self._say("begins")

    def _say(self, what: str) -> None:
        self.spoken = time.monotonic()
        place = f"cell {self.cell}/{self.total} " if self.cell else ""
        self.report(f"{self.name}  {place}{what}, {self.elapsed():.1f} s")

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Within the block, report again whenever `HEARTBEAT` seconds went by on one cell."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(max(0.01, self.spoken + HEARTBEAT - time.monotonic())):
                if time.monotonic() >= self.spoken + HEARTBEAT:
                    self._say("is still running" if self.cell else "is starting its kernel")

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _execute(
    path: Path, parameters: dict[str, Any], launch: Launch, progress: _Progress, timeout: float
) -> tuple[BaseException | None, str]:
    """Let papermill run the notebook `path` into `launch.notebook`.

    Returns:
        a signal's exception, to be passed on; and what stopped the run, empty where a cell shows it.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # the verdict says it in one line
    deadline = progress.began + timeout
    limit = max(1, math.ceil(timeout))
    try:
        papermill.execute_notebook(
            str(path).replace("{", "{{").replace("}", "}}"),  # to papermill a path is a format string
            str(launch.notebook),
            parameters,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            start_timeout=min(START, limit),
            kernel_manager_class=manager_class(launch),
            resources={"metadata": {"path": str(ROOT)}},
            timeout_func=lambda cell: max(0.1, deadline - time.monotonic()),
            execution_timeout=limit,  # for the last words with the kernel, after the cells
            iopub_timeout=60,  # nbclient's 4 s fail on a busy machine
            on_notebook_start=progress.notebook_starts,
            on_cell_execute=progress.cell_starts,
        )
    except PapermillExecutionError:
        return None, ""
    except CellTimeoutError:
        late = time.monotonic() >= deadline
        return None, f"the time limit of {timeout:g} s was reached" if late else "its output never arrived"
    except RuntimeError as error:  # bare when the kernel does not come up
        if progress.cell is not None and not isinstance(error, DeadKernelError):
            raise
        return None, launch.end()
    except KeyboardInterrupt as stop:
        return stop, "stopped by Ctrl-C"
    except SystemExit as stop:
        return stop, "stopped by SIGTERM"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NotebookError(f"{path.stem}: {launch.folder}: the disk is full; free some space or set TMPDIR") from None
    return None, ""


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, a job's time limit, ends the block like Ctrl-C: with an exception, so that the kernel is shut down."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: let the clean-up finish
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _load(saved: Path) -> Any:
    """The notebook that papermill got to, or None where it got to none."""
    try:
        notebook = read(saved)
    except NotebookError:
        return None
    notebook.metadata.pop("pcam", None)  # the verdict on an earlier run, if the source is one's remains
    return notebook


def _place(cell: int | None) -> str:
    return "before its first cell" if cell is None else f"cell {cell}"
