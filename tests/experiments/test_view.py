"""The explorer's view: counts by hand, intervals that hold, the most confident mistakes first, bad input refused."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pcamlib.errors import DataError
from pcamlib.experiments.features import Column, Features
from pcamlib.experiments.slices import LEAST, Bound, Slice, describe, wilson
from pcamlib.experiments.view import Spec, claim, picture, plot_gallery, plot_view, slice_view, standing
from pcamlib.training.evaluate import Predictions

COLUMNS = (Column("blur", "", "number", "made up"), Column("slide", "", "group", "made up"))


def made(n: int = 600, seed: int = 0) -> tuple[Predictions, Features]:
    """Every second row of a split, predicted worse where `blur` is low."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, n).astype(np.uint8)
    blur, slide = rng.random(n), rng.integers(0, 3, n)
    probability = 1 / (1 + np.exp(-(2.0 * label - 1) * (0.5 + 3 * blur) - rng.normal(size=n)))
    index = 2 * np.arange(n)
    values = np.column_stack([blur, slide]).astype(np.float32)
    return Predictions("valid", "f" * 64, index, label, probability), Features(
        "valid", "f" * 64, index, COLUMNS, values
    )


def test_the_counts_are_those_of_a_loop() -> None:
    p, features = made()
    spec = Spec(0.4, Slice((Bound("blur", high=0.5), Bound("slide", 1, 2))))
    view, counts = slice_view(p, features, spec), {"tn": 0, "fp": 0, "fn": 0, "tp": 0}
    for label, probability, (blur, slide) in zip(p.label, p.probability, features.values, strict=True):
        if blur < 0.5 and slide == 1:
            right = (probability >= 0.4) == label
            counts[("t" if right else "f") + ("p" if probability >= 0.4 else "n")] += 1
    assert view.counts == counts and view.n == sum(counts.values()) == view.inside.sum() > 0


def test_the_rates_carry_their_intervals_and_stand_beside_the_constants_and_the_rest() -> None:
    p, features = made()
    bounds = Slice((Bound("blur", high=0.3),))
    view, row = slice_view(p, features, Spec(0.5, bounds)), describe(bounds, features, p)
    tn, fp, fn, tp = view.counts.values()
    assert view.rates["recall"][:3] == pytest.approx((tp / (tp + fn), *wilson(tp, tp + fn)))
    assert view.rates["precision"][:3] == pytest.approx((tp / (tp + fp), *wilson(tp, tp + fp)))
    assert view.rates["error"].value == row["error"] and list(view.rates["error"][1:3]) == row["error 95 %"]
    assert view.rates["specificity"].value == row["specificity"] and view.rates["specificity"].n == tn + fp
    assert view.cells["fp"].value == pytest.approx(1 - view.rates["specificity"].value)
    assert view.rest is not None and view.rest["matched"] == row["rest, matched"] < view.rates["error"].value
    model, tumour, normal = view.answers
    assert model["F2"] == row["F2"] and tumour["F2"] == row["always tumour F2"] and normal["F2"] == 0
    assert tumour["accuracy"] + normal["accuracy"] == pytest.approx(1)


def test_the_constants_explain_an_accuracy_of_99_percent_with_f2_0() -> None:
    label = (np.arange(200) < 2).astype(np.uint8)
    p = Predictions("valid", "f" * 64, np.arange(200), label, np.full(200, 0.1))
    features = Features("valid", "f" * 64, p.index, COLUMNS[:1], np.ones((200, 1), np.float32))
    model, _, normal = slice_view(p, features, Spec()).answers
    assert (model["accuracy"], model["F2"]) == (0.99, 0) == (normal["accuracy"], normal["F2"])


@pytest.mark.parametrize(("show", "label", "sign"), [("false negatives", 1, 1), ("false positives", 0, -1)])
def test_the_most_confident_mistakes_come_first(show, label, sign) -> None:
    p, features = made()
    view = slice_view(p, features, Spec(0.5, Slice((Bound("blur", high=0.6),)), show, size=10))
    found = view.mistakes
    assert len(found) == view.counts["fn" if label else "fp"] > 10
    assert (p.label[found] == label).all() and view.inside[found].all()
    assert (np.diff(sign * p.probability[found]) >= 0).all()
    pages = [view.page(number).tolist() for number in range(view.pages)]
    assert [one for page in pages for one in page] == found.tolist() and all(0 < len(page) <= 10 for page in pages)
    assert not len(view.page(view.pages))


def test_at_the_ends_of_the_threshold_everything_gets_one_answer() -> None:
    p, features = made()
    assert slice_view(p, features, Spec(0.0)).counts["fn"] == 0 == slice_view(p, features, Spec(0.0)).counts["tn"]
    view = slice_view(p, features, Spec(1.0))
    assert view.counts["tp"] == 0 and view.rates["precision"] == (None, 0.0, 1.0, 0)
    assert str(view.rates["precision"]) == "none"


def test_of_every_patch_there_is_no_rest() -> None:
    assert slice_view(*made(), Spec()).rest is None


def test_a_slice_of_three_patches_is_shown_but_not_claimed() -> None:
    p, features = made()
    cut = float(np.sort(features["blur"])[3])
    view = slice_view(p, features, Spec(0.5, Slice((Bound("blur", high=cut),))))
    assert view.n == 3 and "3 patches are too few" in view.warning
    assert plot_view(view).texts[-1].get_text() == view.warning
    with pytest.raises(DataError, match=f"holds 3 of 600 patches; fewer than {LEAST}"):
        claim("three", view, p, features)


