"""Exact copies under D4: everything planted is found, nothing else, whatever the rows around it."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from audit_memory import observed, split_of

from pcamlib.audit import duplicates
from pcamlib.audit.duplicates import Member, authenticate, check, groups, observe, views
from pcamlib.audit.findings import Split
from pcamlib.data.patches import open_split
from pcamlib.data.plants import copies
from pcamlib.data.rewrite import Plan, Truth
from pcamlib.errors import DataError


def columns(images: np.ndarray) -> dict[str, np.ndarray]:
    return observed(images, observe)


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 96, 96, 3), np.uint8)


held = partial(split_of, (observe,))


def canonical(image: np.ndarray) -> bytes:
    return min(hashlib.sha1(np.ascontiguousarray(view)).digest() for view in views(image))


@pytest.fixture(scope="module")
def planted(synthetic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Split], Truth]:
    folder = tmp_path_factory.mktemp("copies")
    plan = Plan(synthetic_dir, seed=5)
    copies(plan, 20, how="exact")
    copies(plan, 20, how="d4")
    copies(plan, 9, how="d4", into="valid")
    copies(plan, 7, how="exact", split="valid", into="test")
    plan.labels["train"][plan.truth.rows["train/d4"][:5, 1]] ^= 1
    truth = plan.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PCAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        opened = {name: open_split(folder, name) for name in ("train", "valid", "test")}
        assert all(split.valid.all() for split in opened.values())
    return {name: Split(split, columns(np.array(split.images))) for name, split in opened.items()}, truth


def test_the_key_is_the_same_for_all_eight_views_and_no_others() -> None:
    images = noise(4)
    turned = np.stack([np.ascontiguousarray(view) for image in images for view in views(image)])
    keys = columns(turned)["duplicates.key"].reshape(4, 8)
    assert (keys == keys[:, :1]).all() and len(np.unique(keys)) == 4
    assert len({image.tobytes() for image in turned}) == 32


@pytest.mark.parametrize("change", [(0, 0, 0), (47, 48, 1), (95, 3, 2)])
def test_one_changed_value_changes_the_key(change: tuple[int, int, int]) -> None:
    images = np.repeat(noise(1), 2, 0)
    images[1][change] ^= 1
    first, second = columns(images)["duplicates.key"]
    assert first != second


def test_a_key_does_not_depend_on_the_block() -> None:
    images = noise(9)
    whole = columns(images)["duplicates.key"]
    assert np.array_equal(whole, np.concatenate([columns(images[i : i + 2])["duplicates.key"] for i in range(0, 9, 2)]))


def test_the_sha1_is_that_of_the_bytes() -> None:
    images = noise(3)
    expected = [hashlib.sha1(image.tobytes()).digest() for image in images]
    assert [digest.tobytes() for digest in columns(images)["duplicates.sha1"]] == expected


def test_groups_are_those_of_eight_hashes_a_patch(planted: tuple[dict[str, Split], Truth]) -> None:
    splits, _ = planted
    brute: dict[bytes, list[Member]] = {}
    for name, split in splits.items():
        for row in np.flatnonzero(split.valid):
            brute.setdefault(canonical(split.patches.images[row]), []).append(Member(name, int(row)))
    found = groups(splits)
    assert [group.members for group in found] == [members for members in brute.values() if len(members) > 1]
    for group in found:
        (name, row), *_ = group.members
        first = views(splits[name].patches.images[row])
        for (split, other), note in zip(group.members, group.notes, strict=True):
            assert np.array_equal(first[note["view"]], splits[split].patches.images[other])


def test_findings_count_copies_conflicts_and_leaks(planted: tuple[dict[str, Split], Truth]) -> None:
    splits, truth = planted
    found = {(finding.check, finding.split): finding for finding in check(splits)}
    pairs = np.concatenate([truth.rows["train/exact"], truth.rows["train/d4"]])
    exact = found["duplicates.exact", "train"]
    assert np.array_equal(exact.rows, np.unique(pairs)) and np.array_equal(exact.drop, np.sort(pairs.max(1)))
    assert (exact.rule, exact.details["identical"], exact.details["turned"]) == ("duplicates", 20, 20)
    conflict = found["duplicates.conflict", "train"]
    assert conflict.rule == "conflicts" and np.array_equal(conflict.drop, np.unique(truth.rows["train/d4"][:5]))
    leak = found["duplicates.leak", "train"]
    assert leak.rule == "leak" and np.array_equal(leak.drop, np.sort(truth.rows["train>valid/d4"][:, 0]))
    assert np.array_equal(found["duplicates.leak", "valid"].drop, np.sort(truth.rows["valid>test/exact"][:, 0]))
    assert set(found) == {(f"duplicates.{kind}", "train") for kind in ("exact", "conflict", "leak")} | {
        ("duplicates.leak", "valid")
    }


def test_symmetric_and_constant_patches_are_copies_where_they_are_equal() -> None:
    images = np.full((4, 96, 96, 3), 200, np.uint8)
    images[2:] = 201
    assert [group.members for group in groups({"train": held("train", images)})] == [
        [("train", 0), ("train", 1)],
        [("train", 2), ("train", 3)],
    ]


def test_flagged_rows_are_left_out() -> None:
    images = np.repeat(noise(1), 5, 0)
    split = held("train", images, valid=np.array([True, False, False, True, False]))
    assert [group.members for group in groups({"train": split})] == [[("train", 0), ("train", 3)]]
    assert groups({"train": held("train", images, valid=np.zeros(5, bool))}) == []
    assert check({}) == []


def test_equal_keys_alone_make_no_group() -> None:
    split = held("train", np.concatenate([noise(2), noise(2)[::-1, ::-1]]))
    split.columns["duplicates.key"] = np.zeros(4, np.uint64)
    assert sorted(group.members for group in groups({"train": split})) == [
        [("train", 0), ("train", 3)],
        [("train", 1), ("train", 2)],
    ]


def test_details_are_capped_but_counts_are_whole() -> None:
    images = np.repeat(noise(1), 2 * duplicates.SHOWN, 0)
    (finding,) = check({"train": held("train", images)})
    assert len(finding.drop) == 2 * duplicates.SHOWN - 1 == finding.details["largest"] - 1
    assert len(finding.details["shown"][0]) == duplicates.SHOWN


@pytest.mark.parametrize(
    "text",
    ["{0}\n{1}\n", "id\n{0}\n{1}\n", "id,label\n{0},0\n{1},1\n", "label,id\n1,{0}\n0,{1}\n", "{0},1\r\n\n{1},0\r\n"],
)
def test_published_ids_are_recognised(tmp_path: Path, text: str) -> None:
    images = noise(3)
    path = tmp_path / "ids.csv"
    path.write_text(text.format(*(hashlib.sha1(image.tobytes()).hexdigest() for image in images)))
    (finding,) = authenticate({"train": held("train", images)}, path)
    assert finding.rows.tolist() == [2] and finding.rule is None
    assert finding.what.startswith("2 of 3 patches")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no ids"),
        ("id\n", "holds no ids"),
        ("id\n" + "a" * 40 + "\n" + "g" * 40 + "\n", "line 3: 'ggg"),
        ("a" * 40 + "\nb\n", "line 2: 'b'"),
        ("label,id\n1\n", "line 2: ''"),
    ],
)
def test_a_malformed_list_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ids.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        authenticate({"train": held("train", noise(1))}, path)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00\x01"])
def test_an_unreadable_list_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ids.csv"
    if content:
        path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as a list of ids"):
        authenticate({}, path)
