"""What notebook 00 shows, against counts by hand and against what was planted."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from matplotlib.colors import to_hex

from pcamlib.data.layout import split_path
from pcamlib.data.patches import Patches
from pcamlib.data.rewrite import Truth
from pcamlib.errors import DataError
from pcamlib.experiments import explore
from pcamlib.training.runs import Run

PLANTED = {"nan": "train/nan", "range": "train/spike", "black": "train/black", "white": "train/white"}


@pytest.fixture(scope="module")
def clean(synthetic_dir: Path) -> dict[str, Patches]:
    return explore.opened(synthetic_dir)


@pytest.fixture(scope="module")
def course(course_dir: Path) -> dict[str, Patches]:
    return explore.opened(course_dir)


@pytest.fixture(scope="module")
def truth(course_dir: Path) -> dict[str, np.ndarray]:
    return Truth.load(course_dir / "truth.json").rows


def labels_in(folder: Path, split: str) -> np.ndarray:
    with h5py.File(split_path(folder, split, "y")) as file:
        return file["y"][:].reshape(-1)


def test_a_folder_may_lack_splits_but_not_all_of_them(synthetic_dir: Path, tmp_path: Path) -> None:
    for part in "xy":
        path = split_path(synthetic_dir, "valid", part)
        (tmp_path / path.name).symlink_to(path)
    assert list(explore.opened(tmp_path)) == ["valid"]
    with pytest.raises(DataError, match=r"split_train_x.h5: missing; `pcam data fetch"):
        explore.opened(tmp_path.parent)


def test_split_table_counts_the_files(
    clean: dict[str, Patches], course: dict[str, Patches], synthetic_dir: Path, course_dir: Path,
    truth: dict[str, np.ndarray],
) -> None:  # fmt: skip
    table = explore.split_table({**clean, **{f"course {split}": patches for split, patches in course.items()}})
    rows = {row["split"]: row for row in table.to_dict("records")}
    for split, count in (("train", 512), ("valid", 256), ("test", 256)):
        row, positive = rows[split], int(labels_in(synthetic_dir, split).sum())
        assert (row["patches"], row["positive"], row["negative"]) == (count, positive, count - positive)
        assert (row["dtype"], row["storage"], row["flagged"]) == ("uint8", "contiguous", 0)
        assert row["MiB"] == pytest.approx(count * 27648 / 2**20, abs=0.1)
    labels = labels_in(course_dir, "train")
    spoiled = rows["course train"]
    assert (spoiled["patches"], spoiled["positive"], spoiled["dtype"]) == (len(labels), labels.sum(), "float32")
    assert spoiled["negative"] == (labels_in(synthetic_dir, "train") == 0).sum()
    assert spoiled["flagged"] == sum(len(truth[key]) for key in PLANTED.values())
    assert (rows["course test"]["positive"], rows["course test"]["negative"]) == (None, None)
    assert rows["course valid"]["fingerprint"] == rows["valid"]["fingerprint"] != rows["train"]["fingerprint"]


def test_flags_are_what_was_planted(course: dict[str, Patches], course_dir: Path, truth: dict[str, np.ndarray]) -> None:
    table = explore.outlier_table(course)
    labels = labels_in(course_dir, "train")
    assert table["class"].tolist() == ["normal", "tumour", "normal", "tumour", "unlabelled"]
    for kind, key in PLANTED.items():
        expected = [int((labels[truth[key]] == label).sum()) for label in (0, 1)]
        assert table[kind].tolist() == [*expected, 0, 0, 0]
    assert table["patches"].tolist()[:2] == [(labels == 0).sum(), (labels == 1).sum()]


def test_sampler_table_expects_32_times_the_share_and_counts_it(clean: dict[str, Patches], course_dir: Path) -> None:
    labels = labels_in(course_dir, "train")
    table, counts = explore.sampler_table(labels)
    assert table["sampler"].tolist() == ["shuffle", "balanced"]
    assert table["expected"].tolist() == [round(32 * labels.mean(), 2), 16.0]
    for row in table.to_dict("records"):
        found = np.array(counts[row["sampler"]])
        assert row["batches"] == len(found) == len(labels) // 32
        assert row["counted"] == round(found.mean(), 2)
        assert row["95 % of batches"] == np.percentile(found, [2.5, 97.5]).tolist()
        spread = 4 * (32 / 4 / len(found)) ** 0.5  # four standard errors of a fair coin, more than of an unfair one
        assert abs(row["counted"] - row["expected"]) < spread
    own = labels_in(clean["train"].stored.path.parent, "train")
    assert sum(explore.sampler_table(own)[1]["shuffle"]) == own.sum(), "an epoch of 16 whole batches is the whole split"
    assert explore.sampler_table(own, seed=1)[1] != explore.sampler_table(own)[1] == explore.sampler_table(own)[1]


def test_intensity_histograms_are_shares_of_the_pixels(clean: dict[str, Patches]) -> None:
    series = explore.intensity_histogram(clean["valid"])
    assert len(series) == 6 and all(len(values) == 64 for values in series.values())
    assert [sum(values) for values in series.values()] == pytest.approx([1.0] * 6)
    tumour = clean["valid"].images[clean["valid"].labels == 1][..., 1]
    by_hand = np.histogram(tumour, bins=64, range=(0, 256))[0] / tumour.size
    assert series["tumour green"] == pytest.approx(by_hand.tolist())
    some = explore.intensity_histogram(clean["valid"], most=10, bins=4)
    assert [sum(values) for values in some.values()] == pytest.approx([1.0] * 6) and len(some["normal red"]) == 4


def test_patch_means_are_of_the_stored_values(
    clean: dict[str, Patches], course: dict[str, Patches], truth: dict[str, np.ndarray]
) -> None:
    assert np.allclose(explore.patch_means(clean["valid"]), clean["valid"].images.mean((1, 2, 3)), rtol=1e-12)
    means = explore.patch_means(course["train"])
    assert np.flatnonzero(np.isnan(means)).tolist() == truth["train/nan"].tolist()
    assert (means[truth["train/black"]] == 0).all() and (means[truth["train/white"]] == 255).all()
    assert (means[truth["train/spike"]] > 255).all()
    untouched = np.setdiff1d(np.arange(len(means)), np.concatenate([truth[key] for key in PLANTED.values()]))
    source = clean["train"].images[truth["train/kept"][untouched]]
    assert np.allclose(means[untouched], source.mean((1, 2, 3)), rtol=1e-12)


def test_loss_curves_average_each_epoch(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": loss} for step, loss in enumerate((4.0, 2.0, 1.0, 1.0, 4.0, 7.0), start=1)]
    for step, nll in ((2, 0.7), (5, 0.5)):
        rows[step - 1]["valid_nll"] = nll
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    series = explore.loss_curves(Run(tmp_path))
    assert series == {
        "step": [1, 2, 3, 4, 5, 6],
        "loss": [4.0, 2.0, 1.0, 1.0, 4.0, 7.0],
        "epoch end": [2, 5],
        "train": [3.0, 2.0],
        "valid": [0.7, 0.5],
    }
    axes = explore.plot_loss(series).axes[0]
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert drawn["train, each step"] == (series["step"], series["loss"])
    assert drawn["train, epoch mean"] == (series["epoch end"], series["train"])
    assert drawn["validation"] == (series["epoch end"], series["valid"])
    assert axes.get_ylim() == (0, 2.0)


# Figures: what is drawn is what is returned


def test_bars_have_the_height_of_the_counts() -> None:
    axes = explore.plot_balance({"train": [10, 3], "course train": [7, 0]}).axes[0]
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights == [[10, 7], [3, 0]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["train", "course\ntrain"]


def test_examples_are_valid_patches_of_the_class_they_stand_under(
    clean: dict[str, Patches], course: dict[str, Patches]
) -> None:
    figure, shown = explore.plot_examples(course["train"], each=4)
    patches = course["train"]
    assert patches.labels is not None
    for label, (name, line) in enumerate(zip(("normal", "tumour"), (figure.axes[:4], figure.axes[4:]), strict=True)):
        assert patches.valid[shown[name]].all() and (patches.labels[shown[name]] == label).all()
        for axis, row in zip(line, shown[name], strict=True):
            assert np.array_equal(axis.images[0].get_array(), patches.images[row])
            assert axis.get_title() == f"{name} {row}"
            assert axis.patches[0].get_bbox().bounds == (31.5, 31.5, 32, 32)
    few = Patches("train", clean["train"].images[:3], np.array([1, 1, 1], np.uint8), clean["train"].stored)
    few.__dict__["_scan"] = type("Scan", (), {"flags": np.zeros(3, np.uint8)})
    figure, shown = explore.plot_examples(few, each=4)
    assert shown == {"normal": [], "tumour": [0, 1, 2]} and len(figure.axes[3].images) == 0


def test_intensity_lines_are_the_series(clean: dict[str, Patches]) -> None:
    series = explore.intensity_histogram(clean["valid"], most=20, bins=8)
    figure = explore.plot_intensity(series)
    for axis, colour, hue in zip(figure.axes, explore.CHANNELS, ("#d62728", "#2ca02c", "#1f77b4"), strict=True):
        for line in axis.lines:
            assert list(line.get_ydata()) == series[f"{line.get_label()} {colour}"]
            assert to_hex(line.get_color()) == hue


def test_outlier_steps_are_the_counts(course: dict[str, Patches]) -> None:
    means = {"course train": explore.patch_means(course["train"]), "course valid": explore.patch_means(course["valid"])}
    figure, series = explore.plot_outliers(means, bins=30)
    steps = figure.axes[0].patches[:2]
    for name, step in zip(means, steps, strict=True):
        finite = means[name][np.isfinite(means[name])]
        assert step.get_data().values.tolist() == series[name]
        assert step.get_data().edges.tolist() == series["edge"] and len(series["edge"]) == 31
        assert sum(series[name]) == len(finite), "nothing lies outside the axis"
    missing = int(np.isnan(means["course train"]).sum())
    assert f"{missing} more hold NaN" in steps[0].get_label() and "NaN" not in steps[1].get_label()


def test_sampler_bars_are_the_counts() -> None:
    counts = {"shuffle": [0, 8, 8, 9], "balanced": [16, 15, 32, 16]}
    axes = explore.plot_sampler(counts).axes[0]
    for bars, values in zip(axes.containers, counts.values(), strict=True):
        assert [bar.get_height() for bar in bars] == np.bincount(values, minlength=33).tolist()
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["shuffle: mean 6.2", "balanced: mean 19.8"]