def test_an_empty_slice_is_shown_too() -> None:
    p, features = made()
    view = slice_view(p, features, Spec(0.5, Slice((Bound("blur", low=2.0),))))
    assert view.n == 0 and view.answers == [] and view.rest is None and view.rates["error"].value is None
    assert plot_view(view).axes


def test_what_is_claimed_is_the_description_under_a_name() -> None:
    p, features = made()
    bounds = Slice((Bound("blur", high=0.3),))
    row = claim(" blurred ", slice_view(p, features, Spec(0.4, bounds)), p, features)
    assert row == {"name": "blurred", "threshold": 0.4, **describe(bounds, features, p, 0.4)}
    with pytest.raises(DataError, match="give the slice a name"):
        claim("  ", slice_view(p, features, Spec(0.4, bounds)), p, features)
    for bounds in (Slice(), Slice((Bound("blur", low=-1.0),))):
        with pytest.raises(DataError, match="every patch is inside"):
            claim("all", slice_view(p, features, Spec(0.4, bounds)), p, features)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"threshold": 1.2}, "threshold 1.2: a probability from 0 to 1"),
        ({"threshold": float("nan")}, "threshold nan"),
        ({"bounds": Slice((Bound("blurr", 0, 1),))}, "no feature 'blurr'; did you mean 'blur'"),
        ({"bounds": Slice((Bound("label", 0, 1),))}, "may not be defined by 'label'"),
        ({"bounds": Slice((Bound("blur", 0.5, 0.5),))}, "blur from 0.5 to 0.5 holds nothing"),
        ({"show": "false negative"}, "did you mean 'false negatives'"),
        ({"size": 0}, "0 patches a page"),
    ],
)
def test_a_bad_choice_is_refused_with_the_reason(spec, said) -> None:
    with pytest.raises(DataError, match=said):
        slice_view(*made(60), Spec(**spec))


def test_tables_of_other_patches_are_refused() -> None:
    p, features = made(60)
    for other in (replace(p, fingerprint="0" * 64), replace(p, index=p.index + 1), made(58)[0]):
        with pytest.raises(DataError, match="not of the same patches"):
            slice_view(other, features, Spec())
    holed = np.where(p.index == 10, np.nan, p.probability)
    with pytest.raises(DataError, match="row 10 of split valid is no number"):
        slice_view(replace(p, probability=holed), features, Spec())


def test_where_a_patch_stands_in_its_split() -> None:
    features = Features(
        "valid", "f" * 64, np.arange(4), COLUMNS, np.array([[1, 0], [2, 0], [2, 1], [9, 2]], np.float32)
    )
    blur, slide = standing(features, 1)
    assert blur == {"feature": "blur", "value": 2.0, "unit": "", "percentile": 50.0} and slide["percentile"] is None
    assert [standing(features, row)[0]["percentile"] for row in (0, 3)] == [12.5, 87.5]


def test_a_picture_is_the_patch_with_its_centre_framed() -> None:
    image = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    drawn = np.asarray(Image.open(io.BytesIO(picture(image, 3))))
    assert drawn.shape == (288, 288, 3)
    frame = (drawn == [0, 255, 0]).all(2)
    assert frame[95, 95:193].all() and frame[192, 95:193].all() and frame[95:193, 95].all() and frame[95:193, 192].all()
    inside = np.ones((288, 288), bool)
    inside[[95, 192], 95:193] = inside[95:193, [95, 192]] = False
    assert (drawn[inside] == image.repeat(3, 0).repeat(3, 1)[inside]).all()


def test_heat_changes_the_patch_where_it_is_and_nowhere_else() -> None:
    image, heat = np.full((96, 96, 3), 200, np.uint8), np.zeros((96, 96), np.float32)
    same = picture(image, 1, heat)
    assert same == picture(image, 1)  # no heat at all
    heat[10:20, 10:20] = 3e-5
    drawn = np.asarray(Image.open(io.BytesIO(picture(image, 1, heat)))).astype(int)
    changed = (abs(drawn - np.asarray(Image.open(io.BytesIO(same)))) > 0).any(2)
    assert changed[10:20, 10:20].all() and changed.sum() == 100


def test_the_figures_show_what_the_view_holds() -> None:
    p, features = made()
    view = slice_view(p, features, Spec(0.5, Slice((Bound("blur", high=0.3),))))
    figure = plot_view(view)
    said = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert all(f"{count}" in said for count in view.counts.values())
    assert "blur < 0.3; threshold 0.5" in figure.get_suptitle()
    assert view.series["tn, fp, fn, tp"] == list(view.counts.values())
    assert view.series["error of the rest, matched"] == [view.rest["matched"]]
    images = [np.zeros((96, 96, 3), np.uint8)] * 7
    axes = plot_gallery(images, [f"row {row}" for row in range(7)], columns=4).axes
    assert [axis.get_title() for axis in axes][:7] == [f"row {row}" for row in range(7)] and len(axes) == 8
    assert axes[0].patches[0].get_bbox().bounds == (31.5, 31.5, 32, 32)
    assert plot_gallery([], []).texts[0].get_text() == "no such mistakes"
