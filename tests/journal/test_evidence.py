"""What may be claimed, what is refused, and what the recorder leaves on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from figure_gate import compare_figures
from journal_evidence import DATA, METRIC, data_evidence, plot
from matplotlib.image import imread

from pcamlib.errors import EvidenceError
from pcamlib.files import sha256_file
from pcamlib.journal.evidence import Recorder, load, records, show


@pytest.fixture
def recorder(root: Path) -> Recorder:
    return Recorder("00_data", root, data=DATA, synthetic=True)


THREE = {"a": "1" * 64, "b": "2" * 64, "c": "3" * 64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": None}, "without n"),
        ({"n": 0}, "n: Input should be greater than 0"),
        ({"interval": None}, "without an interval"),
        ({"baseline": {}}, "without a baseline"),
        ({"interval": (0.82, 0.9)}, "0.82 to 0.9 does not hold the value 0.81"),
        ({"interval": (0.9, 0.7)}, "does not hold"),
        ({"seeds": (0, 1, 1), "runs": THREE}, "seed 1 is listed more than once"),
        ({"seeds": (0, 1, 2), "runs": {"a": "1" * 64}}, "3 seeds need as many runs; got 1"),
        ({"seeds": (0, 1, 2), "runs": {**THREE, "c": "1" * 64}}, "3 seeds, but a and c are one run"),
        ({"baseline": {"constant": float("inf")}}, "inf is no result"),
    ],
)
def test_a_metric_that_is_no_claim_is_refused(recorder: Recorder, change: dict, message: str) -> None:
    with pytest.raises(EvidenceError, match=message) as error:
        recorder.metric("data.mlp.auc", 0.81, **{**METRIC, **change})
    assert "'data.mlp.auc'" in str(error.value) and "\n" not in str(error.value)


def test_a_metric_over_distinct_runs_is_taken(recorder: Recorder) -> None:
    recorder.metric("data.mlp.auc", np.float32(0.81), **METRIC, seeds=[0, 1, 2], runs=THREE)
    recorder.close()
    claim = load(recorder.root)["data.mlp.auc"]
    assert (claim.n, claim.seeds, claim.runs, claim.interval) == (3000, (0, 1, 2), THREE, (0.79, 0.83))
    assert claim.value == pytest.approx(0.81)


@pytest.mark.parametrize("key", ["auc", "Data.auc", "data..auc", "data.auc ", "../etc.passwd", "data/auc.x", ""])
def test_a_bad_key_is_refused(recorder: Recorder, key: str) -> None:
    with pytest.raises(EvidenceError, match="dotted and lower-case"):
        recorder.value(key, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), object()])
def test_a_value_that_is_none_is_refused(recorder: Recorder, value: object) -> None:
    with pytest.raises(EvidenceError, match=r"data\.x"):
        recorder.value("data.x", value)


def test_a_nan_in_a_table_or_figure_is_refused(recorder: Recorder) -> None:
    with pytest.raises(EvidenceError, match="say None"):
        recorder.table("data.x", pd.DataFrame({"a": [1.0, float("nan")]}))
    with pytest.raises(EvidenceError, match="say None"):
        recorder.figure("data.x", plot(), {"a": np.array([np.nan])}, caption="A figure.")
    with pytest.raises(EvidenceError, match="needs rows"):
        recorder.table("data.x", [])
    with pytest.raises(EvidenceError, match="needs a caption"):
        recorder.figure("data.x", plot(), {"a": [1]}, caption="")
    with pytest.raises(EvidenceError, match="bytes of data"):
        recorder.figure("data.x", plot(), {"a": np.random.default_rng(0).random(200_000)}, caption="Pixels.")


def test_a_key_is_recorded_once(recorder: Recorder) -> None:
    recorder.value("data.x", 1)
    with pytest.raises(EvidenceError, match="recorded twice"):
        recorder.table("data.x", [{"a": 1}])


def test_a_notebook_must_exist(root: Path) -> None:
    with pytest.raises(EvidenceError, match="no such notebook"):
        Recorder("99_nothing", root, data={}, synthetic=True)


def test_nothing_is_written_before_close(recorder: Recorder) -> None:
    recorder.figure("data.balance", plot(), {"loss": [1.0]}, caption="The balance.")
    assert not (recorder.root / "assets").exists() and not (recorder.root / "journal" / "evidence").exists()


def test_close_writes_evidence_with_its_provenance(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = {"epochs": 3, "data_dir": str(root), "root": root}
    recorder = Recorder("00_data", root, data=DATA, synthetic=True, parameters=parameters)
    recorder.metric("data.mlp.auc", 0.8123, **METRIC)
    recorder.value("data.same", True)
    recorder.close()
    assert capsys.readouterr().out.splitlines() == [
        "00_data: 1 value, 1 metric recorded, on synthetic data",
        "data.mlp.auc 0.81, data.same yes",
    ]
    origin = records(root)["00_data"].provenance
    assert origin["data"] == DATA
    assert origin["parameters"] == {"epochs": 3, "data_dir": root.name, "root": root.name}
    assert {"00_data.ipynb", "pcamlib/files.py", "pcamlib/errors.py"} <= set(origin["sources"])
    assert origin["lock"] == sha256_file(root / "requirements.lock")
    assert str(root) not in (root / "journal" / "evidence" / "00_data.json").read_text()


def test_a_figure_keeps_its_data_and_says_it_is_synthetic(recorder: Recorder) -> None:
    figure = plot()
    recorder.figure("data.balance", figure, {"z": np.array([1 / 3, 2.0]), "a": [1, None]}, caption="The balance.", n=3)
    recorder.close()
    assert [text.get_text() for text in figure.texts] == ["synthetic data"]
    stored = json.loads((recorder.root / "assets/data.balance.json").read_text())
    assert stored["series"] == {"z": [0.333333, 2.0], "a": [1, None]} and list(stored["series"]) == ["z", "a"]
    assert (stored["caption"], stored["notebook"], stored["synthetic"]) == ("The balance.", "00_data", True)
    image = recorder.root / "assets/data.balance.png"
    assert load(recorder.root)["data.balance"].files["assets/data.balance.png"] == sha256_file(image)
    pixels = imread(image)
    corner = pixels[int(0.9 * len(pixels)) :, pixels.shape[1] // 2 :]
    assert ((corner[..., 0] > 0.6) & (corner[..., 1] < 0.4)).any(), "the red stamp shows in the lower right corner"


def test_a_figure_of_real_data_is_not_stamped_and_not_large(root: Path) -> None:
    recorder = Recorder("00_data", root, data=DATA, synthetic=False)
    figure = plot()
    figure.set_size_inches(30, 10)
    recorder.figure("data.balance", figure, {"a": [1]}, caption="The balance.")
    recorder.close()
    assert not figure.texts
    assert max(imread(root / "assets/data.balance.png").shape) <= 1250


def test_figures_no_longer_made_are_removed_unless_another_notebook_makes_them(root: Path) -> None:
    data_evidence(root, synthetic=True).close()
    other = Recorder("01_reproducibility", root, data=DATA, synthetic=True)
    other.figure("data.balance", plot(), {"a": [1]}, caption="Moved here.")
    other.close()
    again = Recorder("00_data", root, data=DATA, synthetic=True)
    again.figure("data.sampler", plot(), {"a": [1]}, caption="The sampler.")
    again.close()
    assert sorted(path.name for path in (root / "assets").iterdir()) == [
        "data.balance.json", "data.balance.png", "data.sampler.json", "data.sampler.png",
    ]  # fmt: skip
    assert set(load(root)) == {"data.balance", "data.sampler"}


def test_a_table_keeps_the_order_of_its_columns(recorder: Recorder) -> None:
    recorder.table("data.x", pd.DataFrame({"z": [1, 2], "a": ["x", None], "b": [True, False]}))
    recorder.close()
    rows = load(recorder.root)["data.x"].value
    assert rows == [{"z": 1, "a": "x", "b": True}, {"z": 2, "a": None, "b": False}] and list(rows[0]) == ["z", "a", "b"]


def test_two_notebooks_cannot_share_a_key(root: Path) -> None:
    for name in ("00_data", "01_reproducibility"):
        recorder = Recorder(name, root, data=DATA, synthetic=True)
        recorder.value("data.x", 1)
        recorder.close()
    with pytest.raises(EvidenceError, match=r"01_reproducibility.json: .*'data.x' is also in .*00_data.json"):
        load(root)


@pytest.mark.parametrize("damage", ["", "[]", '{"evidence": 1}', '{"evidence": []}', '{"evidence": [1]}'])
def test_a_damaged_file_is_a_clear_error(complete: Path, damage: str) -> None:
    (complete / "journal/evidence/00_data.json").write_text(damage)
    with pytest.raises(EvidenceError, match=r"^journal/evidence/00_data.json: .*run the notebook again$"):
        load(complete)


def test_the_figure_gate_names_the_first_difference(root: Path) -> None:
    def written(name: str, **series: object) -> Path:
        path = root / name
        path.write_text(json.dumps({"series": series}))
        return path

    old = written("old.json", train=[[1.0, 2.0]], valid=[1.0, 2.0, 3.0], names=["a"], gone=[1], gap=[None, 0.0])
    near = written("near.json", train=[[1.0, 2.00001]], valid=[1.0, 2.0, 3.0], names=["a"], gone=[1], gap=[None, 0.0])
    far = written("far.json", train=[[1.0, 2.1]], valid=[1.0, 2.0], names=["b"], gap=[0.0, 0.0], new=[1])
    assert compare_figures(old, old, 0) == compare_figures(old, near, 1e-4) == []
    assert compare_figures(old, near, 1e-6) == ["series 'train'[0][1]: 2 is now 2.00001"]
    assert compare_figures(old, far, 1e-4) == [
        "series 'train'[0][1]: 2 is now 2.1",
        "series 'valid': 3 entries are now 2",
        "series 'names'[0]: a is now b",
        "series 'gone' is only in the old figure",
        "series 'gap'[0]:  is now 0",
        "series 'new' is only in the new figure",
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(3000, "3,000"), (0.91349, "0.913"), (True, "yes"), (None, ""), (1.23e-5, "1.23e-05"), (131072.4, "131,072"),
     ([0.79, 0.83], "0.79 to 0.83"), (["a", "b"], "a, b"), (1.0, "1"), ("text", "text"), (-4321.0, "-4,321")],
)  # fmt: skip
def test_values_are_shown_as_a_reader_wants_them(value: object, shown: str) -> None:
    assert show(value) == shown
