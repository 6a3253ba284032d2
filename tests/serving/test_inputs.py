"""What cannot be reached is named, never left out in silence."""

from __future__ import annotations

import gzip
import os
import shutil
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest

from pcamlib.errors import DataError
from pcamlib.serving import inputs


def find(*given: Path) -> tuple[list[str], list[str]]:
    """Names that were found, lines of what was not reached."""
    refused: list[str] = []
    return [path.name for path in inputs.find(given, print, refused)], refused


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_links_and_what_is_no_file_are_named_beside_the_pictures(tmp_path: Path) -> None:
    folder, other = tmp_path / "many", tmp_path / "other"
    touch(folder, "a.png", "b.png", ".hidden.png")
    touch(other, "c.png")
    for name, target in (("x.png", "gone.png"), ("loop.png", "loop.png"), ("sub", other), (".cache", other)):
        (folder / name).symlink_to(target)
    (folder / "good.png").symlink_to(other / "c.png")
    os.mkfifo(folder / "pipe.png")
    found, refused = find(folder)
    assert found == ["a.png", "b.png", "good.png"]
    assert sorted(line.split(": ")[0] for line in refused) == sorted(
        str(folder / name) for name in ("x.png", "loop.png", "sub", "pipe.png")
    )
    said = "\n".join(refused)
    assert "x.png: cannot be reached (No such file or directory); look at links and permissions" in said
    assert "loop.png: cannot be reached (Too many levels of symbolic links)" in said
    assert "sub: a link to a folder, which is not followed; give that folder itself" in said
    assert "pipe.png: is no file" in said


def test_a_folder_of_nothing_but_broken_links_names_the_first(tmp_path: Path) -> None:
    touch(tmp_path / "many")
    (tmp_path / "many" / "x.png").symlink_to("gone.png")
    with pytest.raises(DataError, match=r"x\.png: cannot be reached"):
        find(tmp_path / "many")


def test_a_name_that_the_system_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"a\.png: cannot be reached \(File name too long\)"):
        find(Path("a" * 300 + ".png"))

    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", denied)
    with pytest.raises(DataError, match=r"a\.png: cannot be reached \(Permission denied\)"):
        find(tmp_path / "a.png")


def test_what_may_not_be_searched_is_named_and_the_rest_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "many", "a.png")
    touch(tmp_path / "many" / "closed", "b.png")
    touch(tmp_path / "many" / "listed", "c.png")
    scandir, stat = os.scandir, Path.stat  # root may search every folder

    def closed(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    def listed(path: Path, **options: bool) -> os.stat_result:
        if path.parent.name == "listed":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "scandir", closed)
    monkeypatch.setattr(Path, "stat", listed)
    found, refused = find(tmp_path / "many")
    assert found == ["a.png"] and len(refused) == 2
    assert any(line.startswith(f"{tmp_path / 'many' / 'closed'}: cannot be reached (Perm") for line in refused)
    assert any(line.startswith(f"{tmp_path / 'many' / 'listed' / 'c.png'}: cannot be reached") for line in refused)


@pytest.mark.parametrize("x_end", ["", ".gz"])
@pytest.mark.parametrize("y_end", ["", ".gz"])
def test_labels_beside_are_found_packed_or_not(tmp_path: Path, x_end: str, y_end: str) -> None:
    for key, end, rows in (("x", x_end, np.ones((3, 96, 96, 3), np.uint8)), ("y", y_end, np.ones((3, 1, 1, 1), "u1"))):
        path = tmp_path / f"s_{key}.h5"
        with h5py.File(path, "w") as file:
            file[key] = rows
        if end:
            with open(path, "rb") as plain, gzip.open(f"{path}.gz", "wb") as packed:
                shutil.copyfileobj(plain, packed)
            path.unlink()
    labels = next(inputs.pieces(tmp_path / f"s_x.h5{x_end}")).labels
    assert labels is not None and labels.tolist() == [1, 1, 1]


def test_labels_that_cannot_be_reached_are_not_left_out(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "s_x.h5", "w") as file:
        file["x"] = np.ones((3, 96, 96, 3), np.uint8)
    (tmp_path / "s_y.h5").symlink_to("gone.h5")
    with pytest.raises(DataError, match=r"s_y\.h5: cannot be read"):
        next(inputs.pieces(tmp_path / "s_x.h5"))


def test_labels_are_counted_before_they_are_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.ones((2, 96, 96, 3), np.uint8)
        file.create_dataset("y", (1 << 40, 1, 1, 1), np.uint8, chunks=(1 << 16, 1, 1, 1))  # 1 TiB, not a byte stored
    with pytest.raises(DataError, match=r"a\.h5: 2 patches but 1,099,511,627,776 labels; they must match"):
        next(inputs.pieces(tmp_path / "a.h5"))


def test_patches_of_nothing_but_nan_are_odd_without_a_warning(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.full((3, 96, 96, 3), np.nan, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert next(inputs.pieces(tmp_path / "a.h5")).odd == 3
