"""The whole audit: exit codes, masks, caches, interruption, and every bad input."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pytest

from pcamlib.audit import measure, report, stages
from pcamlib.audit.findings import RULES
from pcamlib.audit.stages import Options
from pcamlib.audit.truth import marked
from pcamlib.config import Data
from pcamlib.data import convert
from pcamlib.data.flaws import hidden_flaws
from pcamlib.data.layout import split_path
from pcamlib.data.patches import mask_path, open_split
from pcamlib.data.rewrite import Truth
from pcamlib.data.synthetic import generate
from pcamlib.errors import DataError

QUICK = Options(labels=False)


def silent(line: str) -> None:
    """Tests listen to nobody."""


@pytest.fixture(autouse=True)
def _no_folder_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PCAM_DATA", "PCAM_COURSE", "PCAM_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 train and 96 valid synthetic patches with their slides."""
    folder = tmp_path_factory.mktemp("clean")
    generate(folder, seed=2, sizes={"train": 320, "valid": 96}, report=silent)
    return folder


@pytest.fixture
def copied(clean: Path, tmp_path: Path) -> Path:
    """A copy of `clean`, without its cache, to be damaged."""
    folder = tmp_path / "data"
    shutil.copytree(clean, folder, ignore=shutil.ignore_patterns(".pcam-cache"))
    return folder


def rewrite(folder: Path, split: str, **options: Any) -> None:
    """Store the split's x again, in another form."""
    path = split_path(folder, split, "x")
    with h5py.File(path) as file:
        values, about = file["x"][:], dict(file.attrs)
    dtype = options.pop("dtype", values.dtype)
    with h5py.File(path, "w") as file:
        file.attrs.update(about)
        file.create_dataset("x", data=values.astype(dtype), **options)


def test_a_clean_set_passes_and_leaves_an_empty_mask(clean: Path, pcam: Callable[..., Any]) -> None:
    code, out, err = pcam("audit", clean, "--no-labels")
    assert (code, err) == (0, ""), out
    assert "320" in out and "SYNTHETIC" in out and "0 findings" in out
    mask = open_split(clean, "train").audited
    assert mask == {"duplicates": [], "conflicts": [], "leak": [], "near": [], "poison": []}
    assert np.array_equal(open_split(clean, "train").rows(clean=True), np.arange(320))


def test_what_is_planted_is_found_and_left_out(synthetic_dir: Path, tmp_path: Path) -> None:
    truth = hidden_flaws(synthetic_dir, tmp_path / "flawed", seed=1)
    found = report.audit(tmp_path / "flawed", QUICK, silent)
    table = {(row["check"], row["split"]): row for row in marked(found, truth)}
    for check in ("duplicates.exact", "duplicates.leak"):
        assert table[check, "train"]["recall"] == table[check, "train"]["precision"] == 1, table[check, "train"]
    assert table["leakage.slides", "train"]["recall"] == 1
    patches, twins = open_split(tmp_path / "flawed", "train"), truth.rows["train/exact"]
    rows = patches.rows(clean=["duplicates"])
    assert not np.isin(twins.max(1), rows).any() and np.isin(twins.min(1), rows).all()
    assert not np.isin(truth.rows["train>valid/exact"][:, 0], patches.rows(clean=["leak"])).any()


def test_course_file_exit_code_json_and_counts(course_dir: Path, tmp_path: Path, pcam: Callable[..., Any]) -> None:
    code, out, _ = pcam("audit", course_dir, "--no-labels", "--json", tmp_path / "report.json")
    assert code == 1
    found = json.loads((tmp_path / "report.json").read_text())
    truth = Truth.load(course_dir / "truth.json").rows
    rows = {finding["check"]: finding["rows"] for finding in found["findings"] if finding["split"] == "train"}
    for check, kind in {"nan": "nan", "above": "spike", "black": "black", "white": "white"}.items():
        assert rows[f"integrity.{check}"] == truth[f"train/{kind}"].tolist()
    assert "storage.dtype" in rows and "certain" in out and "->" in out


