"""The journal's way through a whole notebook: evidence, figures, staleness, failure, rendering, check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from pcamlib import make
from pcamlib.errors import ConfigError, NotebookError
from pcamlib.files import sha256_file
from pcamlib.jobs.verdict import verdict
from pcamlib.journal import check, evidence, render
from pcamlib.sources import ROOT

pytestmark = pytest.mark.slow
SOURCE = ROOT / "notebooks" / "00_data.ipynb"
EPOCHS = ["epochs=1"]


def state(root: Path) -> dict[str, str]:
    """Digest of every file that a reader of the journal rests on, and of the executed notebook."""
    kept = [*root.glob("journal/evidence/*"), *root.glob("assets/*"), *root.glob("runs/notebooks/00_data.ipynb*")]
    return {path.relative_to(root).as_posix(): sha256_file(path) for path in kept}


@pytest.fixture(autouse=True)
def _no_data_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PCAM_DATA", raising=False)
    monkeypatch.delenv("PCAM_COURSE", raising=False)


@pytest.fixture(scope="module")
def made(synthetic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root in which notebook 00 was executed once, for one epoch; nobody may leave it changed."""
    root, said = tmp_path_factory.mktemp("root"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PCAM_COURSE", raising=False)
        done = make.notebook("00", "smoke", root=root, data=str(synthetic_dir), assignments=EPOCHS, report=said.append)
    assert done.ran and done.reason == "never run" and done.output == root / "runs" / "notebooks" / "00_data.ipynb"
    assert said[0] == f"data: {synthetic_dir} (SYNTHETIC)" and said[-1] == f"executed notebook: {done.output}"
    assert any("cell 1/" in line for line in said), "progress is visible"
    return root


def test_what_a_notebook_leaves(made: Path, synthetic_dir: Path) -> None:
    assert verdict(made / "runs" / "notebooks" / "00_data.ipynb", SOURCE).ok
    record = evidence.records(made)["00_data"]
    assert record.synthetic and record.provenance["parameters"] == {"epochs": 1}
    keys = {claim.key for claim in record.evidence}
    assert {"data.splits", "data.balance", "data.sampler", "data.intensity", "data.outliers", "data.mlp.auc"} <= keys
    figures = [claim for claim in record.evidence if claim.kind == "figure"]
    assert len(figures) >= 5 and all((made / file).is_file() for claim in figures for file in claim.files)
    assert {path.name for path in (made / "assets").iterdir()} == {Path(f).name for c in figures for f in c.files}
    auc = next(claim for claim in record.evidence if claim.key == "data.mlp.auc")
    assert auc.n == 256 and auc.interval and auc.interval[0] <= auc.value <= auc.interval[1] and auc.baseline
    assert list(auc.runs) == [path.name for path in (made / "runs").glob("00-mlp-*")]
    text = (made / "journal" / "evidence" / "00_data.json").read_text()
    assert str(made) not in text and str(synthetic_dir) not in text, "evidence names no path of this machine"


def test_a_second_call_does_not_run(made: Path, synthetic_dir: Path) -> None:
    before, said = state(made), []
    again = make.notebook("00", "smoke", root=made, data=str(synthetic_dir), assignments=EPOCHS, report=said.append)
    assert not again.ran and "00_data  up to date" in said and state(made) == before


def test_two_processes_never_run_one_notebook(made: Path, synthetic_dir: Path) -> None:
    """Also not one that is up to date: nobody knows before the other is done."""
    code = "import sys; from pathlib import Path; from pcamlib.locks import held\nwith held(Path(sys.argv[1])): input()"
    holder = made / "runs" / "notebooks" / ".00_data.held"
    pipes = {"stdin": subprocess.PIPE, "env": {**os.environ, "SLURM_JOB_ID": "7"}}
    with subprocess.Popen([sys.executable, "-c", code, str(holder)], **pipes) as other:
        deadline = time.monotonic() + 60
        while not list(holder.glob(".lock-*")):
            assert time.monotonic() < deadline and other.poll() is None
            time.sleep(0.05)
        with pytest.raises(
            NotebookError, match=r"00_data is being run already into .*: wait for it \(job 7, process \d+"
        ):
            make.notebook(
                "00", "smoke", root=made, data=str(synthetic_dir), assignments=EPOCHS, report=lambda line: None
            )
        other.communicate(b"\n")


def test_it_renders_and_only_open_places_are_left(made: Path) -> None:
    markdown, page = render.render("assignment_2", made)
    found = check.check(made, "assignment_2")
    assert found and [str(finding) for finding in found if finding.severity != "open"] == []
    text = markdown.read_text()
    assert "synthetic" in text.lower() and "assets/data.balance.png" in text and page.stat().st_size > 10_000
    assert any("Question 5" in finding.where for finding in found), "what no notebook answers is listed"


def test_a_failing_notebook_leaves_the_journal_as_it_was(made: Path, synthetic_dir: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(SOURCE, as_version=4)
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    last.source = "raise ValueError('no tissue')\nevidence.close()"
    broken = tmp_path / SOURCE.name
    nbformat.write(notebook, broken)
    before = state(made)
    with pytest.raises(
        NotebookError, match=r"00_data, cell \d+: ValueError: no tissue; what it got to: .*failed.ipynb"
    ):
        make.notebook(
            str(broken), "smoke", root=made, data=str(synthetic_dir), assignments=EPOCHS, report=lambda line: None
        )
    assert state(made) == before
    failed = made / "runs" / "notebooks" / "00_data.failed.ipynb"
    assert failed.is_file()
    failed.unlink()


def test_the_whole_journal_of_a_scale(made: Path, synthetic_dir: Path, tmp_path: Path) -> None:
    scale = tmp_path / "one.yaml"
    scale.write_text(json.dumps({"00_data": {"parameters": {"epochs": 1}, "timeout": 120}}))
    said: list[str] = []
    journals = make.journal(str(scale), root=made, data=str(synthetic_dir), report=said.append)
    assert [path.name for path in journals] == ["JOURNAL.md", "JOURNAL_assignment_1.md", "JOURNAL_dtu_exam.md"]
    journal = journals[0]
    assert all(path.is_file() and path.with_suffix(".html").is_file() for path in journals)
    assert "00_data  up to date" in said and sum("still open" in line for line in said) == 3
    assert f"journal: {journal}\nas a page: {made / 'JOURNAL.html'}" in said and said[-1].startswith("in ")
    journal.write_text(journal.read_text() + "our AUC is the best\n")
    said.clear()
    make.journal(str(scale), root=made, data=str(synthetic_dir), report=said.append)
    assert "our AUC" not in journal.read_text() and sum(line.endswith(", 0 faults") for line in said) == 3


def test_what_is_refused_before_any_data_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "data_folder", lambda *_: pytest.fail("patches were generated"))
    scale = tmp_path / "one.yaml"
    scale.write_text("00_data: {}\n")
    with pytest.raises(NotebookError, match=r"01_reproducibility has no job at scale .*one.yaml; known: 00_data"):
        make.notebook("01", str(scale), root=tmp_path)
    with pytest.raises(NotebookError, match="did you mean 'epochs'"):
        make.notebook("00", str(scale), root=tmp_path, assignments=["epoch=1"])
    scale.write_text("00_data: {parameters: {epoch: 1}}\n")
    with pytest.raises(NotebookError, match="did you mean 'epochs'"):
        make.notebook("00", str(scale), root=tmp_path)
    with pytest.raises(ConfigError, match="unknown scale"):
        make.journal("tiny", root=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["one.yaml"]


def test_another_value_or_force_runs_again(made: Path, synthetic_dir: Path) -> None:
    """Last, since it changes what was made."""
    first = {path.name for path in (made / "runs").glob("00-mlp-*")}
    call = {"root": made, "data": str(synthetic_dir), "report": lambda line: None}
    changed = make.notebook("00", "smoke", assignments=["epochs=2"], **call)
    assert changed.ran and changed.reason == "parameter epochs: 1 -> 2"
    second = {path.name for path in (made / "runs").glob("00-mlp-*")}
    assert len(second) == 1 and second != first, "the run of the other length is gone"
    assert evidence.records(made)["00_data"].provenance["parameters"] == {"epochs": 2}
    assert {*evidence.load(made)["data.mlp.auc"].runs} == second
    forced = make.notebook("00", "smoke", assignments=["epochs=2"], force=True, **call)
    assert forced.ran and {path.name for path in (made / "runs").glob("00-mlp-*")} == second, "no training again"
