"""ONNX files answer as their checkpoint, carry what it carries, and are not written where they would not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx as onnx_files
import pytest
from onnx import numpy_helper

from pcamlib.data.patches import open_split
from pcamlib.errors import CheckpointError, DataError
from pcamlib.models import onnx
from pcamlib.serving import export
from pcamlib.serving.export import FILES, ParityError
from pcamlib.serving.predict import Predictor
from pcamlib.training import checkpoint as checkpoints
from pcamlib.training.checkpoint import weights_digest


@pytest.fixture(scope="module")
def exported(checkpoint: Path, synthetic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "deep"
    export.export(checkpoint, out, synthetic_dir, report=lambda line: None)
    return out


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> Predictor:
    return Predictor(checkpoint)


@pytest.mark.parametrize("precision", FILES)
def test_a_file_answers_as_the_checkpoint(exported, predictor, synthetic_dir, precision):
    images = np.array(open_split(synthetic_dir, "test").images[:70])  # more than a batch, and not what int8 has seen
    answers = export.probability(onnx.session((exported / FILES[precision]).read_bytes()), images)
    off = np.abs(answers - predictor.probability(images)).max()
    assert off < export.TOLERANCE[precision][0]


def test_a_file_carries_what_the_checkpoint_carries(exported, predictor):
    for precision, name in FILES.items():
        carried = onnx.inscription(onnx.session((exported / name).read_bytes()))
        for key in ("decision", "recorded", "provenance", "normalisation", "model"):
            assert carried[key] == predictor.meta[key]
        assert carried["synthetic"] is True and carried["precision"] == precision
        assert carried["weights"] == weights_digest(predictor.model)
        assert carried["parity"]["n"] == 256 and carried["parity"]["patches"] == "synthetic"


def test_parity_is_told_with_n_and_both_scores(exported, predictor, synthetic_dir):
    rows = json.loads((exported / "parity.json").read_text())
    assert [row["file"] for row in rows] == list(FILES.values())
    for row in rows:
        assert row["AUC of the checkpoint"] == pytest.approx(predictor.meta["recorded"]["metrics"]["auc"]["value"])
        assert row["MB"] == (exported / row["file"]).stat().st_size / 1e6
    off = {row["precision"]: row["off by"] for row in rows}
    assert off["fp32"] < 1e-5 < off["fp16"] < off["int8"]
    assert rows[0]["calls changed"] == 0 and rows[1]["MB"] < 0.75 * rows[0]["MB"]


def test_a_file_that_answers_otherwise_leaves_nothing(monkeypatch, checkpoint, synthetic_dir, tmp_path):
    right = onnx.half

    def wrong(model: bytes) -> bytes:
        made = onnx_files.load_from_string(right(model))
        bias = next(each for each in made.graph.initializer if each.name.endswith("head.bias"))
        shifted = numpy_helper.to_array(bias) + np.array([0, 2], np.float16)
        bias.CopyFrom(numpy_helper.from_array(shifted, bias.name))
        return made.SerializeToString()

    monkeypatch.setattr(onnx, "half", wrong)
    with pytest.raises(ParityError, match=r"as ONNX fp16: .* on 256 synthetic patches .* off by 0\.\d+"):
        export.export(checkpoint, tmp_path / "out", synthetic_dir, report=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_a_worse_auc_alone_is_refused():
    row = {"n": 9, "patches": "real", "off by": 0.1, "AUC": 0.90, "AUC of the checkpoint": 0.92}
    with pytest.raises(ParityError, match=r"the AUC by 0\.02 \(at most 0\.01\)"):
        export._hold("x", row, 0.2, 0.01)
    with pytest.raises(ParityError):
        export._hold("x", row | {"AUC": 0.92, "off by": float("nan")}, 0.2, 0.01)
    export._hold("x", row | {"AUC": 0.915}, 0.2, 0.01)


def test_patches_of_another_kind_are_refused(checkpoint, synthetic_dir, tmp_path):
    tensors, meta = checkpoints.load(checkpoint)
    real = tmp_path / "real.safetensors"
    checkpoints.save(real, tensors, {**meta, "synthetic": False})
    with pytest.raises(DataError, match=r"synthetic patches, but .* learned from real ones; give --data"):
        export.export(real, tmp_path / "out", synthetic_dir)
    assert not (tmp_path / "out").exists()


def test_one_class_cannot_be_compared(predictor, synthetic_dir):
    valid = open_split(synthetic_dir, "valid")
    with pytest.raises(DataError, match="one class"):
        export.build(predictor, valid, np.flatnonzero(valid.labels == 1), None)


def test_the_command_prints_a_line_a_file(pcam, checkpoint, synthetic_dir, tmp_path):
    code, out, _ = pcam("export", checkpoint, "--out", tmp_path / "o", "--data", synthetic_dir)
    lines = [line for line in out.splitlines() if ".onnx: " in line]
    assert code == 0 and len(lines) == 3 and all("256 synthetic patches" in line for line in lines)
    assert {path.name for path in (tmp_path / "o").iterdir()} == {*FILES.values(), "parity.json"}


def test_a_damaged_checkpoint_is_refused(pcam, checkpoint, synthetic_dir, tmp_path):
    data = bytearray(checkpoint.read_bytes())
    data[-9] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        export.export(tmp_path / "bad.safetensors", tmp_path / "o", synthetic_dir)
    code, _, err = pcam("export", tmp_path / "bad.safetensors", "--out", tmp_path / "o", "--data", synthetic_dir)
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "o").exists()
