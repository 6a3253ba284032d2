"""What the notebook tells: the truth is marked right, pictures show the rows they name, effects are paired."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt

from pcamlib.audit import effect, figures, report, story, truth
from pcamlib.audit.findings import Finding, Split
from pcamlib.audit.report import Report
from pcamlib.audit.stages import Options
from pcamlib.data.flaws import hidden_flaws
from pcamlib.data.patches import open_split
from pcamlib.data.rewrite import Truth
from pcamlib.errors import DataError

matplotlib.use("agg")


@pytest.fixture(scope="module")
def reports(synthetic_dir: Path, course_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """Audits of clean, course-like and flawed files, without labels."""
    flawed = tmp_path_factory.mktemp("story") / "flawed"
    hidden_flaws(synthetic_dir, flawed, seed=1)
    folders = {"data": synthetic_dir, "course": course_dir, "flawed": flawed}
    return {name: report.audit(path, Options(labels=False), lambda line: None) for name, path in folders.items()}


@pytest.fixture(autouse=True)
def _closed() -> object:
    yield
    plt.close("all")


def test_every_stage_of_every_set_has_a_row(reports: dict[str, Report]) -> None:
    table = story.stages(reports)
    assert len(table) == sum(len(each.looked) for each in reports.values())
    found = {(row["set"], row["stage"]): row for row in table}
    assert found["data", "integrity"]["findings"] == 0 and found["course", "integrity"]["findings"] == 4
    assert found["course", "integrity"]["patches"] == sum(len(f.rows) for f in reports["course"]["integrity"])
    assert found["data", "near"]["first"] == "nothing found"


def test_odd_values_and_their_patches(reports: dict[str, Report]) -> None:
    rows = {row["kind"]: row for row in story.odd_values(reports)}
    assert rows["above"]["block"] == "5x5" and rows["nan"]["block"] is None
    assert rows["above"]["value"] == 1e5 and "placed" not in rows["nan"]["verdict"]
    assert story.odd_values({"data": reports["data"]})[0]["patches"] == 0
    lines = story.odd_patches(reports["course"])
    assert [shown.row for shown in lines["integrity.above"]] == reports["course"]["integrity.above"][0].rows[
        :10
    ].tolist()


def test_copies_stand_beside_each_other(reports: dict[str, Report]) -> None:
    line = story.copies(reports["flawed"])["duplicates.exact\ntrain"]
    for first, second in zip(line[::2], line[1::2], strict=True):
        pixels = [np.sort(shown.split.patches.images[shown.row].ravel()) for shown in (first, second)]
        np.testing.assert_array_equal(*pixels)
    figure, shown = figures.gallery(story.copies(reports["flawed"]))
    assert len(figure.axes) >= len(line) and all(
        text.startswith("train") for text in shown["duplicates.exact\ntrain"][:1]
    )


def test_leaked_rows_are_those_with_a_copy_elsewhere(reports: dict[str, Report]) -> None:
    planted = Truth.load(Path(reports["flawed"].folder) / "truth.json").rows
    pairs = np.concatenate([planted["train>valid/exact"], planted["train>valid/d4"]])
    assert set(story.leaked(reports["flawed"], "valid")) >= set(pairs[:, 1])
    assert len(story.leaked(reports["data"], "valid")) == 0


def test_probes_see_the_planted_leak(reports: dict[str, Report]) -> None:
    rows = {row["probe"]: row for row in story.probes({"data": reports["data"]})}
    assert rows["data: copies of 10 % of valid added"]["leak"] and not rows["data: copies"]["leak"]
    low, high = rows["data: copies"]["interval"]
    assert low < 0.5 < high + 0.02


def test_saving_is_told_only_where_there_is_one(reports: dict[str, Report]) -> None:
    accounts = {name: each.facts["storage"]["accounts"]["train"] for name, each in reports.items()}
    assert "75%" in story.saving(accounts["course"])
    assert "Nothing is to be saved" in story.saving(accounts["data"])


def test_rounding_leaves_out_series() -> None:
    table = [{"a": 0.123456, "b": [0.123456, None], "values": [1, 2], "c": "x"}]
    assert story.rounded(table) == [{"a": 0.1235, "b": [0.1235, None], "c": "x"}]


def test_marks_count_hits_misses_and_extras(reports: dict[str, Report]) -> None:
    planted = Truth({"train/exact": np.array([[1, 2], [3, 4]]), "train/flip": np.array([7])})
    found = [Finding("duplicates.exact", "train", "", np.array([1, 2, 9]), "", "")]
    each = reports["data"]
    marked = truth.marked(Report(each.folder, each.data, found, {}, [], {}, each.subject), planted)
    rows = {row["check"]: row for row in marked}
    assert rows["duplicates.exact"] == {
        "check": "duplicates.exact", "split": "train", "planted": 4, "found": 2, "missed": 2, "extra": 1,
        "recall": 0.5, "precision": 0.667,
    }  # fmt: skip
    assert rows["labels.suspect"]["recall"] == 0 and rows["labels.suspect"]["precision"] is None
    assert truth.planted(each.folder) is None


def test_verdict_names_each_set(reports: dict[str, Report]) -> None:
    text = story.verdict(reports)
    assert "'data': No sign of poisoning" in text and "'course': Most likely planted, but no backdoor" in text
    assert story.backdoors(reports["data"]) == [{"pattern": "none suspected"}]


def test_leaving_out_nothing_has_no_effect(synthetic_dir: Path) -> None:
    train, valid = (Split(open_split(synthetic_dir, name), {}) for name in ("train", "valid"))
    judges = {"valid": (valid, np.arange(64))}
    (row,) = effect.with_and_without(train, judges, np.empty(0, np.int64), steps=3, seeds=(0, 1))
    assert row["difference"] == 0 and row["95 % of difference"] == [0, 0] and row["left out"] == 0
    assert row["patches"] == 64 and row["seeds"] == 2


def test_labels_turned_round_are_seen_in_the_effect(synthetic_dir: Path) -> None:
    patches = open_split(synthetic_dir, "train")
    wrong = np.arange(0, 512, 2)
    patches.labels = patches.labels.copy()
    patches.labels[wrong] ^= 1
    train, valid = Split(patches, {}), Split(open_split(synthetic_dir, "valid"), {})
    judges = {"valid": (valid, np.arange(256))}
    (row,) = effect.with_and_without(train, judges, wrong, steps=40, seeds=(0, 1))
    assert row["AUC without"] > row["AUC with"] + 0.05 and row["left out"] == 256


def test_an_effect_needs_labels(synthetic_dir: Path) -> None:
    patches = open_split(synthetic_dir, "train")
    patches.labels = None
    with pytest.raises(DataError, match="without labels"):
        effect.with_and_without(Split(patches, {}), {}, np.empty(0, np.int64), steps=1)


def test_figures_draw_what_they_are_given() -> None:
    bars = figures.bars({"a": 1.0, "b": 2.0}, "MB", ("file", 2.0))
    assert [patch.get_width() for patch in bars.axes[0].patches] == [1.0, 2.0]
    rows = [{"x": "a", "v": 0.1, "i": [0, 0.2]}, {"x": "b", "v": None, "i": None}]
    assert [text.get_text() for text in figures.forest(rows, "x", "v", "i", "AUC", 0).axes[0].get_yticklabels()] == [
        "a"
    ]
    figure, shown = figures.gallery({})
    assert shown == {"nothing found": []} and figure.axes[0].texts[0].get_text() == "nothing found"
