"""The explorer's widgets: they show what the view holds, and what is wrong is said, never raised in a callback."""

from __future__ import annotations

import base64
import io
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pcamlib.config import Model
from pcamlib.errors import DataError, EvidenceError
from pcamlib.experiments.explorer import Explorer, newest
from pcamlib.experiments.features import Column, Features
from pcamlib.experiments.slices import Bound, Slice
from pcamlib.experiments.view import Spec, picture, slice_view
from pcamlib.files import write_json, write_text
from pcamlib.models import build
from pcamlib.training.evaluate import Predictions
from pcamlib.training.runs import Run

N, PRINT = 400, "a" * 64


@pytest.fixture(scope="module")
def made() -> SimpleNamespace:
    """Noise patches and made-up features and probabilities of them; `dim` is where mistakes are."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, N).astype(np.uint8)
    dim, wide = rng.random(N), rng.normal(0, 5000, N)
    probability = 1 / (1 + np.exp(-(2.0 * label - 1) * (3 - 3 * dim) - rng.normal(size=N)))
    columns = [("dim", "number"), ("wide <b>", "number"), ("slide", "group"), ("flat", "number")]
    values = np.column_stack([dim, wide, rng.integers(0, 4, N), np.full(N, 7)]).astype(np.float32)
    images = rng.integers(0, 255, (N, 96, 96, 3), dtype=np.uint8)
    return SimpleNamespace(
        predictions=Predictions("valid", PRINT, np.arange(N), label, probability),
        features=Features("valid", PRINT, np.arange(N), tuple(Column(a, "", b, "") for a, b in columns), values),
        patches=SimpleNamespace(split="valid", fingerprint=PRINT, images=images, synthetic={"seed": 0}),
    )


def explorer(made: SimpleNamespace, **options: Any) -> Explorer:
    return Explorer(made.predictions, made.features, made.patches, **options)


def counts(shown: Explorer) -> dict[str, int]:
    """The exact numbers in the matrix, as a browser reads them."""
    return {name: int(n) for name, n in re.findall(r'data-cell="(\w\w)" data-count="(\d+)"', shown.matrix.value)}


def expected(made: SimpleNamespace, *bounds: Bound, **choice: Any) -> Any:
    return slice_view(made.predictions, made.features, Spec(bounds=Slice(bounds), **choice))


def captions(shown: Explorer) -> list[str]:
    return [tile.children[1].description for tile in shown.tiles if tile.layout.display != "none"]


def test_the_threshold_moves_the_matrix(made) -> None:
    shown = explorer(made)
    assert counts(shown) == expected(made).counts
    shown.threshold.value = 0.3
    assert counts(shown) == expected(made, threshold=0.3).counts != expected(made).counts
    assert "400 of 400 synthetic patches" in shown.matrix.value and 'data-threshold="0.3"' in shown.matrix.value


def test_a_feature_is_narrowed_within_its_own_range(made) -> None:
    shown = explorer(made)
    dim, other = shown.filters
    dim.feature.value = "dim"
    values = made.features["dim"]
    assert dim.range.min <= values.min() and values.max() <= dim.range.max and dim.range.step == 0.001
    assert dim.range.readout_format == ".3f" and counts(shown) == expected(made).counts  # nothing is cut off yet
    dim.range.value = (0.25, dim.range.max)
    assert counts(shown) == expected(made, Bound("dim", low=0.25)).counts
    other.feature.value = "wide <b>"
    assert other.range.step == 100 and other.range.readout_format == ".0f"
    other.range.value = (-3000.0, 3000.0)
    assert shown.spec.bounds == Slice((Bound("dim", low=0.25), Bound("wide <b>", -3000.0, 3000.0)))
    assert counts(shown) == expected(made, *shown.spec.bounds.bounds).counts and "<b> -3e" not in shown.matrix.value
    dim.feature.value = ""
    assert counts(shown) == expected(made, Bound("wide <b>", -3000.0, 3000.0)).counts


def test_a_group_is_chosen_whole(made) -> None:
    shown = explorer(made)
    shown.filters[0].feature.value = "slide"
    shown.filters[0].range.value = (1, 1)
    assert shown.spec.bounds == Slice((Bound("slide", 1, 2),))
    assert shown.view.n == (made.features["slide"] == 1).sum()
    shown.filters[0].range.value = (2, 3)
    assert shown.view.n == (made.features["slide"] >= 2).sum()


def test_a_given_slice_and_a_range_are_intersected_to_one_bound_a_feature(made) -> None:
    shown = explorer(made, slices={"dim": Slice((Bound("dim", low=0.5),))})
    shown.slice.value = Slice((Bound("dim", low=0.5),))
    assert counts(shown) == expected(made, Bound("dim", low=0.5)).counts
    shown.filters[0].feature.value = "dim"
    shown.filters[0].range.value = (0.2, 0.8)
    assert shown.spec.bounds == Slice((Bound("dim", 0.5, 0.8),))


def test_what_is_shown_first_can_be_chosen(made) -> None:
    first = Spec(0.4, Slice((Bound("dim", low=0.7),)), "false positives", size=3)
    shown = explorer(made, spec=first)
    assert shown.spec == first and len(captions(shown)) == 3
    assert shown.slice.label == "dim >= 0.7"


def test_the_gallery_turns_its_pages_of_mistakes(made) -> None:
    shown = explorer(made)
    mistakes = expected(made).mistakes
    said = [f"row {row}: {made.predictions.probability[row]:.3f}" for row in mistakes]
    assert captions(shown) == said[:12] and shown.page.max == -(-len(mistakes) // 12) > 1
    assert shown.tiles[0].children[0].value == picture(made.patches.images[mistakes[0]])
    shown.page.value = shown.page.max
    assert captions(shown) == said[12 * (shown.page.max - 1) :]
    shown.show.value = "false positives"
    assert shown.page.value == 1 and captions(shown)[0].startswith(
        f"row {expected(made, show='false positives').mistakes[0]}:"
    )
    shown.threshold.value = 1.0
    assert captions(shown) == [] and "0 false positives" in shown.pages.value


def test_a_click_shows_the_patch_its_features_saliency_and_neighbours(made) -> None:
    torch.manual_seed(0)
    model = build(Model(name="mlp", crop=32, hidden_units=[4]), {"mean": [128.0] * 3, "std": [50.0] * 3}).eval()
    vectors = made.features.values[:, :1] + np.array([[1, 0]], np.float32)
    shown = explorer(made, model=model, embedding=vectors)
    row = int(expected(made).mistakes[2])
    shown.tiles[2].children[1].click()
    large = shown.large.value
    assert f'data-row="{row}"' in large and f"row {row}: tumour<br>called normal" in large
    assert f"<th>dim<td>{made.features['dim'][row]:.4g}" in large and "wide &lt;b&gt;" in large
    images = [Image.open(io.BytesIO(base64.b64decode(png))) for png in re.findall(r"base64,([^\"]+)", large)]
    assert [image.size for image in images] == [(288, 288)] * 2 + [(96, 96)] * 6
    plain, heat = (np.asarray(image).astype(int) for image in images[:2])
    changed = (plain != heat).any(2)
    assert changed[97:191, 97:191].any() and not changed[:95].any()  # the model looks at the centre alone
    shown.threshold.value = 0.4
    assert shown.large.value == ""  # it may be no mistake any more


def test_a_slice_is_saved_with_its_row_and_what_was_saved_is_said(made) -> None:
    kept: list[Any] = []
    shown = explorer(made, on_save=lambda *what: kept.append(what) or f"'{what[0]}' is <kept>")
    shown.filters[0].feature.value = "dim"
    shown.filters[0].range.value = (0.6, shown.filters[0].range.max)
    shown.threshold.value = 0.45
    shown.name.value = " dim ones "
    shown.save.click()
    (name, spec, row), bound = kept[0], Bound("dim", low=0.6)
    assert name == "dim ones" and spec == Spec(0.45, Slice((bound,)))
    assert row["n"] == expected(made, bound).n and row["name"] == name and row["threshold"] == 0.45
    assert "&#x27;dim ones&#x27; is &lt;kept&gt;" in shown.said.value


@pytest.mark.parametrize(
    ("name", "feature", "ends", "said"),
    [
        ("", "dim", (0.5, 0.9), "give the slice a name"),
        ("all", "", None, "every patch is inside"),
        ("few", "dim", (0.5, 0.501), "fewer than 20 say nothing"),
        ("flat", "flat", None, "there is no slice to save"),
        ("empty", "dim", (0.5, 0.5), "there is no slice to save"),
    ],
)
def test_a_slice_that_says_nothing_is_not_saved_and_the_reason_is_said(made, name, feature, ends, said) -> None:
    kept: list[Any] = []
    shown = explorer(made, on_save=lambda *what: kept.append(what) or "")
    shown.filters[0].feature.value = feature
    if ends:
        shown.filters[0].range.value = ends
    shown.name.value = name
    shown.save.click()
    assert said in shown.said.value and "pcam-error" in shown.said.value and kept == []


@pytest.mark.parametrize("error", [EvidenceError("twice"), PermissionError(13, "Permission denied")])
def test_where_saving_fails_the_reason_is_said(made, error) -> None:
    def fail(*what: Any) -> str:
        raise error

    shown = explorer(made, on_save=fail, spec=Spec(0.5, Slice((Bound("dim", low=0.5),))))
    shown.name.value = "dim"
    shown.save.click()
    assert str(error).split()[-1] in shown.said.value


def test_a_bad_choice_empties_the_view_until_it_is_mended(made) -> None:
    shown = explorer(made)
    shown.filters[0].feature.value = "flat"
    assert "flat is 7 in every patch" in shown.said.value and shown.matrix.value == "" and captions(shown) == []
    shown.filters[0].feature.value = "dim"
    shown.filters[0].range.value = (0.5, 0.5)
    assert "holds nothing" in shown.said.value and shown.matrix.value == ""
    shown.filters[0].range.value = (0.5, 0.9)
    assert shown.said.value == "" and counts(shown) == expected(made, Bound("dim", 0.5, 0.9)).counts


def test_tables_of_other_patches_are_refused(made) -> None:
    for change, said in [
        ({"patches": SimpleNamespace(split="train", fingerprint="b" * 64)}, "not those that were predicted"),
        ({"features": replace(made.features, split="train")}, "not the same patches"),
    ]:
        with pytest.raises(DataError, match=said):
            explorer(SimpleNamespace(**{**vars(made), **change}))
    with pytest.raises(DataError, match="3 embedded patches, but 400 predictions"):
        explorer(made, embedding=np.zeros((3, 2), np.float32))
    values = np.column_stack([made.features.values, made.predictions.probability]).astype(np.float32)
    told = Features("valid", PRINT, np.arange(N), (*made.features.columns, Column("score", "", "number", "")), values)
    with pytest.raises(DataError, match="'score' is the prediction under another name"):
        explorer(SimpleNamespace(**{**vars(made), "features": told}))


def test_without_a_front_end_it_still_displays(made) -> None:
    shown = explorer(made)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in shown and len(shown["text/plain"]) < 200


def test_the_newest_run_of_these_patches_is_found(tmp_path: Path, made) -> None:
    assert newest(tmp_path / "none", PRINT) is None
    for age, (name, fingerprint, finished) in enumerate(
        [("open", PRINT, False), ("other", "b" * 64, True), ("late", PRINT, True), ("early", PRINT, True)]
    ):
        run = Run(tmp_path / name)
        write_text(run.path / "config.yaml", "")
        write_text(run.best, "")
        replace(made.predictions, fingerprint=fingerprint).save(run.path / "predictions_valid.npz")
        if finished:
            write_json(run.path / "SUCCESS", {"steps": age})
            os.utime(run.path / "SUCCESS", (1000 - age, 1000 - age))
    assert newest(tmp_path, PRINT).name == "late"
    assert newest(tmp_path, "c" * 64) is None
