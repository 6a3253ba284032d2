"""A checkpoint alone answers files of every kind, however they are batched; what is bad is named, the rest answered."""

from __future__ import annotations

import csv
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from pcamlib.data.layout import split_path
from pcamlib.data.patches import Patches, open_split
from pcamlib.errors import CheckpointError, ConfigError, DataError, PcamError
from pcamlib.serving import images, inputs, predict
from pcamlib.serving.predict import Predictor, run


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> Predictor:
    return Predictor(checkpoint)


@pytest.fixture(scope="module")
def valid(synthetic_dir: Path) -> Patches:
    return open_split(synthetic_dir, "valid")


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def probabilities(path: Path) -> np.ndarray:
    return np.array([float(row["probability"]) for row in rows(path)])


def write(path: Path, x: Any, y: Any = None, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=x, **options)
        if y is not None:
            file["y"] = np.reshape(y, (-1, 1, 1, 1))
    return path


def pictures(folder: Path, patches: np.ndarray) -> Path:
    folder.mkdir()
    for number, patch in enumerate(patches):
        Image.fromarray(patch).save(folder / f"{number:04d}.png")
    return folder


# Predictor


def test_the_recorded_auc_is_scored_again(
    predictor: Predictor, valid: Patches, synthetic_dir: Path, tmp_path: Path
) -> None:
    result = run(predictor, [split_path(synthetic_dir, "valid", "x")], out=tmp_path / "a.csv")
    ((name, report),) = result.reports.items()
    recorded = predictor.meta["recorded"]
    assert recorded["n"] == report["n"] == result.patches == 256 and name.endswith("_x.h5 (synthetic patches)")
    assert report["metrics"]["auc"]["value"] == pytest.approx(recorded["metrics"]["auc"]["value"], abs=1e-6)
    assert predictor.decision and report["threshold"] == predictor.decision.threshold
    text = result.text()
    assert "always tumour" in text and "95 % interval" in text and "256 patches" in text
    assert "SYNTHETIC" in predictor.about() and "256 valid patches" in predictor.about()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_answers_do_not_depend_on_the_batch(checkpoint: Path, valid: Patches, precision: str) -> None:
    predictor = Predictor(checkpoint, precision)
    some = valid.images[:70]
    whole = predictor.probability(some)
    for size in (1, 3, 33):
        parts = [predictor.probability(some[at : at + size]) for at in range(0, len(some), size)]
        assert np.abs(np.concatenate(parts) - whole).max() < (1e-6 if precision == "fp32" else 5e-3)


def test_bf16_is_near_float32_and_not_equal(checkpoint: Path, valid: Patches) -> None:
    one, other = (Predictor(checkpoint, precision).probability(valid.images[:64]) for precision in ("fp32", "bf16"))
    assert 0 < np.abs(one - other).max() < 0.03


def test_memory_mapped_patches_are_answered_without_a_warning(predictor: Predictor, valid: Patches) -> None:
    assert not valid.images[:4].flags.writeable
    torch.set_warn_always(True)  # else once a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(predictor.probability(valid.images[:4])) == 4
    finally:
        torch.set_warn_always(False)


def test_confidence_is_calibrated_and_calls_follow_the_threshold(predictor: Predictor, valid: Patches) -> None:
    assert predictor.decision
    answers = predictor.answer(valid.images[:40], 0.5)
    t = predictor.decision.temperature
    expected = [1 / (1 + math.exp(-math.log(p / (1 - p)) / t)) for p in answers.probability]
    assert np.allclose(answers.confidence, expected, atol=1e-6)
    assert (answers.tumour == (answers.probability >= 0.5)).all() and 0 < answers.tumour.sum() < 40
    assert predictor.answer(valid.images[:2]).threshold == predictor.decision.threshold
    assert predictor.probability(valid.images[:0]).shape == (0,)


@pytest.mark.parametrize("wanted", ["often", "1.5", "-1", "nan"])
def test_an_impossible_threshold_is_refused(predictor: Predictor, wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"threshold '{wanted}': give a number from 0 to 1, or 'chosen'"):
        predictor.threshold(wanted)


