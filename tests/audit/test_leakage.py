"""Leakage: shared slides, foreign statistics, odd splits, and a probe that sees a leak but nothing else."""

from __future__ import annotations

import csv
import gzip
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pcamlib.audit import leakage
from pcamlib.audit.findings import Split
from pcamlib.data import slides
from pcamlib.data.layout import split_path
from pcamlib.data.patches import channel_statistics, open_split
from pcamlib.data.plants import leak_slides
from pcamlib.data.rewrite import Plan
from pcamlib.errors import DataError, RunError
from pcamlib.files import write_json
from pcamlib.training import checkpoint
from pcamlib.training.runs import Run


def opened(folder: Path) -> dict[str, Split]:
    found = {name: open_split(folder, name) for name in ("train", "valid", "test")}
    return {name: Split(p, {}, slides.read_slides(folder, name, len(p))) for name, p in found.items()}


@pytest.fixture(scope="module")
def splits(synthetic_dir: Path) -> dict[str, Split]:
    return opened(synthetic_dir)


class Fake:
    """As much of `Patches` as the checks look at that open no pixel."""

    def __init__(self, split: str, labels: np.ndarray | None, valid: np.ndarray) -> None:
        self.split, self.labels, self.valid = split, labels, valid

    def __len__(self) -> int:
        return len(self.valid)


def bare(name: str, labels: Any, slides: list[str] | None = None, valid: bool = True) -> Split:
    count = len(labels if slides is None else slides)
    patches: Any = Fake(name, None if labels is None else np.array(labels, np.uint8), np.full(count, valid))
    return Split(patches, {}, None if slides is None else np.array(slides))


def meta(folder: Path, rows: list[list[str]], *, packed: bool = False) -> Path:
    path = split_path(folder, "train", "meta")
    text = "".join(",".join(row) + "\n" for row in rows)
    if packed:
        path = path.with_name(path.name + ".gz")
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("column", ["wsi", "Case_ID", "patient"])
def test_slides_are_read(tmp_path: Path, column: str, packed: bool) -> None:
    meta(tmp_path, [["", column, "other"], ["0", "a", "x"], ["1", " b", "x"], ["2", "", "x"]], packed=packed)
    found = slides.read_slides(tmp_path, "train", 3)
    assert found is not None and found.tolist() == ["a", "b", ""]
    assert slides.read_slides(tmp_path, "valid", 3) is None


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([["", "wsi"], ["0", "a"]], "1 rows for 2 patches"),
        ([["", "colour"], ["0", "a"], ["1", "b"]], "no column wsi or .*; found , colour"),
        ([["", "wsi"], ["0", "a"], ["1"]], "row 1 has no wsi"),
        ([], "no column"),
    ],
)
def test_a_meta_file_that_does_not_fit(tmp_path: Path, rows: list[list[str]], said: str) -> None:
    meta(tmp_path, rows)
    with pytest.raises(DataError, match=f"train_meta.csv: .*{said}|train_meta.csv: {said}"):
        slides.read_slides(tmp_path, "train", 2)


def test_a_meta_file_that_is_no_text(tmp_path: Path) -> None:
    path = meta(tmp_path, [["wsi"], ["a"]], packed=True)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="not a readable CSV"):
        slides.read_slides(tmp_path, "train", 1)
    split_path(tmp_path, "train", "meta").write_bytes(b"wsi\n\xff\xfe\xff\n")
    with pytest.raises(DataError, match="not a readable CSV"):
        slides.read_slides(tmp_path, "train", 1)


def test_clean_splits_are_clean(splits: dict[str, Split]) -> None:
    assert leakage.check(splits) == []
    assert [row["slides"] for row in leakage.assignment(splits)] == [48, 16, 16]


