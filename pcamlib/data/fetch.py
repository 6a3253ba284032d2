"""Download the nine official PCam files: resumed where a connection broke, verified by length and MD5, unpacked.

    pcam data fetch DIR

Lengths were published by TensorFlow Datasets; those of the three tables by nobody, so the server's word is taken there.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pcamlib.errors import DataError
from pcamlib.files import atomic_path, read_json, write_json

ZENODO = "https://zenodo.org/records/2546921/files/{name}?download=1"
MEMO = ".pcam-fetch.json"  # name -> [md5, size, mtime in ns] of what was verified: 6 GB take 15 s to hash again
BACKOFF = (1.0, 4.0, 15.0, 60.0)  # seconds before each further attempt that brought nothing new
PROGRESS_SECONDS = 5.0
TIMEOUT = 60.0  # seconds without a byte
BLOCK = 1 << 20
Report = Callable[[str], None]
HTML = re.compile(rb"\s*<(!doctype|html)", re.IGNORECASE)
STUCK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # our disk, not the connection
BUSY = (408, 425, 429, 500, 502, 503, 504)  # answers that a later attempt may change


class OfficialFile(NamedTuple):
    """A published file: name, MD5 in hex, length in bytes (None where no source states it)."""

    name: str
    md5: str
    size: int | None


#: The table in the PCam README has the MD5 of valid and test exchanged, as its author agreed (basveeling/pcam issue 1;
#: torchvision PR 6644 measured the same). These are the sums of the files as they are named.
OFFICIAL = (
    OfficialFile("camelyonpatch_level_2_split_train_x.h5.gz", "1571f514728f59376b705fc836ff4b63", 6_421_353_462),
    OfficialFile("camelyonpatch_level_2_split_train_y.h5.gz", "35c2d7259d906cfc8143347bb8e05be7", 21_378),
    OfficialFile("camelyonpatch_level_2_split_train_meta.csv", "5a3dd671e465cfd74b5b822125e65b0a", None),
    OfficialFile("camelyonpatch_level_2_split_valid_x.h5.gz", "d5b63470df7cfa627aeec8b9dc0c066e", 805_965_320),
    OfficialFile("camelyonpatch_level_2_split_valid_y.h5.gz", "2b85f58b927af9964a4c15b8f7e8f179", 3_038),
    OfficialFile("camelyonpatch_level_2_split_valid_meta.csv", "67589e00a4a37ec317f2d1932c7502ca", None),
    OfficialFile("camelyonpatch_level_2_split_test_x.h5.gz", "d8c2d60d490dbd479f8199bdfa0cf6ec", 800_875_929),
    OfficialFile("camelyonpatch_level_2_split_test_y.h5.gz", "60a7035772fbdb7f34eb86d4420cf66a", 3_040),
    OfficialFile("camelyonpatch_level_2_split_test_meta.csv", "3455fd69135b66734e1008f3af684566", None),
)


def fetch(
    dest: Path,
    *,
    base_url: str = ZENODO,
    files: Sequence[OfficialFile] = OFFICIAL,
    unpack: bool = True,
    report: Report = print,
    backoff: Sequence[float] = BACKOFF,
) -> list[Path]:
    """Bring `files` into the folder `dest` and return the paths to read; what is there and verified is left as it is.

    Args:
        dest: folder, made where it is missing.
        base_url: address of a file, with `{name}` in it.
        unpack: write NAME.h5 beside NAME.h5.gz; the archive stays, and may be deleted afterwards.
        report: receives one line at a time.
        backoff: seconds before each further attempt; after as many attempts without a new byte it gives up.

    Raises:
        DataError: what the server sends is not the file, the connection stays broken, the disk is full (what came is
            kept for the next call), or another file of that name is in the way.
    """
    try:
        dest.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{dest}: cannot be made ({error.strerror}); choose a folder you may write") from error
    targets = {file: dest / (file.name.removesuffix(".gz") if unpack else file.name) for file in files}
    for file, target in targets.items():  # before hours of download, not after
        if target.name != file.name and target.exists() and not _known(target, file.md5):
            raise DataError(f"{target}: already there and not unpacked by this command; move it, or fetch elsewhere")
    for file, target in targets.items():
        if _known(target, file.md5):
            report(f"{target.name}: already here and verified")
            continue
        archive = dest / file.name
        if not archive.exists():
            _download(base_url.format(name=file.name), archive, file, report, backoff)
        elif not _known(archive, file.md5):
            _verify(archive, file, report, "delete or move it and run again")
            _remember(archive, file.md5, archive)
        if target != archive:
            report(f"{target.name}: unpacking")
            with atomic_path(target) as part:
                with gzip.open(archive) as packed, open(part, "wb") as out:
                    shutil.copyfileobj(packed, out, BLOCK)
                _remember(target, file.md5, part)
    return list(targets.values())


def _stamp(path: Path, md5: str) -> list[str | int]:
    return [md5, path.stat().st_size, path.stat().st_mtime_ns]


def _known(path: Path, md5: str) -> bool:
    """Whether `path` is, by size and time, the file that was verified against `md5` (or unpacked from it)."""
    memo = path.with_name(MEMO)
    return path.exists() and memo.exists() and read_json(memo).get(path.name) == _stamp(path, md5)


def _remember(path: Path, md5: str, whole: Path) -> None:
    """Note `whole` as the verified `path`, before it is renamed to it: a kill in between costs a repetition only."""
    memo = path.with_name(MEMO)
    write_json(memo, {**(read_json(memo) if memo.exists() else {}), path.name: _stamp(whole, md5)})


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _verify(path: Path, file: OfficialFile, report: Report, advice: str) -> None:
    """Raise a DataError unless `path` is the published file."""
    report(f"{file.name}: checking MD5")
    with open(path, "rb") as handle:
        if HTML.match(handle.read(64)):
            raise DataError(f"{path}: is a web page, not {file.name}; {advice}")
        handle.seek(0)
        found = hashlib.file_digest(handle, "md5").hexdigest()
        os.fsync(handle.fileno())
    if found != file.md5:
        raise DataError(f"{path}: {_size(path):,} bytes with MD5 {found}, expected MD5 {file.md5}; {advice}")


def _download(url: str, archive: Path, file: OfficialFile, report: Report, backoff: Sequence[float]) -> None:
    """Bring one file through `NAME.part`, with as many requests as it takes."""
    part = archive.with_name(f"{archive.name}.part")
    failures, best = 0, _size(part)
    while file.size is None or _size(part) != file.size:
        try:
            _receive(url, part, file, report)
            break
        except urllib.error.HTTPError as error:
            if error.code == 416:  # our part ends where the file ends, or beyond: start over
                part.unlink(missing_ok=True)
            elif error.code not in BUSY:
                raise DataError(f"{url}: the server answers {error.code} {error.reason}; check the address") from None
            reason = f"the server answers {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            if (number := getattr(error, "errno", None)) in STUCK:
                raise DataError(f"{part}: {os.strerror(number)}; mend that and run again, what came is kept") from error
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        failures, best = (1 if _size(part) > best else failures + 1), max(best, _size(part))
        if failures > len(backoff):
            raise DataError(f"{url}: {reason}; gave up after {failures} attempts, run again to go on from there")
        report(f"{file.name}: {reason}; next attempt in {backoff[failures - 1]:g} s")
        time.sleep(backoff[failures - 1])
    try:
        _verify(part, file, report, "the wrong bytes were deleted, run again")
    except DataError:
        part.unlink()
        raise
    _remember(archive, file.md5, part)
    part.replace(archive)


def _receive(url: str, part: Path, file: OfficialFile, report: Report) -> None:
    """One request for what `part` still lacks, appended to it; after OSError or HTTPException ask again."""
    headers = {"User-Agent": "pcamlib"} | ({"Range": f"bytes={have}-"} if (have := _size(part)) else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
        have = have if answer.status == http.HTTPStatus.PARTIAL_CONTENT else 0  # 200: Range ignored, start over
        total = file.size if answer.length is None else have + answer.length
        block = answer.read1(BLOCK)
        if answer.headers.get_content_type() == "text/html" or (not have and HTML.match(block)):
            raise DataError(f"{url}: the server sends a web page, not {file.name}; open the address in a browser")
        if file.size is not None and total != file.size:
            if have:  # it told us that our part belongs to another file
                part.unlink()
            raise DataError(f"{url}: {total:,} bytes announced, expected {file.size:,}; run again")
        began, said, start = time.monotonic(), time.monotonic(), have
        with open(part, "ab" if have else "wb") as out:
            while block:
                out.write(block)
                have += len(block)
                if (now := time.monotonic()) - said >= PROGRESS_SECONDS:
                    said, speed = now, (have - start) / (now - began) / 1e6
                    of = f" of {total / 1e6:,.1f} MB, {have / total:.0%}" if total else " MB"
                    report(f"{file.name}: {have / 1e6:,.1f}{of}, {speed:.1f} MB/s")
                block = answer.read1(BLOCK)
    if total is not None and have < total:
        raise ConnectionError(f"the connection broke off after {have:,} of {total:,} bytes")
