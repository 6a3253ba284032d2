"""The size mystery: bytes on disk = patches x values x bytes a value x bytes stored per raw byte x overhead.

Each factor is read from the file and set beside the official file's, so that the one that explains the ratio is named
and the others are refuted with the size that they predict.
"""

from __future__ import annotations

import math
import time
import zlib
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from pcamlib.audit.findings import Finding, Split
from pcamlib.data.fetch import OFFICIAL as PUBLISHED
from pcamlib.data.layout import PATCH_BYTES, SIDE, Stored
from pcamlib.errors import DataError

#: Patches in the official files: uint8, contiguous, not compressed.
OFFICIAL = {"train": 262_144, "valid": 32_768, "test": 32_768}

_HEADER = 2048  # bytes before the array in what h5py writes; nobody states the official files'
_SAMPLE = 64  # patches for what the values are and how well they compress
_BUDGET = 256 << 20  # bytes unpacked for that sample
_SLOW = (
    4  # times its own bytes that a patch may cost: at (64, 96, 96, 3), 64 times, h5py was 24 times slower than a map
)


@dataclass(frozen=True)
class Account:
    """What a file's bytes are made of; the product of `factors` is `size`.

    Attributes:
        rows: patches.
        values: numbers a patch.
        dtype: name of their type; `width`: bytes of one.
        stored: bytes that HDF5 has allocated for the array: 0 where nothing was ever written.
        size: length of the file; `disk`: bytes that it takes on the disk, fewer where it has holes.
        chunks: shape of a chunk, None for a contiguous array.
        compression: HDF5's filter, None without.
    """

    rows: int
    values: int
    dtype: str
    width: int
    stored: int
    size: int
    disk: int
    chunks: tuple[int, ...] | None = None
    compression: str | None = None

    @property
    def raw(self) -> int:
        """Bytes of the array in memory."""
        return self.rows * self.values * self.width

    @property
    def factors(self) -> dict[str, float]:
        """rows, values, bytes a value, bytes stored per raw byte (1: not compressed), bytes of file per stored byte."""
        stored = self.stored or self.size  # nothing allocated: the file is all overhead
        packed = {"stored per raw byte": stored / self.raw, "file per stored byte": self.size / stored}
        return {"patches": self.rows, "values a patch": self.values, "bytes a value": self.width, **packed}


def account(stored: Stored) -> Account:
    """Measure the factors of an x file.

    Raises:
        DataError: the file went away or is damaged.
    """
    try:
        with h5py.File(stored.path, "r") as file:
            allocated = int(file[stored.key].id.get_storage_size())
        status = stored.path.stat()
    except (OSError, KeyError) as error:
        raise DataError(f"{stored.path}: cannot be read ({error}); fetch or copy it again") from None
    values = math.prod(stored.shape[1:])
    return Account(
        stored.shape[0], values, stored.dtype.name, stored.dtype.itemsize, allocated, status.st_size,
        status.st_blocks * 512, stored.chunks, stored.compression,
    )  # fmt: skip


def official(split: str) -> Account:
    """The official file of a split: uint8, contiguous."""
    size = OFFICIAL[split] * PATCH_BYTES
    return Account(OFFICIAL[split], PATCH_BYTES, "uint8", 1, size, size + _HEADER, size + _HEADER)


def content(stored: Stored) -> dict[str, Any]:
    """What up to 64 evenly spaced patches hold, and how small they could be.

    Returns:
        `n` patches; `whole`: share of the values in 0..255 that are whole numbers; `inside`: share in 0..255 at all;
        `nan`: share of NaN; `low`, `high`: extremes of the finite values; and by form the bytes left of one raw byte:
        `uint8 gzip`, `float32 gzip` (level 4, a patch at a time, as a chunk of one patch would be), `float32 gzip
        shuffled` (bytes of equal weight together, HDF5's shuffle filter), `png` (deflate of differences to the left).

    Raises:
        DataError: the rows cannot be read.
    """
    patches = _read(stored)
    values = patches.astype(np.float32, copy=False)
    finite = np.isfinite(values)
    inside = finite & (values >= 0) & (values <= 255)
    bytes_ = np.where(inside, values, 0).round().astype(np.uint8)
    sub = bytes_.copy()
    sub[:, :, 1:] -= bytes_[:, :, :-1]
    forms: dict[str, tuple[np.ndarray, int]] = {
        "uint8 gzip": (bytes_, 4),
        "float32 gzip": (values, 4),
        "float32 gzip shuffled": (values.view(np.uint8).reshape(len(values), -1, 4).swapaxes(1, 2), 4),
        "png": (sub, 6),
    }
    packed = {
        name: sum(len(zlib.compress(patch.tobytes(), level)) for patch in form) / form.nbytes
        for name, (form, level) in forms.items()
    }
    return {
        "n": len(values),
        "whole": float((values[inside] == np.rint(values[inside])).mean()) if inside.any() else 0.0,
        "inside": float(inside.mean()),
        "nan": float(np.isnan(values).mean()),
        "low": float(values[finite].min()) if finite.any() else None,
        "high": float(values[finite].max()) if finite.any() else None,
        **packed,
    }