def test_a_repeated_audit_reads_nothing(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = report.audit(clean, QUICK, silent)
    monkeypatch.setattr(convert, "blocks", None)
    for stage in stages.STAGES:
        monkeypatch.setattr(stage.run, "__code__", (lambda splits, options, say: 1 / 0).__code__)
    again = report.audit(clean, QUICK, silent)
    assert again.json() == first.json()


def test_a_shorter_audit_keeps_the_rules_of_a_longer_one(copied: Path) -> None:
    report.audit(copied, QUICK, silent)
    path = mask_path(open_split(copied, "train").stored)
    mask = json.loads(path.read_text())
    path.write_text(json.dumps({**mask, "rules": {**mask["rules"], "labels": [7]}}))
    report.audit(copied, QUICK, silent)
    assert open_split(copied, "train").audited["labels"] == [7]


def test_another_valid_file_makes_the_mask_of_train_stale(copied: Path) -> None:
    report.audit(copied, QUICK, silent)
    assert open_split(copied, "train").audited["leak"] == []
    rewrite(copied, "valid", dtype=np.float32)
    with pytest.raises(DataError, match="not audited as it is now"):
        open_split(copied, "train").rows(clean=True)


def test_a_damaged_cache_is_made_again(copied: Path) -> None:
    first = report.audit(copied, QUICK, silent).json()
    for path in (copied / ".pcam-cache").glob("*audit*"):
        path.write_bytes(path.read_bytes()[:-100])
    assert report.audit(copied, QUICK, silent).json() == first


def test_labels_without_patches_are_not_passed_over(copied: Path, pcam: Callable[..., Any]) -> None:
    shutil.copy(split_path(copied, "valid", "y"), split_path(copied, "test", "y"))
    code, _, err = pcam("audit", copied, "--no-labels")
    assert code == 2 and "test_x.h5: missing, while its labels" in err and err.count("\n") == 1


def test_a_report_that_cannot_be_written_is_told_before_the_audit(clean: Path, pcam: Callable[..., Any]) -> None:
    code, out, err = pcam("audit", clean, "--no-labels", "--json", clean)
    assert code == 2 and err.count("\n") == 1 and "audit" not in out


def test_what_nobody_foresaw_is_exit_code_3(clean: Path, pcam: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(report, "audit", lambda *_: 1 / 0)
    code, _, err = pcam("audit", clean)
    assert code == 3 and "ZeroDivisionError" in err


def test_other_labels_are_audited_again(copied: Path) -> None:
    report.audit(copied, QUICK, silent)
    with h5py.File(split_path(copied, "train", "y"), "r+") as file:
        file["y"][:] = np.sort(file["y"][:], axis=0)
    checks = {finding.check for finding in report.audit(copied, QUICK, silent).findings}
    assert "leakage.order" in checks


def test_an_interrupted_audit_goes_on(copied: Path) -> None:
    """Killed in the middle of reading, then in the middle of a stage; what was done is not done again."""
    code = """
import os, signal, sys
from pcamlib.audit import measure, report, stages
from pcamlib.data import convert, scan
convert.BLOCK = scan._SHARD = 64
where, seen = sys.argv[2], []
right, near = measure.observe, stages.near.check
def observe(start, *rest):
    seen.append(start)
    if where == "reading" and start >= 192: os.kill(os.getpid(), signal.SIGKILL)
    return right(start, *rest)
def check(*rest, **options):
    if where == "near": os.kill(os.getpid(), signal.SIGKILL)
    return near(*rest, **options)
measure.observe, stages.near.check = observe, check
report.audit(sys.argv[1], stages.Options(labels=False), print)
print("blocks", sorted(set(seen)))
"""

    def run(where: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-c", code, copied, where], capture_output=True, text=True, env=environment
        )

    assert run("reading").returncode == -signal.SIGKILL
    assert run("near").returncode == -signal.SIGKILL
    last = run("whole")
    assert last.returncode == 0, last.stderr
    assert "blocks []" in last.stdout, "reading was finished by the second attempt"
    assert "audit: duplicates" not in last.stdout and "audit: near" in last.stdout
    whole = report.audit(copied, QUICK, silent)
    shutil.rmtree(copied / ".pcam-cache")
    assert report.audit(copied, QUICK, silent).json() == whole.json()


def test_only_valid(copied: Path) -> None:
    for part in "xy":
        split_path(copied, "train", part).unlink()
    split_path(copied, "train", "meta").unlink()
    assert set(report.audit(copied, QUICK, silent).data) == {"valid"}


def test_unlabelled_test_split(copied: Path) -> None:
    shutil.copy(split_path(copied, "valid", "x"), split_path(copied, "test", "x"))
    found = report.audit(copied, QUICK, silent)
    assert found.data["test"]["positive"] is None
    (leak,) = found["duplicates.leak"]
    assert leak.split == "valid" and len(leak.rows) == 96


@pytest.mark.parametrize("form", [{"compression": "gzip", "chunks": (16, 96, 96, 3)}, {"dtype": np.float32}])
def test_other_forms_of_the_same_patches_give_the_same_findings(
    copied: Path, clean: Path, form: dict[str, Any]
) -> None:
    rewrite(copied, "train", **form)
    found = report.audit(copied, QUICK, silent)
    assert [f.check for f in found.findings if not f.check.startswith("storage")] == []
    assert found.data["train"]["fingerprint"] == report.audit(clean, QUICK, silent).data["train"]["fingerprint"]


def test_a_compressed_course_file(course_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "course"
    shutil.copytree(course_dir, folder, ignore=shutil.ignore_patterns(".pcam-cache"))
    rewrite(folder, "train", compression="gzip", compression_opts=1, chunks=(32, 96, 96, 3))
    truth = Truth.load(folder / "truth.json").rows
    found = report.audit(folder, QUICK, silent)
    assert found["integrity.above"][0].rows.tolist() == truth["train/spike"].tolist()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("truncated", "truncated"),
        ("no y", "_train_y.h5: missing"),
        ("meta", "320"),
        ("uint16", "uint16, expected uint8 or float32"),
        ("float64", "float64, expected uint8 or float32"),
        ("empty", "camelyonpatch_level_2_split_train_x.h5: missing"),
        ("no folder", "no such folder"),
    ],
)
def test_what_cannot_be_read_is_exit_code_2_and_one_line(
    damage: str, says: str, copied: Path, pcam: Callable[..., Any]
) -> None:
    x, meta = split_path(copied, "train", "x"), split_path(copied, "train", "meta")
    if damage == "truncated":
        os.truncate(x, x.stat().st_size // 2)
    elif damage == "no y":
        split_path(copied, "train", "y").unlink()
    elif damage == "meta":
        with open(meta, newline="") as handle:
            rows = list(csv.reader(handle))
        with open(meta, "w", newline="") as handle:
            csv.writer(handle).writerows(rows[:-5])
    elif damage in ("uint16", "float64"):
        rewrite(copied, "train", dtype=damage)
    elif damage == "empty":
        shutil.rmtree(copied)
        copied.mkdir()
    else:
        copied = copied / "elsewhere"
    code, _, err = pcam("audit", copied, "--no-labels")
    assert code == 2 and err.startswith("pcam: ") and err.count("\n") == 1 and says in err, err
    assert not list(copied.glob(".pcam-cache/*.mask"))


def test_a_cache_that_cannot_be_written(
    copied: Path, pcam: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied.parent / "file").write_text("in the way")
    monkeypatch.setenv("PCAM_CACHE", str(copied.parent / "file"))
    code, _, err = pcam("audit", copied, "--no-labels")
    assert code == 2 and err.count("\n") == 1 and "PCAM_CACHE" in err, err


def test_ids(clean: Path, tmp_path: Path, pcam: Callable[..., Any]) -> None:
    ids = [row.tobytes().hex() for row in open_split(clean, "train").ids]
    (tmp_path / "ids.csv").write_text("id,label\n" + "".join(f"{name},0\n" for name in ids[:300]))
    code, out, _ = pcam("audit", clean, "--no-labels", "--ids", tmp_path / "ids.csv")
    assert code == 1 and "300 of 320" in out and "0 of 96" in out
    (tmp_path / "ids.csv").write_text("id\n" + "\n".join(ids))
    assert "320 of 320" in pcam("audit", clean, "--no-labels", "--ids", tmp_path / "ids.csv")[1], "read again"
    (tmp_path / "bad.csv").write_text("id\nnonsense\n")
    code, _, err = pcam("audit", clean, "--no-labels", "--ids", tmp_path / "bad.csv")
    assert code == 2 and "line 2" in err


def test_the_rules_are_those_that_a_configuration_takes() -> None:
    (names,) = get_args(get_args(Data.model_fields["clean"].annotation)[1])
    assert set(get_args(names)) == set(RULES) == {rule for stage in stages.STAGES for rule in stage.rules}


def test_findings_survive_json(course_dir: Path) -> None:
    for finding in report.audit(course_dir, QUICK, silent).findings:
        again = report.from_json(json.loads(json.dumps(report.to_json(finding), allow_nan=False)))
        assert report.to_json(again) == report.to_json(finding)
        assert np.isin(finding.drop, finding.rows).all() and (np.diff(finding.rows) > 0).all()
        assert finding.sure.split(":")[0] in ("certain", "likely", "possible")


def test_the_mask_of_another_form_is_not_taken(copied: Path) -> None:
    report.audit(copied, QUICK, silent)
    stored = open_split(copied, "train").stored
    assert mask_path(stored).is_file()
    assert measure.measured(copied, silent)["train"].columns["integrity.odd"].sum() == 0