def test_a_checkpoint_that_is_damaged_or_a_pickle_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    data = bytearray(checkpoint.read_bytes())
    data[-100] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="its bytes do not match the digest"):
        Predictor(tmp_path / "flipped.safetensors")
    (tmp_path / "a.pt").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CheckpointError, match=r"pickled \.pt files are not read"):
        Predictor(tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="precision 'bf61'; did you mean 'bf16'"):
        Predictor(checkpoint, "bf61")


# run: kinds of input


def test_pictures_h5_and_folders_give_the_same_answers(predictor: Predictor, valid: Patches, tmp_path: Path) -> None:
    expected = predictor.probability(valid.images[:150])
    folder, out = pictures(tmp_path / "many", valid.images[:150]), tmp_path / "a.csv"
    (folder / "notes.txt").write_text("x")
    result = run(predictor, [folder], out=out)
    assert result.patches == 150 and not result.refused
    assert np.abs(probabilities(out) - expected).max() < 2e-6
    first = rows(out)[0]
    assert tuple(first) == predict.COLUMNS and first["file"] == str(folder / "0000.png") and first["row"] == ""
    h5 = write(tmp_path / "a.h5", valid.images[:150], valid.labels[:150] if valid.labels is not None else None)
    assert np.abs(probabilities_of(predictor, h5, tmp_path) - expected).max() < 2e-6
    last = rows(tmp_path / "of.csv")[-1]
    assert (last["row"], last["x"], last["label"]) == ("149", "", str(valid.labels[149]))  # type: ignore[index]
    assert last["tumour"] == str(int(float(last["probability"]) >= predictor.threshold()))


def probabilities_of(predictor: Predictor, path: Path, tmp_path: Path) -> np.ndarray:
    run(predictor, [path], out=tmp_path / "of.csv")
    return probabilities(tmp_path / "of.csv")


@pytest.mark.parametrize("options", [{"chunks": (7, 96, 96, 3)}, {"compression": "gzip"}, {}])
def test_float32_and_chunks_are_read_and_leave_no_copy(
    predictor: Predictor, valid: Patches, tmp_path: Path, options: dict[str, Any]
) -> None:
    path = write(tmp_path / "a.h5", valid.images[:40].astype(np.float32), **options)
    assert np.abs(probabilities_of(predictor, path, tmp_path) - predictor.probability(valid.images[:40])).max() < 2e-6
    assert rows(tmp_path / "of.csv")[0]["label"] == "" and not (tmp_path / ".pcam-cache").exists()


def test_odd_patches_are_answered_and_counted(predictor: Predictor, valid: Patches, tmp_path: Path) -> None:
    x = valid.images[:300].astype(np.float32)
    x[3, 5, 5], x[200] = np.nan, 0
    result = run(predictor, [write(tmp_path / "a.h5", x)], out=tmp_path / "a.csv")
    assert result.odd == 2 and result.patches == 256 and "2 patches hold NaN" in result.text()


