"""Odd values are counted exactly, and placed ones told from noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pcamlib.audit import integrity
from pcamlib.audit.findings import Finding, Split
from pcamlib.audit.odds import odds_ratio
from pcamlib.audit.stream import Block
from pcamlib.data.convert import to_uint8
from pcamlib.data.patches import Patches, open_split
from pcamlib.data.rewrite import Truth
from pcamlib.data.scan import Scan


def split_of(raw: np.ndarray, labels: np.ndarray | None = None, name: str = "train") -> Split:
    """A split in memory, observed in blocks of 7."""
    parts = []
    for start in range(0, len(raw), 7):
        rows = raw[start : start + 7]
        parts.append(integrity.observe(Block(start, rows, *to_uint8(rows))))
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    images, flags = to_uint8(raw)
    patches = Patches(name, images, labels, None)  # type: ignore[arg-type]
    patches.__dict__["_scan"] = Scan("", flags, np.empty(0), None)
    return Split(patches, columns)


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 255, (count, 96, 96, 3)).astype(np.float32)


def one(splits: dict[str, Split], check: str) -> Finding:
    (found,) = [finding for finding in integrity.check(splits) if finding.check == check]
    return found


def test_clean_patches_give_no_finding() -> None:
    assert integrity.check({"train": split_of(noise(20))}) == []
    assert integrity.check({"train": split_of(noise(20).astype(np.uint8))}) == []


def test_course_file_every_kind_is_counted_exactly(course_dir: Path) -> None:
    truth = Truth.load(course_dir / "truth.json").rows
    raw = np.array(open_split(course_dir, "train").stored.map())
    labels = open_split(course_dir, "train").labels
    found = {finding.check: finding for finding in integrity.check({"train": split_of(raw, labels)})}
    assert set(found) == {"integrity.nan", "integrity.above", "integrity.black", "integrity.white"}
    for check, kind in {"nan": "nan", "above": "spike", "black": "black", "white": "white"}.items():
        np.testing.assert_array_equal(found[f"integrity.{check}"].rows, truth[f"train/{kind}"])
    spikes = found["integrity.above"].details
    assert spikes["values"] == {"fewest": 75, "most": 75, "total": 75 * len(truth["train/spike"])}
    assert spikes["value"] == 1e5 and spikes["size"] == [5, 5] and spikes["placed"] == "shape"
    assert spikes["filled"] == 1 and spikes["odds ratio, tumour"][1] < 1 < spikes["odds ratio, tumour"][2]
    assert found["integrity.nan"].details["placed"] is None
    assert "solid 5x5 block" in found["integrity.above"].what


def test_the_same_block_at_the_same_place_is_called_placed() -> None:
    raw = noise(60)
    raw[:12, 3:10, 80:85] = np.nan
    found = one({"train": split_of(raw)}, "integrity.nan")
    assert found.rows.tolist() == list(range(12)) and found.details["placed"] == "place"
    assert found.details["place"] == [3, 80, 10, 85]


def test_a_minority_of_placed_blocks_is_not_denied() -> None:
    """20 blocks among 75 patches of noise; the verdict says how many."""
    raw, rng = noise(100), np.random.default_rng(1)
    for row in range(95):
        raw[row].reshape(-1)[rng.choice(27648, 20, replace=False)] = np.nan
    raw[:20] = noise(20, 2)
    for row in range(20):
        y, x = rng.integers(0, 88, 2)
        raw[row, y : y + 8, x : x + 8] = np.nan
    found = one({"train": split_of(raw)}, "integrity.nan").details
    assert found["placed"] == "shape" and found["size"] == [8, 8] and found["same size"] == 20
    assert found["verdict"].startswith("20 of them hold a solid 8x8 block")


def test_values_of_another_scale_are_not_called_placed() -> None:
    found = one({"train": split_of(noise(40) / 127.5 - 1)}, "integrity.below")
    assert found.details["placed"] is None and len(found.rows) == 40


def test_scattered_values_are_noise() -> None:
    raw, rng = noise(60), np.random.default_rng(1)
    for row in range(30):
        raw[row].reshape(-1)[rng.choice(27648, rng.integers(1, 60), replace=False)] = 300
    found = one({"train": split_of(raw)}, "integrity.above")
    assert found.details["placed"] is None and "noise" in found.what and len(found.rows) == 30


def test_kinds_below_infinite_and_constant() -> None:
    raw = noise(10)
    raw[1, 2, 3, 0], raw[4, 5, 6, 1], raw[7] = -3, np.inf, 128
    splits = {"train": split_of(raw)}
    assert one(splits, "integrity.below").rows.tolist() == [1]
    assert one(splits, "integrity.inf").rows.tolist() == [4]
    constant = one(splits, "integrity.constant")
    assert constant.rows.tolist() == [7] and constant.details["levels"] == {"128": 1}


def test_a_patch_of_nothing_but_nan_and_a_split_of_nothing_but_flaws() -> None:
    raw = np.full((3, 96, 96, 3), np.nan, np.float32)
    found = one({"train": split_of(raw, np.array([0, 1, 1], np.uint8))}, "integrity.nan")
    assert len(found.rows) == 3 and found.details["values"]["total"] == 3 * 27648
    assert found.details["placed"] is None, "whole patches are damage, not a placed box"


def test_association_with_class_and_split() -> None:
    raw, labels = noise(200), np.repeat([0, 1], 100).astype(np.uint8)
    raw[100:140] = 0
    splits = {"train": split_of(raw, labels), "valid": split_of(noise(200, 1), labels, "valid")}
    details = one(splits, "integrity.black").details
    assert details["odds ratio, tumour"][1] > 5 and details["odds ratio, train"][1] > 5
    assert "tied to tumour" in one(splits, "integrity.black").what


@pytest.mark.parametrize("cells", [(10, 20, 30, 40), (0, 5, 5, 0), (3, 0, 100, 900)])
def test_odds_ratio_is_that_of_the_corrected_table(cells: tuple[int, int, int, int]) -> None:
    both, flawed_only, exposed_only, neither = cells
    flawed = np.repeat([True, True, False, False], cells)
    exposed = np.repeat([True, False, True, False], cells)
    expected = (both + 0.5) * (neither + 0.5) / ((flawed_only + 0.5) * (exposed_only + 0.5))
    result = odds_ratio(flawed, exposed)
    assert result.ratio == pytest.approx(expected) and result.low < result.ratio < result.high


def test_odds_intervals_hold_the_truth_nineteen_times_in_twenty() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        exposed = rng.random(2000) < 0.3
        flawed = rng.random(2000) < np.where(exposed, 0.1, 0.05)
        odds = odds_ratio(flawed, exposed)
        hits += odds.low <= (0.1 / 0.9) / (0.05 / 0.95) <= odds.high
    assert 0.92 <= hits / 400 <= 0.98


def test_observation_does_not_depend_on_the_blocks() -> None:
    raw = noise(21)
    raw[5, 3:8, 3:8], raw[13] = 1e5, 9
    whole = integrity.observe(Block(0, raw, *to_uint8(raw)))
    for name, column in split_of(raw).columns.items():
        np.testing.assert_array_equal(column, whole[name])
