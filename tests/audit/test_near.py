"""Near copies: found with the right view and shift, and nothing that merely looks alike."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from audit_memory import split_of
from PIL import Image

from pcamlib.audit import align, duplicates, near
from pcamlib.audit.duplicates import Member
from pcamlib.audit.findings import Split
from pcamlib.audit.near import Evidence, check, search
from pcamlib.data.patches import open_split

held = partial(split_of, (duplicates.observe, near.observe))


@pytest.fixture(scope="module")
def tissue(synthetic_dir: Path) -> np.ndarray:
    return np.array(open_split(synthetic_dir, "train").images[:100])


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    packed = io.BytesIO()
    Image.fromarray(image).save(packed, "jpeg", quality=quality)
    return np.asarray(Image.open(packed))


def brightened(image: np.ndarray, gain: float) -> np.ndarray:
    return np.clip(np.rint(image * gain), 0, 255).astype(np.uint8)


def shifted(image: np.ndarray, down: int, right: int, mode: str) -> np.ndarray:
    wide = np.pad(image, ((20, 20), (20, 20), (0, 0)), mode)  # type: ignore[call-overload]
    return wide[20 - down : 116 - down, 20 - right : 116 - right]


def only(splits: dict[str, Split]) -> Evidence:
    (pair,) = search(splits).pairs
    return pair.evidence


@pytest.mark.parametrize("quality", [50, 70, 90])
def test_a_reencoded_patch_is_found(tissue: np.ndarray, quality: int) -> None:
    images = np.concatenate([tissue, jpeg(tissue[7], quality)[None]])
    (pair,) = search({"train": held("train", images)}).pairs
    assert (pair.first, pair.second) == (("train", 7), ("train", 100))
    assert (pair.evidence.view, pair.evidence.shift) == (0, (0, 0)) and pair.evidence.phash <= 8


@pytest.mark.parametrize("mode", ["edge", "reflect", "wrap", "constant"])
@pytest.mark.parametrize("shift", [(1, -2), (8, 8), (-8, 5), (-16, 0)])
def test_a_shift_is_measured_whatever_fills_the_border(tissue: np.ndarray, shift: tuple[int, int], mode: str) -> None:
    images = np.stack([*tissue[:70], shifted(tissue[3], *shift, mode)])
    evidence = only({"train": held("train", images)})
    assert evidence.shift == shift and evidence.view == 0 and evidence.overlap > 0.9
    assert evidence.copied == (max(map(abs, shift)) <= near.COPY)


@pytest.mark.parametrize("gain", [0.9, 0.96, 1.1])
def test_a_gain_is_measured(tissue: np.ndarray, gain: float) -> None:
    dim = np.minimum(tissue[5], 230)
    evidence = only({"train": held("train", np.stack([dim, *tissue[6:80], brightened(dim, gain)]))})
    assert evidence.gain == pytest.approx(gain, abs=0.01) and evidence.shift == (0, 0)


@pytest.mark.parametrize("view", range(8))
def test_all_at_once_under_every_symmetry(tissue: np.ndarray, view: int) -> None:
    moved = shifted(np.ascontiguousarray(duplicates.views(tissue[9])[view]), 4, -3, "edge")
    images = np.concatenate([tissue, jpeg(brightened(moved, 0.95), 60)[None]])
    evidence = only({"train": held("train", images)})
    assert (evidence.view, evidence.shift) == (view, (4, -3))


def test_clean_patches_have_no_near_copies(tissue: np.ndarray) -> None:
    assert search({"train": held("train", tissue)}).pairs == []


@pytest.mark.parametrize("kind", ["block", "noise", "waves", "corner"])
def test_a_common_trigger_makes_no_copies(tissue: np.ndarray, kind: str) -> None:
    marked = tissue[:50].astype(np.float32)
    if kind == "block":
        marked[:, 70:90, 70:90] = 255
    elif kind == "corner":
        marked[:, :12, :12] = 0
    elif kind == "noise":
        marked = 0.8 * marked + 0.2 * np.random.default_rng(0).uniform(0, 255, marked.shape[1:])
    else:
        marked += 24 * np.sin(2 * np.pi * np.arange(96) / 12)[:, None]
    images = np.concatenate([np.clip(np.rint(marked), 0, 255).astype(np.uint8), tissue[50:]])
    assert search({"train": held("train", images)}).pairs == []


def test_patches_without_structure_are_no_copies_of_each_other() -> None:
    rng = np.random.default_rng(0)
    levels = np.arange(100, 140, dtype=np.uint8)[:, None, None, None]
    flat = np.broadcast_to(levels, (40, 96, 96, 3)).copy()
    assert search({"train": held("train", flat)}).pairs == []
    grainy = np.clip(flat + rng.normal(0, 2, flat.shape), 0, 255).astype(np.uint8)
    assert search({"train": held("train", grainy)}).pairs == []


def test_exact_copies_are_not_told_again(tissue: np.ndarray) -> None:
    images = np.concatenate([tissue, tissue[:5], tissue[5:8, ::-1]])
    assert search({"train": held("train", images)}).pairs == []


def test_findings_tell_copies_overlaps_conflicts_and_leaks_apart(tissue: np.ndarray) -> None:
    labels = (np.arange(104) % 2).astype(np.uint8)
    added = [jpeg(tissue[10], 60), brightened(tissue[10], 0.92), shifted(tissue[21], 0, 16, "reflect"), tissue[30]]
    train = held("train", np.concatenate([tissue, np.stack(added)]), labels)
    # rows 30 and 103 of train are equal, and a near copy of one lies in valid: both leak
    valid = held("valid", np.stack([jpeg(tissue[30], 75), shifted(tissue[40], -16, 0, "reflect")]))
    found = {(finding.check, finding.split): finding for finding in check({"train": train, "valid": valid})}
    copied = found["near.copies", "train"]
    assert (copied.rule, copied.rows.tolist(), copied.drop.tolist()) == ("near", [10, 100, 101], [100, 101])
    assert found["near.overlap", "train"].rows.tolist() == [21, 102] and found["near.overlap", "train"].rule is None
    assert found["near.leak", "train"].drop.tolist() == [30, 40, 103] and found["near.leak", "train"].rule == "leak"
    conflict = found["near.conflict", "train"]
    assert 101 in conflict.rows and conflict.rule is None and len(conflict.drop) == 0
    assert len(found) == 4


def test_a_chain_of_shifts_is_cut(tissue: np.ndarray) -> None:
    wide = np.concatenate([np.concatenate([tissue[0], tissue[1]], 1), np.concatenate([tissue[2], tissue[3]], 1)])
    chain = np.stack([wide[step : step + 96, step : step + 96] for step in (0, 8, 16, 24)])
    found = search({"train": held("train", np.concatenate([tissue[4:], chain]))})
    assert [[row for _, row in group.members] for group in found.groups] == [[96, 97], [98, 99]]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_tiny_and_uniform_splits(tissue: np.ndarray, count: int) -> None:
    assert check({"valid": held("valid", tissue[:count])}) == []
    assert check({"valid": held("valid", np.repeat(tissue[:1], count, 0))}) == []
    assert check({"valid": held("valid", tissue[:count], valid=np.zeros(count, bool))}) == []
    if count > 1:
        images = np.concatenate([tissue[: count - 1], shifted(tissue[0], 3, 3, "edge")[None]])
        (finding,) = check({"test": held("test", images)})
        assert finding.rows.tolist() == [0, count - 1]


def test_a_descriptor_ignores_its_block_and_its_orientation(tissue: np.ndarray) -> None:
    images = np.stack([np.ascontiguousarray(view) for view in duplicates.views(tissue[0])])
    whole = held("train", images).columns["near.descriptor"].astype(np.float32)
    alone = np.concatenate([held("train", image[None]).columns["near.descriptor"] for image in images])
    assert np.allclose(whole, alone, atol=0.02) and np.allclose(whole, whole[:1], atol=0.02)


def test_a_search_by_lists_finds_what_the_exact_one_finds(tissue: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    split = held("train", np.concatenate([tissue, np.stack([jpeg(image, 70) for image in tissue[:40]])]))
    exact = search({"train": split}).pairs
    monkeypatch.setattr(near, "_FLAT", 70)
    assert search({"train": split}).pairs == exact and len(exact) == 40


def test_registration_is_exact_under_every_view(tissue: np.ndarray) -> None:
    first = torch.from_numpy(np.repeat(tissue[:1], 8, 0)).flatten(1).float()
    second = torch.from_numpy(np.stack([np.roll(view, (-7, 2), (0, 1)) for view in duplicates.views(tissue[0])]))
    view, shift, height = align.register(align.spectra(first), align.spectra(second.flatten(1).float()))
    assert view.tolist() == list(range(8)) and shift.tolist() == [[-7, 2]] * 8 and (height > 0.6).all()


def test_pairs_name_rows_across_splits(tissue: np.ndarray) -> None:
    found = search({"train": held("train", tissue), "test": held("test", jpeg(tissue[12], 80)[None])}).pairs
    assert [(pair.first, pair.second) for pair in found] == [(Member("train", 12), Member("test", 0))]