@pytest.mark.parametrize("rows", [3, 40])
def test_exchanged_rows_are_the_strays(synthetic_dir: Path, tmp_path: Path, rows: int) -> None:
    plan = Plan(synthetic_dir, seed=rows)
    leak_slides(plan, rows)
    truth = plan.write(tmp_path / "leaked")
    finding, other = [f for f in leakage.check(opened(tmp_path / "leaked")) if f.check == "leakage.slides"]
    assert (finding.split, other.split) == ("train", "valid") and finding.rule == other.rule == "leak"
    for name in ("train", "valid"):
        assert finding.details["strays"][name] == truth.rows[f"{name}/leaked"].tolist()
    assert set(truth.rows["train/leaked"]) <= set(finding.rows)
    kept = truth.rows["train/leaked"] if len(finding.rows) > 256 else finding.rows
    assert np.array_equal(finding.drop, kept), "never most of train"
    assert np.array_equal(other.drop, truth.rows["valid/leaked"] if len(finding.rows) > 256 else [])


def test_each_pair_of_splits_is_compared() -> None:
    names = {"train": ["a", "b", "b", "", "c"], "valid": ["a", "d", ""], "test": ["d", "e", ""]}
    found = leakage.check({name: bare(name, None, slides) for name, slides in names.items()})
    assert [(f.split, f.rows.tolist(), f.drop.tolist()) for f in found] == [
        ("train", [0], [0]), ("valid", [0], []), ("valid", [1], []), ("test", [0], [0])]  # fmt: skip


def test_a_slide_may_be_named_by_its_file(tmp_path: Path) -> None:
    split_path(tmp_path, "train", "meta").write_text("wsi\ns003.tif\ns004\n")
    assert slides.read_slides(tmp_path, "train", 2).tolist() == ["s003", "s004"]


def test_a_class_mix_that_differs() -> None:
    rng = np.random.default_rng(0)
    few, half = (rng.random(2000) < share for share in (0.17, 0.5))
    (finding,) = leakage.check({"train": bare("train", few), "valid": bare("valid", half)})
    assert finding.check == "leakage.mix" and "of train" in finding.what and len(finding.rows) == 0
    assert leakage.check({"train": bare("train", half), "valid": bare("valid", rng.random(100) < 0.4)}) == []