def test_an_h5_that_does_not_fit_is_refused(predictor: Predictor, valid: Patches, tmp_path: Path) -> None:
    small = valid.images[:4]
    for path, what in (
        (write(tmp_path / "shape.h5", small[:, :64]), r"has shape \(4, 64, 96, 3\), expected"),
        (write(tmp_path / "unit.h5", small / np.float32(255)), "values from 0 to 1; patches have 0 to 255"),
        (write(tmp_path / "labels.h5", small, [0, 1]), "4 patches but 2 labels"),
        (write(tmp_path / "two.h5", small, [0, 1, 2, 1]), "label 2 in row 2"),
    ):
        with pytest.raises(PcamError, match=f"{path.name}: .*{what}"):
            run(predictor, [path], out=tmp_path / "a.csv")
    (tmp_path / "cut.h5").write_bytes((tmp_path / "shape.h5").read_bytes()[:5000])
    with pytest.raises(PcamError, match=r"cut\.h5: truncated"):
        run(predictor, [tmp_path / "cut.h5"], out=tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists() and not list(tmp_path.glob(".*"))


def test_larger_pictures_are_refused_cropped_or_tiled(predictor: Predictor, valid: Patches, tmp_path: Path) -> None:
    two = np.concatenate([valid.images[0], valid.images[1]], 1)
    path, out = tmp_path / "two.png", tmp_path / "a.csv"
    Image.fromarray(two).save(path)
    with pytest.raises(PcamError, match=r"two\.png: 192 x 96 pixels, a patch has 96 x 96"):
        run(predictor, [path], out=out)
    run(predictor, [path], out=out, how="tile")
    assert np.abs(probabilities(out) - predictor.probability(valid.images[:2])).max() < 2e-6
    assert [(row["x"], row["y"]) for row in rows(out)] == [("0", "0"), ("96", "0")]
    run(predictor, [path], out=out, how="tile", step=32)
    assert [row["x"] for row in rows(out)] == ["0", "32", "64", "96"]
    run(predictor, [path], out=out, how="centre")
    assert abs(probabilities(out)[0] - predictor.probability(two[None, :, 48:144])[0]) < 2e-6


def test_a_region_above_the_limit_is_tiled_in_bands(
    predictor: Predictor, valid: Patches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.concatenate([np.concatenate(list(valid.images[i : i + 8]), 1) for i in range(0, 64, 8)])
    path, expected = tmp_path / "a.tif", predictor.probability(valid.images[:64])
    Image.fromarray(whole).save(path, compression="tiff_lzw")
    monkeypatch.setattr(images, "decode", None)  # would hold it whole
    monkeypatch.setattr(images, "MOST_PIXELS", whole.shape[0] * whole.shape[1] - 1)
    run(predictor, [path], out=tmp_path / "a.csv", how="tile")
    assert np.abs(probabilities(tmp_path / "a.csv") - expected).max() < 2e-6


# run: bad input


def test_one_bad_file_among_many_is_named_and_the_rest_answered(
    predictor: Predictor, valid: Patches, tmp_path: Path
) -> None:
    folder = pictures(tmp_path / "many", valid.images[:80])
    (folder / "0040.png").write_bytes((folder / "0040.png").read_bytes()[:900])
    result = run(predictor, [folder], out=tmp_path / "a.csv")
    assert result.patches == 79 and len(rows(tmp_path / "a.csv")) == 79
    (line,) = result.refused
    assert line.startswith(f"{folder / '0040.png'}: broken PNG") and f"not answered: {line}" in result.text()


def test_a_name_that_is_not_utf8_is_written_and_printed(
    predictor: Predictor, valid: Patches, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = pictures(tmp_path / "many", valid.images[:2])
    for name in (b"M\xe4rz.png", b"Broken\xff.png"):
        shutil.copy(folder / "0001.png", path := folder / os.fsdecode(name))
    path.write_bytes(b"")
    result = run(predictor, [folder], out=tmp_path / "a.csv")
    expected = [str(folder / name) for name in ("0000.png", "0001.png", r"M\xe4rz.png")]
    assert [row["file"] for row in rows(tmp_path / "a.csv")] == expected and r"Broken\xff.png: empty" in result.text()
    run(predictor, [folder])
    assert expected[2] in capfd.readouterr().out
    result.text().encode()


def test_what_nobody_foresaw_in_one_file_is_named_and_the_rest_answered(
    predictor: Predictor, valid: Patches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, decode = pictures(tmp_path / "many", valid.images[:4]), images.decode

    def odd(data: bytes, name: str) -> np.ndarray:
        if name.endswith(("1.png", "2.png")):
            raise MemoryError if name.endswith("1.png") else RuntimeError("of two\nlines")
        return decode(data, name)

    monkeypatch.setattr(images, "decode", odd)
    result = run(predictor, [folder], out=tmp_path / "a.csv")
    assert result.patches == 2 and result.refused == [
        f"{folder / '0001.png'}: cannot be read (MemoryError); look at it, or save or copy it again",
        f"{folder / '0002.png'}: cannot be read (RuntimeError: of two lines); look at it, or save or copy it again",
    ]


def test_a_flat_region_above_the_limit_is_refused_by_name(
    predictor: Predictor, valid: Patches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures(tmp_path / "many", valid.images[:1])
    Image.fromarray(np.zeros((70, 500, 3), np.uint8)).save(folder / "flat.tif")
    monkeypatch.setattr(images, "MOST_PIXELS", 70 * 500 - 1)
    result = run(predictor, [folder], out=tmp_path / "a.csv", how="tile")
    assert result.patches == 1 and "500 x 70 pixels, less than a patch of 96 x 96" in result.refused[0]


def test_a_link_to_nothing_shows_in_the_result(predictor: Predictor, valid: Patches, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "many", valid.images[:5])
    (folder / "x.png").symlink_to("gone.png")
    result = run(predictor, [folder], out=tmp_path / "a.csv")
    assert result.patches == 5 and f"not answered: {folder / 'x.png'}: cannot be reached" in result.text()


def test_a_file_refused_midway_says_how_many_were_answered(
    predictor: Predictor, valid: Patches, tmp_path: Path
) -> None:
    x = np.concatenate([valid.images[:200], valid.images[:200]])
    path = write(tmp_path / "a.h5", x, chunks=(300, 96, 96, 3), compression="gzip")
    with h5py.File(path) as file:
        second = file["x"].id.get_chunk_info(1).byte_offset
    with open(path, "r+b") as handle:
        handle.seek(second)
        handle.write(b"\xff" * 1000)
    result = run(predictor, [path], out=tmp_path / "a.csv")
    assert result.patches == len(rows(tmp_path / "a.csv")) == 300
    assert result.text().endswith("; its first 300 patches are answered") and "rows from 300" in result.text()


def test_a_file_given_twice_is_answered_once(
    predictor: Predictor, valid: Patches, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pictures(tmp_path / "many", valid.images[:3])
    with caplog.at_level("INFO"):
        result = run(predictor, [folder / "0001.png", folder, folder / ".." / "many" / "0002.png"])
    assert result.patches == 3 and caplog.text.count("given twice, answered once") == 2


def test_nothing_to_answer_is_an_error(predictor: Predictor, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"empty: no PNG, JPEG, TIFF or H5 in this folder \(0 files\)"):
        run(predictor, [empty])
    with pytest.raises(DataError, match=r"none\.png: no such file or folder"):
        run(predictor, [tmp_path / "none.png"])
    for name in "ab":
        (empty / f"{name}.png").touch()
    with pytest.raises(PcamError, match=r"a\.png: empty file.* \(the first of 2 files, all refused\)"):
        run(predictor, [empty], out=tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()


def test_a_folder_in_the_official_layout_is_read_with_its_labels(
    predictor: Predictor, synthetic_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for part in "xy":
        shutil.copy(split_path(synthetic_dir, "test", part), folder)
    found = inputs.find([folder], print, [])
    assert [path.name for path in found] == [split_path(folder, "test", "x").name]
    assert next(inputs.pieces(found[0])).labels is not None


def test_an_output_that_cannot_be_written_is_one_line(
    predictor: Predictor, valid: Patches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures(tmp_path / "many", valid.images[:2])
    with pytest.raises(PcamError, match="is a folder; give the name of a file in it"):
        run(predictor, [folder], out=tmp_path)
    with pytest.raises(PcamError, match="cannot be written"):
        run(predictor, [folder], out=folder / "0000.png" / "a.csv")
    real = predict.atomic_path

    @contextmanager
    def full(path: Path) -> Iterator[Path]:
        with real(path) as part:
            part.symlink_to("/dev/full")
            yield part

    monkeypatch.setattr(predict, "atomic_path", full)
    with pytest.raises(PcamError, match=r"a\.csv: the disk is full or over quota"):
        run(predictor, [folder], out=tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_one_line(predictor: Predictor, valid: Patches, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "many", valid.images[:1])
    (folder / "0000.png").chmod(0)
    with pytest.raises(PcamError, match="cannot be read"):
        run(predictor, [folder])
