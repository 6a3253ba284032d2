"""Features: each number is what its name says, on any pixels; groups and flags come where there are some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import rgb_to_hsv
from scipy import ndimage, stats

from pcamlib.data import measure
from pcamlib.data.augment import STAINS
from pcamlib.data.patches import Patches, mask_path, open_split
from pcamlib.data.slides import read_slides
from pcamlib.data.synthetic import generate
from pcamlib.errors import DataError
from pcamlib.experiments import features
from pcamlib.experiments.features import Column, Features
from pcamlib.files import write_json
from pcamlib.training.evaluate import Predictions

NAMES = [*measure.MEASURED, *(f"centre_{name}" for name in measure.CENTRED)]
CENTRE = np.zeros((96, 96), bool)
CENTRE[32:64, 32:64] = True


def measured(images: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of some patches by name."""
    values = measure.observe(0, images, images, np.zeros(len(images), np.uint8))["values"]
    return dict(zip(NAMES, values.T, strict=True))


def reference(image: np.ndarray, where: np.ndarray) -> dict[str, float]:
    """The features of the pixels `where`, in float64 and by their textbook definitions."""
    grey = image @ [0.299, 0.587, 0.114]
    unit = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    density = -np.log10((image + 1.0) / 256) @ np.linalg.inv(unit)
    inner = where.copy()
    inner[[0, -1]] = inner[:, [0, -1]] = False
    hue, _, _ = rgb_to_hsv(image[where].mean(0) / 255)
    levels = np.bincount((grey[where] // 4).astype(int))
    return {
        "brightness": grey[where].mean() / 255,
        "contrast": grey[where].std() / 255,
        "saturation": rgb_to_hsv(image / 255)[where, 1].mean(),
        "hue": hue * 360 - 300,
        "haematoxylin": density[where, 0].mean(),
        "eosin": density[where, 1].mean(),
        "white_share": (image[where].min(1) >= 220).mean(),
        "black_share": (image[where].max(1) <= 20).mean(),
        "sharpness": np.log10(1 + ndimage.laplace(grey)[inner].var()),
        "entropy": stats.entropy(levels, base=2),
    }


def stained(count: int, radius: float = 4, inside: np.ndarray = ~CENTRE | CENTRE) -> np.ndarray:
    """A pink patch with round purple nuclei, 12 px apart, the first `count` of the places that lie in `inside`."""
    image = np.full((96, 96, 3), (225, 160, 200), np.uint8)
    y, x = np.mgrid[:96, :96]
    places = [(i, j) for i in range(6, 96, 12) for j in range(6, 96, 12) if inside[i, j]]
    for i, j in places[:count]:
        image[(y - i) ** 2 + (x - j) ** 2 <= radius**2] = (90, 50, 130)
    return image


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Patches:
    folder = tmp_path_factory.mktemp("patches")
    generate(folder, sizes={"valid": 64}, report=lambda line: None)
    return open_split(folder, "valid")


@pytest.fixture(scope="module")
def images(patches: Patches) -> np.ndarray:
    """40 patches, so that one chunk of the measurement stays half full."""
    return np.array(patches.images[:40])


def test_measurements_follow_their_definitions(images: np.ndarray) -> None:
    found = measured(images)
    everywhere = np.ones((96, 96), bool)
    for i in (0, 17, 39):
        whole, centre, rest = (reference(images[i], where) for where in (everywhere, CENTRE, ~CENTRE))
        for name, value in whole.items():
            assert found[name][i] == pytest.approx(value, abs=2e-3 if name == "hue" else 2e-4), name
            if name in measure.CENTRED:
                assert found[f"centre_{name}"][i] == pytest.approx(centre[name] - rest[name], abs=3e-4), name


@pytest.mark.parametrize("level", [0, 1, 128, 254, 255])
def test_a_patch_of_one_grey_has_nothing_in_it(level: int) -> None:
    found = measured(np.full((2, 96, 96, 3), level, np.uint8))
    assert np.isfinite(list(found.values())).all()
    assert found["brightness"][0] == pytest.approx(level / 255, abs=1e-5)
    assert found["white_share"][0] == (level >= 220) and found["black_share"][0] == (level <= 20)
    empty = [name for name in NAMES if name.startswith("centre_")] + ["contrast", "saturation", "hue", "sharpness"]
    for name in [*empty, "entropy", "nuclei"]:
        assert found[name] == pytest.approx(0, abs=1e-3), name


def test_extreme_pixels_give_finite_numbers() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (3, 96, 96, 3), np.uint8)
    noise[1] = noise[1] > 127
    noise[2] = np.where(noise[2] > 127, 255, 0)
    assert np.isfinite(list(measured(noise).values())).all()


@pytest.mark.parametrize("radius", [3, 4, 5])
def test_nuclei_are_counted(radius: float) -> None:
    counts = np.array([0, 1, 5, 20, 40, 64])
    found = measured(np.stack([stained(count, radius) for count in counts]))["nuclei"]
    area = (96 * 0.972e-3) ** 2  # mm2
    assert np.abs(found * area - counts).max() <= 0.5


def test_centre_features_tell_the_centre_from_its_surround() -> None:
    found = measured(np.stack([stained(99, inside=CENTRE), stained(99, inside=~CENTRE)]))
    for name, sign in (("nuclei", 1), ("haematoxylin", 1), ("sharpness", 1), ("entropy", 1), ("brightness", -1)):
        first, second = sign * found[f"centre_{name}"]
        assert first > 0 > second, name


def test_blur_takes_sharpness(images: np.ndarray) -> None:
    blurred = np.stack([ndimage.gaussian_filter(image, (1, 1, 0)) for image in images])
    assert (measured(blurred)["sharpness"] < measured(images)["sharpness"] - 0.3).all()


def test_turning_and_mirroring_change_nothing(images: np.ndarray) -> None:
    found = measured(images)
    for turned in (np.rot90(images, 1, (1, 2)), images[:, :, ::-1], np.rot90(images, 2, (1, 2))):
        for name, values in measured(turned).items():
            same = np.isclose(values, found[name], rtol=1e-4, atol=1e-3)
            assert same.mean() >= 0.95, name  # a peak within rounding of the threshold may come or go


def test_a_patch_is_measured_alike_in_any_block(images: np.ndarray) -> None:
    found = measured(images)
    for name, values in measured(images[33:36]).items():
        assert values == pytest.approx(found[name][33:36], rel=1e-5, abs=1e-5), name


def test_a_split_is_measured_once(patches: Patches, monkeypatch: pytest.MonkeyPatch) -> None:
    found = features.of(patches)
    assert list(found.names) == [*NAMES, "stain", "slide"] and len(found) == len(patches) == 64
    assert found.fingerprint == patches.fingerprint and found.index.tolist() == list(range(64))
    assert all(column.about and (column.unit or column.kind != "number") for column in found.columns)
    assert set(found["stain"]) == {0, 1, 2, 3}
    means = [found["haematoxylin"][found["stain"] == stain].mean() for stain in range(4)]
    assert means == sorted(means)

    def again(*block: object) -> dict[str, np.ndarray]:
        raise AssertionError("measured twice")

    monkeypatch.setattr(measure, "observe", again)
    assert (features.of(patches).values == found.values).all()


def test_stains_do_not_hang_on_the_order_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    density = rng.normal(rng.integers(0, 4, (300, 1)), 0.1, (300, 3)).astype(np.float32)
    order, valid = rng.permutation(300), np.ones(300, bool)
    assert (features._stain(density, valid)[order] == features._stain(density[order], valid)).all()


def test_slides_become_a_group(patches: Patches) -> None:
    told = read_slides(patches.stored.path.parent, patches.split, len(patches))  # the meta file beside the patches
    assert told is not None
    assert (features.of(patches)["slide"] == np.unique(told, return_inverse=True)[1]).all()
    names = np.array(["b", "a", "c", "a"] * 16)
    found = features.of(patches, names)
    assert found["slide"][:4].tolist() == [1, 0, 2, 0] and found.columns[found.names.index("slide")].kind == "group"
    assert "slide" not in features.of(patches, np.full(64, "a")).names
    with pytest.raises(DataError, match="3 slide names for 64 patches"):
        features.of(patches, names[:3])


def test_flags_come_where_there_are_some(tmp_path: Path, make_split: Callable[..., None]) -> None:
    make_split(tmp_path, "valid", 40, 0, nan=(3, 7))
    patches = open_split(tmp_path, "valid")
    found = features.of(patches)
    assert [name for name in found.names if name.startswith(("flag", "audit"))] == ["flag_nan"]
    assert np.flatnonzero(found["flag_nan"]).tolist() == [3, 7]
    rules = {"poison": [1, 5], "near": [], "labels": [2], "conflicts": [4]}
    about = {"fingerprint": patches.fingerprint, "beside": {}, "rules": rules}
    write_json(mask_path(patches.stored), about)
    found = features.of(patches)  # suspect labels are found by the labels: no slice may be defined by them
    assert [name for name in found.names if name.startswith("audit")] == ["audit_poison"]
    assert np.flatnonzero(found["audit_poison"]).tolist() == [1, 5]


def table(values: np.ndarray) -> Features:
    columns = tuple(Column(name, "", "number", "made up") for name in ("brightness", "hue"))
    return Features("valid", "f" * 64, np.arange(len(values)) * 2, columns, values)


def test_predicted_rows_are_found_in_their_order() -> None:
    found = table(np.arange(10, dtype=np.float32).reshape(5, 2))
    rows = np.array([2, 6, 8])
    predictions = Predictions("valid", "f" * 64, rows, np.zeros(3, np.uint8), np.zeros(3))
    mine = found.of(predictions)
    assert mine.index.tolist() == [2, 6, 8] and mine["hue"].tolist() == [3, 7, 9]
    for wrong, message in (
        (Predictions("train", "f" * 64, rows, predictions.label, predictions.probability), "not the same patches"),
        (Predictions("valid", "e" * 64, rows, predictions.label, predictions.probability), "not the same patches"),
        (Predictions("valid", "f" * 64, rows + 1, predictions.label, predictions.probability), "3 of 3 predicted rows"),
    ):
        with pytest.raises(DataError, match=message):
            found.of(wrong)


def test_a_broken_table_is_refused() -> None:
    values = np.zeros((5, 2), np.float32)
    with pytest.raises(DataError, match="not 5 rows of 2"):
        Features("valid", "f" * 64, np.arange(5), table(values).columns, values[:, :1])
    values[3, 1] = np.nan
    with pytest.raises(DataError, match="feature 'hue' of row 6 of split valid is nan"):
        table(values)
    with pytest.raises(DataError, match=r"no feature 'hu'.*'hue'"):
        table(np.zeros((5, 2), np.float32))["hu"]
