"""Running notebooks with real kernels: the good end, and every bad one."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pcamlib.errors import NotebookError
from pcamlib.jobs import kernel, notebook
from pcamlib.jobs.verdict import code_cells, read, verdict
from pcamlib.sources import ROOT

LOOK = """import json, os, sys
from ipykernel.connect import get_connection_info
print(json.dumps({"connection": json.loads(get_connection_info()), "python": sys.executable, "cwd": os.getcwd(),
                  "seed": seed, "split": split, "extra": os.environ.get("PCAM_EXTRA"), "lr": lr,
                  "ipython": os.environ["IPYTHONDIR"], "backend": os.environ["MPLBACKEND"]}))"""


@pytest.fixture
def said() -> list[str]:
    return []


def test_find_by_number_name_and_path(make, tmp_path):
    path = make("01_reproducibility")
    make("00_data")
    for name in ("01", "1", "01_reproducibility", "01_reproducibility.ipynb", str(path)):
        assert notebook.find(name, tmp_path) == path
    with pytest.raises(NotebookError, match=r"unknown notebook '01_reproducability'.* mean '01_reproducibility'"):
        notebook.find("01_reproducability", tmp_path)
    for name in ("07", "", str(tmp_path / "none.ipynb")):
        with pytest.raises(NotebookError, match="unknown notebook"):
            notebook.find(name, tmp_path)


def test_a_good_run(make, tmp_path, said, monkeypatch):
    monkeypatch.setenv("PCAM_EXTRA", "$x")
    folder = tmp_path / "a folder {with} spaces"
    folder.mkdir()
    path = make(f"{folder.name}/00_look", LOOK, "", "40 + 2")
    output = folder / "done" / "00_look.ipynb"
    before = path.read_bytes()
    outcome = notebook.run(path, {"split": "007", "lr": 1}, output, timeout=60, report=said.append)
    assert (outcome.output, outcome.ran, outcome.cells) == (output, True, 4)
    assert path.read_bytes() == before
    executed = read(output)
    cells = code_cells(executed)
    seen = json.loads(cells[2].outputs[0].text)
    assert seen["connection"]["transport"] == "ipc"  # no port is taken
    assert not Path(seen["connection"]["ip"]).parent.exists()
    assert (seen["python"], seen["cwd"]) == (sys.executable, str(ROOT))
    assert (seen["split"], seen["lr"], seen["seed"], seen["extra"]) == ("007", 1.0, 0, "$x")
    assert seen["ipython"].startswith(str(Path(seen["connection"]["ip"]).parent))  # none of the user's start-up files
    assert "inline" in seen["backend"]
    assert cells[3].outputs[0].data["text/plain"] == "42"
    assert verdict(output, path).ok
    assert executed.metadata.papermill.input_path == "00_look.ipynb"
    assert str(tmp_path) not in output.read_text()
    assert [entry.name for entry in output.parent.iterdir()] == ["00_look.ipynb"]
    assert [line.split(",")[0] for line in said[:2]] == ["00_look  cell 1/4 begins", "00_look  cell 2/4 begins"]
    assert said[-1].startswith("00_look  done, 4 cells in ")


def test_a_raising_cell_leaves_the_earlier_success(make, tmp_path):
    path = make("00_raises", "x = 1", "raise ValueError('no tissue\\nin this patch')", "2")
    output = tmp_path / "out" / "00_raises.ipynb"
    output.parent.mkdir()
    output.write_text("an earlier success")
    with pytest.raises(NotebookError) as caught:
        notebook.run(path, {}, output, timeout=60, report=str)
    failed = output.with_name("00_raises.failed.ipynb")
    assert str(caught.value) == f"00_raises, cell 3: ValueError: no tissue; what it got to: {failed}"
    assert output.read_text() == "an earlier success"
    assert sorted(entry.name for entry in output.parent.iterdir()) == ["00_raises.failed.ipynb", "00_raises.ipynb"]
    assert read(failed).metadata.pcam == {"ok": False, "reason": "ValueError: no tissue", "cell": 3}
    assert not verdict(failed, path).ok
    make("00_raises", "x = 1")
    notebook.run(path, {}, output, timeout=60, report=str)
    assert not failed.exists()  # a success clears the remains


KILL = ["import os", "os.kill(os.getpid(), 9)"]


@pytest.mark.parametrize(
    ("cells", "timeout", "message"),
    [
        ([*KILL, "1"], 60, r"cell 3: the kernel was killed \(signal 9\): usually out of memory; "),
        (KILL, 60, r"cell 3: the kernel was killed \(signal 9\)"),  # in its last cell: to papermill all is completed
        (["import os", "os._exit(3)"], 60, r"cell 3: the kernel left with exit code 3"),
        (["import sys", "sys.exit(0)", "1"], 60, r"cell 3: SystemExit: 0"),  # to papermill this is a success
        (["import time", *["time.sleep(1)"] * 20], 5, r"cell \d+: the time limit of 5 s was reached"),  # no cell alone
    ],
)
def test_every_bad_end(make, tmp_path, cells, timeout, message):
    path, output = make("00_ends", *cells), tmp_path / "out" / "00_ends.ipynb"
    with pytest.raises(NotebookError, match=f"^00_ends, {message}"):
        notebook.run(path, {}, output, timeout=timeout, report=str)
    assert [entry.name for entry in output.parent.iterdir()] == ["00_ends.failed.ipynb"]
    assert not verdict(output.with_name("00_ends.failed.ipynb"), path).ok


def test_a_kernel_that_does_not_start(make, tmp_path, monkeypatch):
    shim = tmp_path / "python"
    shim.write_text("#!/bin/sh\necho 'No module named ipykernel_launcher' >&2\nexit 1\n")
    shim.chmod(0o755)
    monkeypatch.setattr(kernel.sys, "executable", str(shim))
    with pytest.raises(
        NotebookError, match=r"before its first cell: the kernel left with exit code 1 \(No module named"
    ):
        notebook.run(make("00_none", "1"), {}, tmp_path / "out.ipynb", timeout=60, report=str)


def test_what_stops_a_run_before_any_kernel(make, tmp_path, monkeypatch):
    monkeypatch.setattr(notebook, "_execute", lambda *_: pytest.fail("a kernel was started"))
    path = make("00_data", "1")
    with pytest.raises(NotebookError, match="did you mean 'seed'"):
        notebook.run(path, {"sed": 1}, tmp_path / "out.ipynb", timeout=60)
    with pytest.raises(NotebookError, match="choose another output"):
        notebook.run(path, {"seed": 1}, path, timeout=60)
    with pytest.raises(NotebookError, match="no such notebook"):
        notebook.run(tmp_path / "none.ipynb", {}, tmp_path / "out.ipynb", timeout=60)
    assert [entry.name for entry in tmp_path.iterdir()] == ["00_data.ipynb"]


def test_a_full_disk_is_one_line(make, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("papermill.engines.write_ipynb", full)
    with pytest.raises(NotebookError, match=r"00_data: .*: the disk is full; free some space or set TMPDIR"):
        notebook.run(make("00_data", "1"), {}, tmp_path / "out.ipynb", timeout=60, report=str)
    assert [entry.name for entry in tmp_path.iterdir()] == ["00_data.ipynb"]


def test_no_short_place_for_a_socket(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with kernel.private_folder() as launch:  # a long TMPDIR, as Slurm sets it, falls back
        assert launch.folder.parent == Path("/tmp")
    monkeypatch.setattr(kernel, "SOCKET_PATH", 4)
    with pytest.raises(NotebookError, match="set TMPDIR to a short path"), kernel.private_folder():
        pass
    assert not list(long.iterdir())


def test_in_place_with_a_heartbeat(make, monkeypatch, said):
    monkeypatch.setattr(notebook, "HEARTBEAT", 0.3)
    path = make("00_slow", "import time\ntime.sleep(1.5)")
    begun = time.monotonic()
    notebook.run(path, {}, path, timeout=60, report=said.append)
    beats = [line for line in said if "cell 2/2 is still running" in line]
    assert 3 <= len(beats) <= (time.monotonic() - begun) / 0.3  # a busy machine takes longer over the cell
    assert verdict(path, path).ok


def test_parallel_runs_do_not_collide(make, tmp_path):
    paths = [make(f"0{n}_parallel", "import time\ntime.sleep(0.5)", "print(seed)") for n in range(3)]

    def one(path: Path) -> str:
        output = tmp_path / "out" / path.name
        notebook.run(path, {"seed": int(path.name[:2])}, output, timeout=60, report=str)
        return read(output).cells[-1].outputs[0].text.strip()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(one, paths)) == ["0", "1", "2"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_kernel_and_leaves_a_failed_notebook(make, tmp_path, number, code):
    pid = tmp_path / "pid"
    child = f"import os, subprocess, time\nworker = subprocess.Popen(['sleep', '60'])\nopen({str(pid)!r}, 'w')"
    path = make("00_long", child + ".write(f'{os.getpid()} {worker.pid}')", "time.sleep(60)")
    output = tmp_path / "out" / "00_long.ipynb"
    program = (
        "import signal, sys; from pathlib import Path; from pcamlib.jobs import notebook\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "notebook.run(Path(sys.argv[1]), {}, Path(sys.argv[2]), timeout=60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (pid.is_file() and pid.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode in (code, -number)
    name = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    assert f"00_long, cell 3: stopped by {name}; what it got to: " in out
    assert [entry.name for entry in output.parent.iterdir()] == ["00_long.failed.ipynb"]
    assert not verdict(output.with_name("00_long.failed.ipynb"), path).ok
    for orphan in map(int, pid.read_text().split()):
        with pytest.raises(ProcessLookupError):
            _wait_for_end(orphan)


def _wait_for_end(pid: int) -> None:
    """Returns while `pid` lives on for 5 s; a killed orphan may stay a zombie until init reaps it."""
    for _ in range(50):
        os.kill(pid, 0)
        if (
            Path(f"/proc/{pid}/stat").exists()
            and Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] == "Z"
        ):
            raise ProcessLookupError
        time.sleep(0.1)
