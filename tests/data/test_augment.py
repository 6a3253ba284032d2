"""D4 is the group it should be, stain is gentle, and a patch's draw depends on (seed, epoch, row) alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pcamlib.data.augment import augment, d4, random_d4, random_shift, random_stain
from pcamlib.data.loader import Loader
from pcamlib.data.patches import open_split


@pytest.fixture
def batch(images: np.ndarray) -> torch.Tensor:
    """(30, 96, 96, 3) uint8."""
    return torch.from_numpy(images)


def test_d4_is_a_group_that_acts_exactly() -> None:
    square = torch.arange(2 * 6 * 6 * 3).view(2, 6, 6, 3)
    orbit = [d4(square, element) for element in range(8)]
    assert orbit[0].equal(square)
    assert all(not one.equal(other) for one, other in itertools.combinations(orbit, 2))
    table = np.zeros((8, 8), int)
    for first, second in itertools.product(range(8), repeat=2):
        (table[first, second],) = [k for k in range(8) if d4(d4(square, first), second).equal(orbit[k])]
    for element in range(8):  # each row and column a permutation: inverses exist and restore every byte
        assert sorted(table[element]) == sorted(table[:, element]) == list(range(8))
        assert sum(table[element] == 0) == 1
    assert (table != table.T).any(), "D4 is not commutative"


def test_random_d4_gives_each_patch_its_own_element(batch: torch.Tensor) -> None:
    draw = (np.arange(30) % 8 + 0.5) / 8
    turned = random_d4(batch, draw)
    assert turned.dtype == torch.uint8
    for row in range(30):
        assert turned[row].equal(d4(batch[row : row + 1], row % 8)[0])
    assert random_d4(batch, np.full(30, 1 - 2**-53))[0].equal(d4(batch[:1], 7)[0])


def test_all_elements_are_equally_likely() -> None:
    corner = torch.arange(8, dtype=torch.uint8).repeat(3, 1).T.reshape(1, 2, 4, 3)[:, :, :2].expand(4000, 2, 2, 3)
    turned = augment(corner.contiguous(), ["d4"], 0, 0, np.arange(4000), 0.0)
    _, counts = torch.unique(turned.flatten(1), dim=0, return_counts=True)
    assert len(counts) == 8 and (counts - 500).abs().max() < 100


def test_stain_keeps_form_and_is_gentle(batch: torch.Tensor) -> None:
    draws = np.random.default_rng(0).random((30, 6))
    stained = random_stain(batch, draws, 0.05)
    assert stained.shape == batch.shape and stained.dtype == torch.uint8
    shift = (stained.float() - batch.float()).flatten(1).mean(1).abs()
    assert 0.5 < shift.mean() < 20
    heavy = (random_stain(batch, draws, 0.2).float() - batch.float()).abs().mean()
    assert heavy > 2 * (stained.float() - batch.float()).abs().mean()


def test_stain_of_strength_0_is_the_identity() -> None:
    every = torch.cartesian_prod(*[torch.arange(0, 256, 5, dtype=torch.uint8)] * 3)[: 52 * 52 * 52].view(1, 52, -1, 3)
    same = random_stain(every, np.random.default_rng(0).random((1, 6)), 0.0)
    assert (same.int() - every.int()).abs().max() <= 1


@pytest.mark.parametrize("names", [["d4"], ["stain"], ["d4", "stain"]])
def test_draw_depends_on_seed_epoch_and_row_alone(names: list[str], batch: torch.Tensor) -> None:
    rows = np.arange(100, 130)
    whole = augment(batch, names, 5, 2, rows, 0.1)
    torch.manual_seed(1)  # global state plays no part
    np.random.seed(1)
    shuffled = np.random.default_rng(0).permutation(30)
    assert augment(batch[shuffled], names, 5, 2, rows[shuffled], 0.1).equal(whole[shuffled])
    for size in (1, 7):
        parts = [augment(batch[i : i + size], names, 5, 2, rows[i : i + size], 0.1) for i in range(0, 30, size)]
        assert torch.cat(parts).equal(whole)
    for seed, epoch, index in ((6, 2, rows), (5, 3, rows), (5, 2, rows + 1)):
        assert not augment(batch, names, seed, epoch, index, 0.1).equal(whole)


def test_no_names_is_no_work(batch: torch.Tensor) -> None:
    assert augment(batch, [], 0, 0, np.arange(30), 0.1) is batch


def test_a_shift_moves_whole_pixels_and_mirrors_the_border() -> None:
    images = torch.randint(0, 256, (40, 12, 12, 3), dtype=torch.uint8)
    draws = np.random.default_rng(0).random((40, 2))
    moved = random_shift(images, draws, 3)
    padded = np.pad(images.numpy(), ((0, 0), (3, 3), (3, 3), (0, 0)), mode="reflect")
    corners = (draws * 7).astype(int)
    assert {0, 6} <= set(corners.ravel().tolist()), "the largest moves happen"
    for number, (top, left) in enumerate(corners):
        assert np.array_equal(moved[number].numpy(), padded[number, top : top + 12, left : left + 12])


def test_a_shift_is_keyed_by_the_patch_and_taken_before_the_view(synthetic_dir: Path) -> None:
    train = open_split(synthetic_dir, "train")

    def batch(size: int, **options: Any) -> tuple[np.ndarray, torch.Tensor]:
        loader = Loader(train, batch_size=size, sampler="sequential", augmentations=["shift"], **options)
        first = next(iter(loader))
        return first.rows, first.images.permute(0, 2, 3, 1)

    rows, whole = batch(64)
    assert torch.equal(batch(16)[1], whole[:16]), "whatever the batch"
    _, inner = batch(64, view=lambda images: images[:, 32:64, 32:64])
    assert torch.equal(inner, whole[:, 32:64, 32:64]), "pixels from outside the view move into it"
    assert not torch.equal(whole, torch.from_numpy(np.array(train.images[rows])))
    still = batch(64, shift=1)[1]
    assert not torch.equal(still, whole), "the size of the move is a setting"
