"""A window of the reference's own kind passes, one that differs does not, and what cannot be compared is said."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy import stats

from pcamlib.data.layout import split_path
from pcamlib.data.patches import open_split
from pcamlib.files import sha256_file
from pcamlib.serving import drift
from pcamlib.serving.drift import NAMES, PIXELS, DriftError, Reference, Report, joined, measure
from pcamlib.serving.predict import Predictor
from pcamlib.serving.shifts import SHIFTS
from pcamlib.training import checkpoint as checkpoints


def drawn(n: int, seed: int, columns: int = 19) -> np.ndarray:
    """Made-up values: normal, one of them mostly zero, as shares are, one constant, two tied together."""
    values = np.random.default_rng(seed).normal(size=(n, columns)).astype(np.float32)
    values[:, 6] = np.maximum(values[:, 6] - 1, 0)
    values[:, 7] = 0
    values[:, 9] = 0.8 * values[:, 8] + 0.6 * values[:, 9]
    return values


def made(values: np.ndarray) -> Reference:
    return Reference(values, "0" * 64, "valid", "1" * 64, False)


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor(checkpoint)


@pytest.fixture(scope="module")
def reference(predictor, synthetic_dir):
    return Reference.build(predictor, open_split(synthetic_dir, "valid"))


# Measuring


def test_a_patch_is_eighteen_numbers_and_a_logit(predictor, synthetic_dir):
    images = np.array(open_split(synthetic_dir, "valid").images[:70])
    values, probability = measure(images), predictor.probability(images)
    assert values.shape == (70, 18) and values.dtype == np.float32 and len(set(PIXELS)) == 18
    assert np.allclose(values[:, PIXELS.index("white_share")], (images.min(3) >= 220).mean((1, 2)))
    whole = joined(values, probability)
    assert whole.shape == (70, len(NAMES)) and NAMES[-1] == "logit"
    assert np.allclose(whole[:, -1], np.log(probability / (1 - probability)), atol=1e-4)
    assert np.isfinite(joined(values[:2], np.array([0.0, 1.0]))).all()


@pytest.mark.parametrize(
    "images", [np.zeros((0, 96, 96, 3), np.uint8), np.zeros((2, 96, 96, 3)), np.zeros((2, 64, 64, 3), np.uint8)]
)
def test_only_patches_are_measured(images):
    with pytest.raises(DriftError, match=r"measured on \(N, 96, 96, 3\) uint8 patches, not \("):
        measure(images)


# The tests


def test_windows_of_one_kind_are_seldom_flagged():
    known = made(drawn(300, 0))
    reports = [known.compare(drawn(60, seed)) for seed in range(1, 61)]
    assert sum(report.drifted for report in reports) <= 3  # expected: at most 1.2
    for name in ("ks", "mmd", "classifier"):
        p = np.array([report.tests[name] for report in reports])
        assert (p <= 0.2).mean() < 0.35 and p.min() > 0, name
    p = np.array([report.tests["classifier"] for report in reports])
    assert 0.35 < p.mean() < 0.65 and (p <= 0.5).mean() > 0.3  # uniform, not merely large


def moved(values: np.ndarray) -> np.ndarray:
    values[:, 3] += 0.7
    return values


def spread(values: np.ndarray) -> np.ndarray:
    values[:, 10:15] *= 1.35
    return values


def tied(values: np.ndarray) -> np.ndarray:
    values[:, 11:18] = 0.97 * values[:, 10:11] + 0.243 * values[:, 11:18]
    return values


@pytest.mark.parametrize(("change", "test"), [(moved, "ks"), (spread, "classifier"), (tied, "mmd")])
def test_each_test_finds_what_it_is_there_for(change, test):
    report = made(drawn(600, 0)).compare(change(drawn(300, 1)))
    assert report.drifted and report.p <= 3 * report.tests[test] and report.tests[test] < 0.007
    assert min(report.tests["mmd"], report.tests["classifier"]) >= 1 / 300 - 1e-12  # it is one of 300 itself
    if change is moved:
        first, about = next(iter(report.features.items()))
        assert first == NAMES[3] and about["effect"] == pytest.approx(0.7, abs=0.15)
        assert report.auc > report.chance[1] and "hue" in report.text() and report.text().startswith("DRIFT: 300 ")
    if change is tied:  # no feature alone shows it
        assert report.tests["ks"] > 0.05


def test_corrected_chances_are_those_of_holm():
    features = list(made(drawn(600, 0)).compare(moved(drawn(60, 1))).features.values())
    p = [one["p"] for one in features]
    assert p == sorted(p)
    worst = 0.0
    for rank, one in enumerate(features):
        worst = max(worst, min(1.0, one["p"] * (19 - rank)))
        assert one["corrected"] == pytest.approx(worst)


def test_the_discrepancy_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(30, 4)).astype(np.float32)
    first = np.zeros((30, 2), np.float32)
    first[:12, 0] = 1
    first[rng.permutation(30)[:12], 1] = 1
    square = ((values[:, None] - values) ** 2).sum(-1)
    kernel = np.exp(-square / np.median(square[np.triu_indices(30, 1)]))
    for column, found in enumerate(drift._mmd(values, first)):
        one = first[:, column] == 1
        x, y, both = kernel[np.ix_(one, one)], kernel[np.ix_(~one, ~one)], kernel[np.ix_(one, ~one)]
        expected = (x.sum() - 12) / (12 * 11) + (y.sum() - 18) / (18 * 17) - 2 * both.mean()
        assert found == pytest.approx(expected, abs=1e-5)


def test_the_classifier_is_judged_on_rows_it_did_not_see():
    values, first = np.random.default_rng(0).normal(size=(120, 19)), np.zeros((120, 1), np.float32)
    first[:40] = 1  # 39 inputs fit 120 rows of noise well: in sample the AUC would be near .9
    assert drift._auc(values, first, np.random.default_rng(1))[0] == pytest.approx(0.5, abs=0.12)
    values[:40, 2] += 4
    assert drift._auc(values, first, np.random.default_rng(1))[0] > 0.97


def test_the_chances_of_small_windows_are_exact():
    own, window = made(drawn(100, 0)), drawn(20, 1)
    exact = stats.ks_2samp(own.values[:, 0], window[:, 0], method="exact").pvalue
    assert own.compare(window).features[NAMES[0]]["p"] == exact


def test_a_fold_without_a_patch_of_the_window_takes_nothing_away():
    values = np.concatenate([drawn(5, 1) + 30, drawn(100, 0)])
    first = np.zeros((105, 1), np.float32)
    first[:5] = 1
    assert [drift._auc(values, first, np.random.default_rng(seed))[0] for seed in range(20)] == [1] * 20


def test_a_window_has_one_answer():
    known, window = made(drawn(300, 0)), drawn(80, 1)
    report = known.compare(window)
    assert known.compare(window.copy()) == report
    assert json.loads(json.dumps(report.json(), allow_nan=False))["features"].keys() == set(NAMES)
    assert isinstance(report, Report) and report.n == 80 and report.reference == 300 and not report.synthetic


def test_without_probabilities_the_logit_is_left_out():
    known, window = made(drawn(300, 0)), drawn(80, 1)
    assert set(known.compare(window[:, :18]).features) == set(PIXELS)
    probability = 1 / (1 + np.exp(-window[:, 18].astype(np.float64)))
    statistics = {name: one["statistic"] for name, one in known.compare(window).features.items()}
    again = {name: one["statistic"] for name, one in known.compare(window[:, :18], probability).features.items()}
    assert again == pytest.approx(statistics)


def test_what_cannot_be_compared_is_said():
    known = made(drawn(300, 0))
    with pytest.raises(DriftError, match=r"the window has 19 patches; give 20 or more, better 500"):
        known.compare(drawn(19, 1))
    with pytest.raises(DriftError, match=r"the window has values of \(30, 7\), not \(n, 18\)"):
        known.compare(drawn(30, 1)[:, :7])
    spoiled = drawn(30, 1)
    spoiled[4, 3] = np.nan
    with pytest.raises(DriftError, match=r"the window has no finite 'hue' in row 4; leave the row out"):
        known.compare(spoiled)
    with pytest.raises(DriftError, match="the reference has 99 patches; give 100 or more"):
        made(drawn(99, 0))


def test_constant_features_are_compared_too():
    known, window = made(drawn(300, 0)), drawn(80, 1)
    same = known.compare(window).features[NAMES[7]]
    assert same["statistic"] == 0 and same["p"] == 1 and same["effect"] == 0
    window[:, 7] = 0.2
    assert known.compare(window).drifted
    assert known.compare(np.repeat(drawn(1, 3), 50, 0)).drifted  # one patch over and over


# Patches of another kind


def test_odd_patches_are_flagged_at_the_stated_rate():
    known = made(drawn(150, 0))  # few: judged by themselves they would seem nearer, and 2.5 % be flagged
    rates = [made(drawn(150, seed)).outlying(drawn(2000, 100 + seed)).mean() for seed in range(20)]
    assert 0.006 < np.mean(rates) < 0.018
    window = drawn(40, 1)
    window[3, 10], window[4, 7], window[5, 11] = 9, 1, np.nan
    assert known.outlying(window)[[3, 4, 5]].all()
    assert (known.outlying(window) == known.outlying(window[:, :18])).all()


def test_what_is_no_tissue_is_flagged(reference, synthetic_dir):
    rng = np.random.default_rng(0)
    odd = np.stack([np.zeros((96, 96, 3), np.uint8), rng.integers(0, 256, (96, 96, 3)).astype(np.uint8)])
    assert reference.outlying(measure(odd)).all()
    patches = np.array(open_split(synthetic_dir, "valid").images)
    assert reference.outlying(measure(patches)).mean() < 0.02


# The file


def test_a_reference_comes_back_as_it_was(reference, predictor, tmp_path):
    path = tmp_path / "reference.npz"
    reference.save(path)
    again = Reference.load(path, predictor.model)
    assert (again.values == reference.values).all() and again.values.shape == (256, 19)
    assert again.fingerprint == reference.fingerprint and again.split == "valid" and again.synthetic
    assert again.weights == checkpoints.weights_digest(predictor.model)
    assert again.compare(reference.values[:50]) == reference.compare(reference.values[:50])
    assert [file.name for file in tmp_path.iterdir()] == ["reference.npz"]
    with zipfile.ZipFile(path) as packed:
        assert sorted(packed.namelist()) == ["about.npy", "values.npy"]


def test_a_reference_that_does_not_fit_is_refused(reference, predictor, tmp_path, monkeypatch):
    path = tmp_path / "reference.npz"
    with pytest.raises(DriftError, match=r"no such reference; `pcam drift reference` makes one"):
        Reference.load(path)
    reference.save(path)
    whole = path.read_bytes()
    for spoiled in (b"", whole[: len(whole) // 2], b"\x80\x04]" + whole, whole[:900] + b"?" + whole[901:]):
        path.write_bytes(spoiled)
        with pytest.raises(DriftError, match=r"reference.npz: no whole reference \(.*\); make it again") as told:
            Reference.load(path)
        assert "\n" not in str(told.value)
    np.savez(path, values=np.array([{}]), about="{}")
    with pytest.raises(DriftError, match=r"no whole reference.*Object arrays"):  # they are pickles
        Reference.load(path)

    Reference(reference.values, reference.fingerprint, "valid", "2" * 64, True).save(path)
    assert Reference.load(path).weights == "2" * 64
    with pytest.raises(DriftError, match=r"made with another checkpoint; make it again: `pcam drift reference`"):
        Reference.load(path, predictor.model)
    reference.save(path)
    monkeypatch.setattr(drift, "_code", lambda: "other")
    with pytest.raises(DriftError, match="measured by another version of pcamlib"):
        Reference.load(path, predictor.model)


# The command


def test_the_command_makes_a_reference_and_holds_patches_against_it(pcam, checkpoint, synthetic_dir, tmp_path):
    file, told = tmp_path / "reference.npz", tmp_path / "report.json"
    code, out, _ = pcam("drift", "reference", "--checkpoint", checkpoint, "--data", synthetic_dir, "--out", file)
    assert code == 0 and f"{file}: 256 synthetic patches of valid" in out
    before = sha256_file(file)
    given = ("--checkpoint", checkpoint, "--reference", file, "--split", "valid", "--size", 100)
    code, out, _ = pcam("drift", *given, "--data", synthetic_dir, "--json", told)
    assert code == 0 and out.startswith("no drift: 100 patches against 256 synthetic ones")
    assert json.loads(told.read_text())["drifted"] is False and sha256_file(file) == before

    blurred, patches = tmp_path / "blurred", open_split(synthetic_dir, "valid")
    blurred.mkdir()
    with h5py.File(split_path(blurred, "valid", "x"), "w") as x, h5py.File(split_path(blurred, "valid", "y"), "w") as y:
        x["x"] = SHIFTS["blur"](np.array(patches.images), 1.0)
        y["y"] = np.asarray(patches.labels).reshape(-1, 1, 1, 1)
    code, out, _ = pcam("drift", *given, "--data", blurred)
    assert code == 1 and out.startswith("DRIFT") and out.splitlines()[1].startswith("sharpness")

    code, _, err = pcam("drift", "--checkpoint", checkpoint, "--reference", Path("none.npz"), "--data", synthetic_dir)
    assert code == 2 and "no such reference" in err
