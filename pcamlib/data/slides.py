"""Which slide each patch comes from, as the meta file of its split says."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from pcamlib.data.layout import split_path
from pcamlib.errors import DataError

#: Columns that tell whose tissue a row is, the official one first.
COLUMNS = ("wsi", "slide", "slide_id", "case", "case_id", "patient", "patient_id")

_FILE = re.compile(r"\.(tiff?|svs|ndpi|mrxs|scn)$", re.IGNORECASE)  # s003.tif is slide s003


def read_slides(folder: str | Path, split: str, count: int) -> np.ndarray | None:
    """Slide of each row from a split's meta file, `.csv` or `.csv.gz`.

    Args:
        folder: where the official files lie.
        split: its name.
        count: rows of the split.

    Returns:
        (N,) names, "" where the cell is empty; None without a meta file.

    Raises:
        DataError: another number of rows, no column of slides or cases, or no readable CSV.
    """
    plain = split_path(folder, split, "meta")
    path = plain if plain.is_file() else plain.with_name(plain.name + ".gz")
    if not path.is_file():
        return None
    opener: Any = open if path == plain else gzip.open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as handle:
            table = csv.reader(handle)
            header = next(table, [])
            names = [name.strip().lower() for name in header]
            column = next((names.index(name) for name in COLUMNS if name in names), None)
            if column is None:
                raise DataError(f"{path}: no column {' or '.join(COLUMNS)}; found {', '.join(header)}")
            found = [row[column].strip() if len(row) > column else None for row in table if row]
    except (OSError, EOFError, zlib.error, ValueError, csv.Error) as error:
        raise DataError(f"{path}: not a readable CSV table ({error}); fetch it again") from None
    if len(found) != count:
        raise DataError(f"{path}: {len(found):,} rows for {count:,} patches; they must match row by row")
    if None in found:
        raise DataError(f"{path}: row {found.index(None)} has no {header[column]}")
    return np.array([_FILE.sub("", name or "") for name in found])
