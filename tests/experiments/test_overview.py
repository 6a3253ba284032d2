"""Tables over run folders: finished, under way, unreadable; grouped over seeds; and what one folder holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from pcamlib.config import parse
from pcamlib.errors import ConfigError, PcamError
from pcamlib.experiments import overview
from pcamlib.training import loop
from pcamlib.training.runs import Run


def quiet(line: str) -> None:
    """Reports nothing."""


@pytest.fixture(scope="module")
def folder(synthetic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs a/0 and a/1 (two seeds), wide (another model), killed (after two steps of four) and broken (no YAML)."""
    where = tmp_path_factory.mktemp("runs")
    config = parse({
        "loader": {"batch_size": 32},
        "model": {"name": "mlp", "crop": 32, "hidden_units": [4]},
        "train": {"steps": 4, "threads": 1, "precision": "fp32", "device": "cpu", "evaluate_every": 2},
    })  # fmt: skip

    def stop(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    for name, items in (("a/0", []), ("a/1", ["seed=1"]), ("wide", ["model.hidden_units=[8]"])):
        loop.train(config.override(*items), synthetic_dir, where / name, report=quiet)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config.override("seed=2"), synthetic_dir, where / "killed", report=quiet, on_step=stop)
    (where / "broken").mkdir()
    (where / "broken" / "config.yaml").write_text("model: [")
    return where


def test_one_row_a_run_whatever_its_state(folder: Path) -> None:
    rows = {row["run"]: row for row in overview.table(folder).to_dict("records")}
    assert list(rows) == ["a/0", "a/1", "broken", "killed", "wide"]
    done, run = rows["a/1"], Run(folder / "a" / "1")
    report = run.predictions().report()["metrics"]
    assert (done["model"], done["seed"], done["steps"], done["state"]) == ("mlp", 1, 4, "finished")
    assert (done["auc"], done["auc low"], done["auc high"]) == (report["auc"]["value"], *report["auc"]["interval"])
    assert (done["f2"], done["accuracy"]) == (report["f2"]["value"], report["accuracy"]["value"])
    assert run.success and done["weights"] == run.success["weights"][:12] and done["seconds"] >= 0
    killed = rows["killed"]
    assert (killed["steps"], killed["state"], killed["weights"]) == (2, "unfinished", "")
    assert killed["auc"] == Run(folder / "killed").metrics()[-1]["valid_auc"] and killed["auc low"] is None
    assert rows["broken"]["state"].startswith("unreadable: ") and "not valid YAML" in rows["broken"]["state"]


def test_runs_of_one_configuration_are_one_row_over_seeds(folder: Path, tmp_path: Path) -> None:
    rows = {row["runs"]: row for row in overview.table(folder, "config").to_dict("records")}
    assert set(rows) == {"a/0, a/1", "wide", "broken"}, "what has not finished is not counted, what is damaged is told"
    assert rows["broken"]["state"].startswith("unreadable: ")
    pair, single = rows["a/0, a/1"], overview.table(folder).set_index("run")
    assert (pair["seeds"], pair["n"], pair["state"]) == ("0, 1", 2, "distinct")
    values = [single.loc[name, "auc"] for name in ("a/0", "a/1")]
    assert pair["auc"] == pytest.approx(sum(values) / 2)
    assert pair["auc sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert rows["wide"]["auc"] is None and rows["wide"]["state"] == "one seed has no sd"
    shutil.copytree(folder / "a", tmp_path / "a")
    shutil.copytree(folder / "a" / "0", tmp_path / "a" / "copy")
    (row,) = overview.table(tmp_path, "config").to_dict("records")
    assert row["auc"] is None and row["state"].startswith("0 and copy are one run, their weights are equal")


def test_the_csv_holds_the_whole_table(folder: Path, tmp_path: Path) -> None:
    rows = overview.table(folder)
    text = overview.text(rows, tmp_path / "table.csv")
    assert len(text.splitlines()) == 6 and "nan" not in text.lower()
    back = pd.read_csv(tmp_path / "table.csv")
    assert back["run"].tolist() == rows["run"].tolist() and back["auc"][0] == pytest.approx(rows["auc"][0], abs=0)


def test_what_is_no_folder_or_no_grouping_is_refused(tmp_path: Path) -> None:
    assert overview.text(overview.table(tmp_path)) == "no runs here"
    with pytest.raises(PcamError, match="no such folder; name the one that holds the runs"):
        overview.table(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="--by seed: runs are grouped by 'config' only"):
        overview.table(tmp_path, "seed")


def test_what_a_folder_holds_as_evidence(folder: Path) -> None:
    run = Run(folder / "wide")
    (run.path / "curves.png").write_bytes(b"x" * 2048)
    rows = overview.contents(run)
    (run.path / "curves.png").unlink()
    assert rows["file"].tolist() == [
        "config.yaml", "provenance.json", "metrics.jsonl", "predictions_valid.npz", "report_valid.json", "curves.png",
        "checkpoints/last.safetensors", "checkpoints/best.safetensors", "SUCCESS",
    ]  # fmt: skip
    assert rows.set_index("file").loc["curves.png", "KiB"] == 2 and rows["holds"].str.len().min() > 10
    listed = {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()}
    assert listed - set(rows["file"]) == {".lock"}, "nothing else lies there"
