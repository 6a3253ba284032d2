"""Which data a command or notebook works on: a folder given, $PCAM_DATA, or synthetic patches made on the spot."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pcamlib.data.flaws import course_like, hidden_flaws, rare_flaws
from pcamlib.data.layout import split_path
from pcamlib.data.rewrite import Truth
from pcamlib.data.synthetic import described, generate
from pcamlib.errors import DataError
from pcamlib.sources import ROOT

SYNTHETIC = ROOT / "data" / "synthetic"
COURSE = ROOT / "data" / "synthetic-course"
FLAWED = ROOT / "data" / "synthetic-flawed"
RARE = ROOT / "data" / "synthetic-rare"


def data_folder(given: str | Path | None = None, report: Callable[[str], None] = print) -> Path:
    """The folder with the official files.

    Args:
        given: a folder; empty or None: $PCAM_DATA, and where that is unset the synthetic default (4,000 train,
            1,000 valid, 1,000 test patches), generated once.
        report: told when patches are being generated.

    Raises:
        DataError: the folder does not exist.
    """
    chosen = str(given or os.environ.get("PCAM_DATA") or "")
    if chosen:
        folder = Path(chosen).expanduser()
        folder = folder if folder.is_absolute() or folder.is_dir() else ROOT / folder
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; --data or PCAM_DATA must name the folder with the PCam files")
        return folder
    generate(SYNTHETIC, report=report)
    return SYNTHETIC


def course_folder(data: Path, given: str | Path | None = None) -> Path | None:
    """A folder with the course's kind of train file: `given`, $PCAM_COURSE, or a synthetic one beside synthetic data.

    Returns:
        None where the data are real and no course files are given: flaws are not planted into real patches.
    """
    chosen = str(given or os.environ.get("PCAM_COURSE") or "")
    if chosen:
        return data_folder(chosen)
    if data != SYNTHETIC:
        return None
    _made(COURSE, course_like)
    return COURSE


def flawed_folder(data: Path) -> Path | None:
    """Synthetic files with every hidden flaw and their `truth.json`; None where the data are real."""
    if data != SYNTHETIC:
        return None
    _made(FLAWED, hidden_flaws)
    return FLAWED


def rare_folder(data: Path) -> Path | None:
    """Synthetic files with a few rows of 1e5, NaN and flipped labels; None where the data are real."""
    if data != SYNTHETIC:
        return None
    _made(RARE, rare_flaws)
    return RARE


def _made(folder: Path, write: Callable[..., Truth]) -> None:
    source, made = (described(split_path(where, "train", "x")) for where in (SYNTHETIC, folder))
    if made != source or not (folder / "truth.json").exists():  # truth.json is written last
        write(SYNTHETIC, folder, seed=0)