def _read(stored: Stored) -> np.ndarray:
    """Up to 64 patches from as many places as the layout lets one reach at a bounded cost."""
    count = min(_SAMPLE, stored.shape[0])
    places = int(np.clip(_BUDGET // reach(stored)[1], 1, count))
    starts = np.unique(np.linspace(0, stored.shape[0] - count // places, places).astype(np.int64))
    try:
        with h5py.File(stored.path, "r") as file:
            return np.concatenate([file[stored.key][start : start + count // places] for start in starts])
    except (OSError, KeyError) as error:
        raise DataError(f"{stored.path}: cannot be read ({error}); fetch or copy it again") from None


def reach(stored: Stored) -> tuple[int, int]:
    """Chunks that one patch touches, and bytes unpacked for it; (0, bytes of the patch) in a contiguous array."""
    if stored.chunks is None:
        return 0, stored.row_bytes
    touched = math.prod(-(-size // chunk) for size, chunk in zip(stored.shape[1:], stored.chunks[1:], strict=True))
    return touched, touched * math.prod(stored.chunks) * stored.dtype.itemsize


def compare(here: Account, there: Account, held: dict[str, Any] | None = None) -> dict[str, Any]:
    """Why a file is as large as it is beside the official one.

    Args:
        here: the file.
        there: the official one.
        held: `content` of the file; None leaves out how well it would compress.

    Returns:
        JSON-able: `sentence`; `factors`, one dict each with `factor`, `here`, `there`, `ratio` (their product is
        `ratio`); `explanations`, what people said, each with the bytes it predicts for this file and a `verdict`; and
        `saves`, the bytes that a contiguous uint8 file would save.
    """
    ratio = here.size / there.size
    factors = [
        {"factor": name, "here": value, "there": other, "ratio": value / other}
        for (name, value), other in zip(here.factors.items(), there.factors.values(), strict=True)
    ]
    return {
        "sentence": _sentence(here, there, factors, ratio),
        "ratio": ratio,
        "factors": factors,
        "explanations": _explanations(here, held),
        "saves": here.size - here.rows * here.values - _HEADER,
    }


def _sentence(here: Account, there: Account, factors: list[dict[str, Any]], ratio: float) -> str:
    sizes = f"{_bytes(here.size)} where the official file has {_bytes(there.size)}"
    if not here.stored:
        return f"{sizes}: nothing was ever written into the array, so every value reads as {here.dtype} 0"
    odd = [entry for entry in factors if abs(math.log(entry["ratio"])) > 0.01]
    about = "compressed in neither" if here.compression is None else f"compressed here by {here.compression}"
    if here.compression is None and here.stored < 0.99 * here.raw:
        about += f", but {1 - here.stored / here.raw:.0%} of the array was never written"
    if here.disk < 0.9 * here.size:
        about += f"; with its holes it takes {_bytes(here.disk)} of the disk"
    if not odd:
        return f"{sizes}: the same in every factor, {about}"
    product = " x ".join(f"{entry['ratio']:.3g} ({entry['factor']})" for entry in odd)
    patch, usual = (round(one.size / one.rows) for one in (here, there))
    if odd == factors[:1]:
        return f"{sizes}: {ratio:.3g} = {product}; a patch takes as much in both, {about}"
    most = max(odd[odd[0] is factors[0] :], key=lambda entry: abs(math.log(entry["ratio"])))
    why = f"{most['factor']}, {here.dtype} for {there.dtype}" if most["factor"] == "bytes a value" else most["factor"]
    return f"{sizes}: {ratio:.3g} = {product}; a patch takes {patch:,} bytes for {usual:,}, by its {why}; {about}"


def _bytes(count: int) -> str:
    if count < 1_000_000:
        return f"{count:,} bytes"
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _explanations(here: Account, held: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Each claim with the size of this file if the claim alone set it apart from official ones of as many patches."""
    base = here.rows * PATCH_BYTES
    excess = here.size / base
    side = math.sqrt(SIDE**2 * excess)
    overhead = here.size - min(here.stored, here.raw)  # with the padding of the last chunks
    packs, gz = here.factors["stored per raw byte"], PUBLISHED[0].size or 0
    gain = "" if held is None else f"; gzip would leave {held['uint8 gzip']:.2f} of uint8 here"
    png = "" if held is None else f"; PNG would leave {held['png']:.2f} of uint8, this file is {excess:.2f} of it"
    nan = ", and it holds NaN, which no integer can" if held and held["nan"] else ""
    claims = [
        ("float32 instead of uint8", 4 * base, here.dtype == "float32", f"the header says {here.dtype}"),
        ("uint32 instead of uint8", 4 * base, here.dtype == "uint32",
         f"as many bytes, but the header says {here.dtype}{nan}"),
        ("compression is missing", base * min(packs, 1), packs < 0.99,
         f"the official .h5 has none either (its .gz leaves {gz / (OFFICIAL['train'] * PATCH_BYTES):.2f}){gain}"),
        ("HDF5 instead of PNG", base, False, f"the official files are HDF5 too{png}"),
        ("more images", base, False, f"it would take {here.size // PATCH_BYTES:,} patches; there are {here.rows:,}"),
        ("overhead of chunks and headers", base + overhead, False, f"measured {overhead:,} bytes"),
        ("larger patches", here.rows * here.values, False,
         f"it would take {side:.0f} x {side:.0f} pixels; a patch has {here.values:,} values"),
    ]  # fmt: skip
    table = []
    for claim, predicted, stated, why in claims:
        fits = abs(predicted / here.size - 1) < 0.01
        verdict = "explains the size" if fits and stated else "refuted"
        if abs(excess - 1) < 0.01:
            verdict = "nothing to explain"
        table.append({"claim": claim, "predicted": round(predicted), "measured": here.size, "verdict": verdict,
                      "why": why})  # fmt: skip
    return table


def speed(stored: Stored, images: np.ndarray, *, seconds: float = 1.0, seed: int = 0) -> dict[str, float]:
    """Random patches a second: one by one through HDF5 as the file lies, and from the uint8 array that is used.

    Args:
        stored: the source.
        images: (N, 96, 96, 3) uint8, `Patches.images`.
        seconds: for each, at least one patch.
        seed: of the rows, the same for both.

    Returns:
        `before` and `after`, patches a second, and `n`, patches read through HDF5.
    """
    rows = np.random.default_rng(seed).integers(0, len(images), 4096)
    rates: list[tuple[int, float]] = []
    with h5py.File(stored.path, "r") as file:
        for source in (file[stored.key], images):
            began, count = time.perf_counter(), 0
            while count == 0 or (count < len(rows) and time.perf_counter() - began < seconds):
                np.array(source[int(rows[count])])
                count += 1
            rates.append((count, count / (time.perf_counter() - began)))
    return {"before": rates[0][1], "after": rates[1][1], "n": rates[0][0]}


def check(splits: dict[str, Split]) -> list[Finding]:
    """Values wider than they need be, or scaled; and chunks that make one patch cost as much as many."""
    return [finding for split in splits.values() for finding in (_dtype(split), _chunks(split)) if finding]


def _finding(check: str, split: Split, what: str, sure: str, advice: str, details: dict[str, Any]) -> Finding:
    return Finding(check, split.name, what, np.empty(0, np.int64), sure, advice, details=details)


def _dtype(split: Split) -> Finding | None:
    stored = split.patches.stored
    if stored.dtype.itemsize == 1:
        return None
    here, held = account(stored), content(stored)
    table = compare(here, official(split.name), held)
    sure = f"certain: header, and every value of {held['n']} patches"
    facts = {"account": here.factors, "content": held, **table}
    if held["low"] is not None and held["whole"] < 0.5 and (held["high"] <= 8 or held["low"] < -1):
        what = (f"{stored.dtype} values from {held['low']:g} to {held['high']:g}, {held['whole']:.0%} of them whole: "
                f"scaled, not grey levels; rounding them to uint8 loses the picture")  # fmt: skip
        return _finding("storage.scale", split, what, sure, "write the file again as uint8, 0 to 255", facts)
    wide = stored.dtype.itemsize
    what = f"{stored.dtype} for grey levels, {held['whole']:.1%} of them whole numbers: {wide} bytes where 1 does"
    saves = f"saves {table['saves']:,} of {here.size:,} bytes"
    if table["saves"] <= 0:  # compressed: the zeros of the wider type cost no disk, only time
        saves = f"saves no disk, but reads 1 byte a value instead of {wide}"
    advice = f"convert to uint8, which {saves}; open_split reads its converted copy already"
    return _finding("storage.dtype", split, what, sure, advice, facts)


def _chunks(split: Split) -> Finding | None:
    stored = split.patches.stored
    touched, unpacked = reach(stored)
    if unpacked < _SLOW * stored.row_bytes:
        return None
    what = f"one patch touches {touched:,} chunks of {stored.chunks} and unpacks {unpacked:,} bytes for its " \
           f"{stored.row_bytes:,}"  # fmt: skip
    advice = "write the array contiguous, or in chunks of one patch; open_split reads its converted copy already"
    rates = speed(stored, split.patches.images)
    facts = {"touched": touched, "unpacked": unpacked, "patch": stored.row_bytes, "images_per_second": rates}
    return _finding("storage.chunks", split, what, "certain: read from the header", advice, facts)
