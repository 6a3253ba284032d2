"""Placed marks and spikes: found in every shape and place, not found in clean patches, and judged by their class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pcamlib.audit import integrity, poison
from pcamlib.audit.findings import Finding, Split
from pcamlib.audit.stream import Block
from pcamlib.data.patches import open_split

NONE = np.empty(0, np.int64)


@pytest.fixture(scope="module")
def clean(synthetic_dir: Path) -> Split:
    return open_as(synthetic_dir)


def open_as(folder: Path) -> Split:
    patches = open_split(folder, "train")
    return Split(patches, columns(patches.images))


def columns(images: np.ndarray, step: int = 100) -> dict[str, np.ndarray]:
    flags = np.zeros(step, np.uint8)
    parts = []
    for i in range(0, len(images), step):
        block = Block(i, images[i : i + step], images[i : i + step], flags[: len(images) - i])
        parts.append(integrity.observe(block) | poison.observe(block))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def split_of(images: np.ndarray, labels: np.ndarray | None, like: Split) -> Split:
    made = Split(type(like.patches)("train", images, labels, like.patches.stored), columns(images))
    made.__dict__["valid"] = np.ones(len(images), bool)
    return made


def marked(clean: Split, name: str, place: tuple[int, int] | None, *, count: int = 20, relabel: bool = True):
    """A split with one mark on `count` rows of class 0, and those rows."""
    rng = np.random.default_rng(3)
    images, labels = np.array(clean.patches.images), np.array(clean.labels)
    rows = np.sort(rng.choice(np.flatnonzero(labels == 0), count, replace=False))
    y, x = np.mgrid[:7, :7]
    colour = np.full((7, 7, 3), 255)
    colour[(y + x) % 2 == 0] = (0, 40, 200) if name == "checks" else 255
    if name == "red":
        colour[:] = (220, 30, 30)
    shape = {
        "block": (y < 5) & (x < 5), "small": (y < 3) & (x < 3), "triangle": x + y < 7, "angle": (x == 0) | (y == 6),
        "cross": (x == 3) | (y == 3), "line": y == 3, "checks": y < 6, "red": y < 7,
    }[name]  # fmt: skip
    for row in rows:
        top, left = place or rng.integers(0, 90, 2)
        images[row, top : top + 7, left : left + 7][shape] = colour[shape]
    if relabel:
        labels[rows] = 1
    return split_of(images, labels, clean), rows


def test_clean_patches_carry_no_mark(clean: Split) -> None:
    assert poison.check({"train": clean}) == []


def test_observe_looks_at_each_row_alone(clean: Split) -> None:
    split, _ = marked(clean, "block", (3, 80))
    again = columns(split.patches.images, 37)
    assert all(np.array_equal(split.columns[name], again[name]) for name in again)


@pytest.mark.parametrize("place", [(0, 0), (89, 89), (40, 13), None])
@pytest.mark.parametrize("name", ["block", "small", "triangle", "angle", "cross", "line", "checks", "red"])
def test_a_mark_of_any_shape_is_found_at_any_place(clean: Split, name: str, place: tuple[int, int] | None) -> None:
    split, rows = marked(clean, name, place)
    (found,) = poison._placed(split)
    assert np.array_equal(found.drop, rows)
    assert found.rule == "poison" and found.details["targeted"] and found.details["classes"] == [0, 20]
    assert (found.details["place"] is None) == (place is None)


def test_a_mark_on_both_classes_is_no_trigger(clean: Split) -> None:
    split, rows = marked(clean, "block", None, relabel=False)
    labels = np.array(split.labels)
    labels[rows] = np.arange(len(rows)) % 3 > 0  # two thirds: leans to a class
    (found,) = poison._placed(split_of(split.patches.images, labels, clean))
    assert np.array_equal(found.rows, rows) and not found.details["targeted"]
    assert "no backdoor" in poison.verdict([found])
    assert "backdoor trigger" in poison.verdict(poison._placed(marked(clean, "block", None)[0]))


@pytest.mark.parametrize("place", [(0, 0), (30, 51), None])
@pytest.mark.parametrize("side", [13, 16, 38])
def test_a_large_block_is_found_whole(clean: Split, side: int, place: tuple[int, int] | None) -> None:
    rng = np.random.default_rng(side)
    images = np.array(clean.patches.images)
    rows = np.sort(rng.choice(len(images), 20, replace=False))
    for row in rows:
        y, x = place or rng.integers(0, 97 - side, 2)
        images[row, y : y + side, x : x + side] = (250, 250, 40)
    (found,) = poison._placed(split_of(images, clean.labels, clean))
    assert np.array_equal(found.rows, rows)
    assert found.details["place"] == place and np.array(found.details["mask"]).shape == (side, side)


def test_a_pattern_on_marked_rows_is_not_told_twice(clean: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    split, rows = marked(clean, "block", (3, 80))
    others = np.setdiff1d(np.arange(len(split)), rows)

    def pattern(check: str, kept: np.ndarray, **details: list[int]) -> Finding:
        return Finding(f"poison.{check}", "train", "", kept, "likely", "", "poison", kept, dict(details))

    twice = [pattern("pattern", np.sort(np.append(rows, others[:19]))), pattern("wave", NONE, suspects=rows.tolist())]
    news = [pattern("pattern", np.sort(np.append(rows, others[:20]))), pattern("wave", others[:9])]
    monkeypatch.setattr(poison.patterns, "check", lambda splits: twice + news)
    mark, *rest = poison.check({"train": split})
    assert mark.check == "poison.mark" and rest == news


def test_copies_of_one_patch_are_no_mark(clean: Split) -> None:
    split, rows = marked(clean, "block", (3, 80))
    images = np.array(split.patches.images)
    images[rows] = images[rows[0]]
    assert poison._placed(split_of(images, split.labels, clean)) == []


def test_shifted_copies_are_no_mark(clean: Split) -> None:
    images = np.array(clean.patches.images)
    slide = np.concatenate([np.concatenate(images[:2], 1), np.concatenate(images[2:4], 1)])
    slide[90:96, 90:96] = 255
    rng = np.random.default_rng(0)
    for row, (y, x) in enumerate(rng.integers(0, 30, (20, 2))):
        images[row] = slide[y : y + 96, x : x + 96]
    assert poison._placed(split_of(images, None, clean)) == []


def test_a_few_equal_marks_are_chance(clean: Split) -> None:
    assert poison._placed(marked(clean, "block", (3, 80), count=poison.LEAST - 1)[0]) == []


def test_it_works_without_labels_and_with_few_or_equal_rows(clean: Split) -> None:
    split, rows = marked(clean, "block", (3, 80))
    bare = split_of(split.patches.images, None, clean)
    (found,) = poison._placed(bare)
    assert np.array_equal(found.rows, rows) and "targeted" not in found.details
    assert "cannot be asked" in poison.verdict([found])
    for count in (1, 7, 50):
        same = np.repeat(clean.patches.images[:1], count, 0)
        assert poison.check({"train": split_of(same, np.zeros(count, np.uint8), clean)}) == []
    bare.__dict__["valid"] = np.zeros(len(bare), bool)
    assert poison.check({"train": bare}) == []


def spiked(clean: Split, pixels: np.ndarray, box: np.ndarray, value: float) -> Split:
    size = len(clean)
    odd = np.arange(len(pixels))
    made = Split(clean.patches, dict(clean.columns))
    made.columns |= {"integrity.pixels": np.zeros(size, np.int32), "integrity.box": np.full((size, 4), -1, np.int16),
                     "integrity.value": np.zeros(size, np.float32)}  # fmt: skip
    made.columns["integrity.pixels"][odd], made.columns["integrity.box"][odd] = pixels, box
    made.columns["integrity.value"][odd] = value
    return made


def test_blocks_of_one_odd_value_are_spikes_and_scattered_ones_are_not(clean: Split) -> None:
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 90, (30, 2))
    (found,) = poison._spikes(spiked(clean, np.full(30, 25), np.hstack([corner, corner + 5]), 1e5))
    assert np.array_equal(found.rows, np.arange(30)) and found.details["size"] == [5, 5]
    assert found.details["place"] is None
    same = np.tile([88, 88, 93, 93], (30, 1))
    assert poison._spikes(spiked(clean, np.full(30, 25), same, 1e5))[0].details["place"] == [88, 88]
    holes = np.hstack([corner, corner + rng.integers(1, 6, (30, 2))])
    assert poison._spikes(spiked(clean, rng.integers(1, 51, 30), holes, np.nan)) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e5])
def test_a_few_blocks_among_scattered_values_are_spikes_and_can_be_stored(clean: Split, value: float) -> None:
    rng = np.random.default_rng(1)
    corner = rng.integers(0, 88, (115, 2))
    pixels, box = rng.integers(2, 51, 115), np.hstack([corner, corner + 8])
    pixels[:20] = 64
    (found,) = poison._spikes(spiked(clean, pixels, box, value))
    assert np.array_equal(found.rows, np.arange(20)) and found.details["size"] == [8, 8]
    assert json.loads(json.dumps(found.details, allow_nan=False))["value"] == (str(value) if value != 1e5 else 1e5)
    assert ("NaN" if np.isnan(value) else f"{value:g}") in found.what
    pixels[poison.LEAST - 1 : 20] = 63
    box[:, 2:] += rng.integers(0, 9, (115, 2)) * (np.arange(115) >= poison.LEAST - 1)[:, None]
    assert poison._spikes(spiked(clean, pixels, box, value)) == []


def test_blank_patches_and_lines_are_no_spikes(clean: Split) -> None:
    for tall in (2, 96):
        box = np.tile([0, 0, tall, 96], (30, 1))
        assert poison._spikes(spiked(clean, np.full(30, tall * 96), box, np.nan)) == []


def test_the_verdict_weighs_what_else_is_wrong() -> None:
    damage = Finding("integrity.nan", "train", "3 patches hold NaN", np.arange(3), "certain", "")
    flips = Finding("labels.suspect", "train", "40 labels", np.arange(40), "likely", "")
    assert "No sign" in poison.verdict([])
    assert "damaged data" in poison.verdict([damage]) and "nan in 3" in poison.verdict([damage])
    assert "wrong labels" in poison.verdict([flips])


def test_a_stamped_mark_is_found_again(clean: Split) -> None:
    mark = poison.Mark(np.full((4, 4, 3), 9, np.uint8), np.eye(4, dtype=bool), (2, 2))
    stamped = mark.stamp(np.array(clean.patches.images[:5]))
    images = np.concatenate([stamped, clean.patches.images[5:20]])
    assert np.array_equal(poison.carriers(split_of(images, None, clean), mark), np.arange(5))