def test_slides_widen_the_interval_of_the_mix() -> None:
    slides = [str(i // 100) for i in range(2000)]
    labels = np.array([int(slide) % 2 for slide in slides])
    labels[:] = np.random.default_rng(0).permutation(labels.reshape(20, 100)).ravel()
    plain, grouped = (leakage.assignment({"train": bare("train", labels, s)})[0] for s in (None, slides))
    assert np.diff(grouped["interval"]) > 8 * np.diff(plain["interval"])


def test_sorted_labels() -> None:
    labels = np.repeat([0, 1], 500)
    (finding,) = leakage.check({"train": bare("train", labels)})
    assert finding.check == "leakage.order" and finding.details["lag"] > 0.99
    assert leakage.check({"train": bare("train", np.random.default_rng(0).permutation(labels))}) == []


@pytest.mark.parametrize("labels", [None, [1], [0, 1], [1] * 50])
@pytest.mark.parametrize("valid", [True, False])
def test_tiny_or_flagged_splits(labels: list[int] | None, valid: bool) -> None:
    slides = ["s"] * len(labels or [0])
    splits = {name: bare(name, labels, [name + s for s in slides], valid) for name in ("train", "valid", "test")}
    assert leakage.check(splits) == []
    assert [row["patches"] for row in leakage.assignment(splits)] == [len(slides)] * 3


def trained(folder: Path, splits: dict[str, Split], record: dict[str, Any] | None, *, weights: Any = None) -> Run:
    """As much of a run folder as the check reads."""
    write_json(folder / "provenance.json", {
        "data": {"train": splits["train"].patches.fingerprint}, **({"normalisation": record} if record else {}),
    })  # fmt: skip
    if weights:
        (folder / "checkpoints").mkdir()
        checkpoint.save(Run(folder).best, {"model.w": torch.zeros(1)}, {"normalisation": weights})
    return Run(folder)


def test_statistics_of_train_are_fine(tmp_path: Path, splits: dict[str, Split]) -> None:
    record = channel_statistics(splits["train"].patches)
    assert leakage.normalisation(trained(tmp_path, splits, record, weights=record), splits) == []


@pytest.mark.parametrize("whose", ["valid", "test"])
def test_statistics_of_another_split(tmp_path: Path, splits: dict[str, Split], whose: str) -> None:
    record = channel_statistics(splits[whose].patches)
    (finding,) = leakage.normalisation(trained(tmp_path, splits, record), splits)
    assert f"those of {whose}" in finding.what and finding.sure == "certain: the record says so"
    lying = {**record, "split": "train"}
    (finding,) = leakage.normalisation(trained(tmp_path, splits, None, weights=lying), splits)
    assert f"those of {whose}" in finding.what and finding.sure == "certain: equal to the last digit"
    assert "best.safetensors" in finding.what


def test_statistics_of_nothing_here(tmp_path: Path, splits: dict[str, Split]) -> None:
    record = {"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4], "n": 8192, "split": "train"}  # ImageNet
    (finding,) = leakage.normalisation(trained(tmp_path, splits, record), splits)
    assert "none of the splits here" in finding.what


def test_statistics_said_to_be_pooled(tmp_path: Path, splits: dict[str, Split]) -> None:
    record = {**channel_statistics(splits["train"].patches), "split": "train and valid"}
    (finding,) = leakage.normalisation(trained(tmp_path, splits, record), splits)
    assert "'train and valid'" in finding.what, "a finding though the numbers look alike"


def test_runs_that_cannot_be_judged(tmp_path: Path, splits: dict[str, Split]) -> None:
    with pytest.raises(RunError, match="records no normalisation"):
        leakage.normalisation(trained(tmp_path, splits, None), splits)
    write_json(tmp_path / "provenance.json", {"data": {"train": "other"}})
    with pytest.raises(RunError, match="another train split"):
        leakage.normalisation(Run(tmp_path), splits)
    with pytest.raises(DataError, match="the train split, which is not here"):
        leakage.normalisation(Run(tmp_path), {"valid": splits["valid"]})


def own(splits: dict[str, Split]) -> dict[str, np.ndarray]:
    """Every row its own group."""
    begin = itertools.accumulate(map(len, splits.values()), initial=0)
    return {name: first + np.arange(len(split)) for first, (name, split) in zip(begin, splits.items(), strict=False)}


def test_without_a_leak_nothing_is_learned(splits: dict[str, Split]) -> None:
    slides = {name: split.slides for name, split in splits.items() if split.slides is not None}
    for groups in (own(splits), slides):
        found = leakage.permutation_probe(splits, groups)
        assert not found["leak"] and abs(found["value"] - 0.5) < 0.02 and found["shared"] == 0
        assert np.mean(found["null"]) == pytest.approx(0.5, abs=0.03) and found["score_without"] is None
        assert found["score"] > 0.7 and found["n"] == 256 and found["fitted"] == 512


def test_copies_raise_the_score(splits: dict[str, Split]) -> None:
    values = []
    for planted in (0.02, 0.1, 0.3):
        found = leakage.permutation_probe(splits, own(splits), planted=planted)
        assert found["leak"] and found["shared"] == pytest.approx(planted, abs=0.01)
        values.append(found["value"])
    assert values == sorted(values) and found["score"] > found["score_without"] + 0.02
    assert found == leakage.permutation_probe(splits, own(splits), planted=0.3)


def test_a_leaked_slide_raises_the_score(synthetic_dir: Path, tmp_path: Path) -> None:
    plan = Plan(synthetic_dir, seed=1)
    leak_slides(plan, 100)
    plan.write(tmp_path / "leaked")
    leaked = opened(tmp_path / "leaked")
    slides = {name: split.slides for name, split in leaked.items() if split.slides is not None}
    assert leakage.permutation_probe(leaked, slides)["leak"]


def test_a_probe_without_data(splits: dict[str, Split]) -> None:
    with pytest.raises(DataError, match="valid is not here"):
        leakage.permutation_probe({"train": splits["train"]}, own(splits))
    with pytest.raises(DataError, match="needs 20 of each"):
        leakage.permutation_probe(splits, own(splits), most=40)


def test_the_meta_file_of_the_generator(synthetic_dir: Path, splits: dict[str, Split]) -> None:
    with open(split_path(synthetic_dir, "train", "meta"), newline="") as handle:
        expected = [row["wsi"] for row in csv.DictReader(handle)]
    assert splits["train"].slides is not None and splits["train"].slides.tolist() == expected
