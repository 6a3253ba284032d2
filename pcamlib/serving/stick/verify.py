"""Is this stick whole, and does it still answer as it did when it was made?

    python verify.py [--seal HEX] [--files-only]

Every file against SHA256SUMS, nothing more, nothing less; then inference.py on the sample against its stored
predictions. Exit code 0: all is well, 1: something is named that is not.

A changed line of SHA256SUMS disagrees with its file and is found; lines and files that were changed together are found
by the seal, the SHA-256 of SHA256SUMS, told when the stick was made: keep it elsewhere. This program lies on the stick
as well. Who does not trust it asks the system: `sha256sum -c SHA256SUMS`; `sha256sum SHA256SUMS` prints the seal.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUMS = "SHA256SUMS"


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def present(root: Path) -> Iterator[str]:
    """Every file and every link below `root`, but SHA256SUMS itself."""
    for folder, inner, files in os.walk(root):
        links = [name for name in inner if (Path(folder) / name).is_symlink()]
        names = ((Path(folder) / name).relative_to(root).as_posix() for name in files + links)
        yield from (name for name in names if name != SUMS)


def wrong_files(root: Path, seal: str | None = None) -> list[str]:
    """One line for each file that is changed, missing, extra or unreadable."""
    try:
        sums = (root / SUMS).read_bytes()  # as text, a line end changed to \r would be read as the \n it was
    except OSError as error:
        return [f"{'missing' if isinstance(error, FileNotFoundError) else 'unreadable'}: {SUMS}"]
    found, told = [], {}
    if seal and (here := hashlib.sha256(sums).hexdigest()) != seal.strip().lower():
        found.append(f"changed: {SUMS} (its SHA-256 is {here}, the seal {seal})")
    *lines, rest = sums.decode("utf-8", "replace").split("\n")
    if rest:
        found.append(f"changed: {SUMS} ends within a line")
    for number, line in enumerate(lines, 1):
        parts = re.fullmatch("([0-9a-f]{64})  ([^\r]+)", line)
        if not parts or parts[2] in told:
            what = f"tells {parts[2]} again" if parts else "is no checksum"
            found.append(f"changed: {SUMS}, line {number} {what}")
        else:
            told[parts[2]] = parts[1]
    there = set(present(root))
    for name in sorted(told.keys() | there):
        path = root / name
        if name not in there:
            found.append(f"missing: {name}")
        elif name not in told:
            cache = "; Python writes it unless started with -B: delete it" if "__pycache__" in name else ""
            found.append(f"extra: {name}{cache}")
        else:
            try:
                if path.is_symlink() or sha256(path) != told[name]:
                    found.append(f"changed: {name}")
            except OSError:  # EIO, the likeliest fault of a stick
                found.append(f"unreadable: {name}")
    return found


def predict(root: Path, about: dict[str, Any], out: Path) -> str:
    """Run inference.py on the sample into `out`; returns its last words where it failed.

    It starts in the stick's folder and takes the library from there, whatever else is installed.
    """
    command = [sys.executable, "-B", "-s", "inference.py", "--checkpoint", about["checkpoint"], about["sample"]]
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command += ["--precision", "fp32", "--out", str(out)]  # another processor may lack what bf16 needs
    done = subprocess.run(command, cwd=root, env=clean, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]


def wrong_answers(root: Path, about: dict[str, Any], answers: Path) -> tuple[list[str], float]:
    """What differs from the stored predictions, and by how much a probability does at most.

    Another processor rounds otherwise: a probability may be off by the tolerance of about.json, and a call may differ
    where the probability lies that close to the threshold.
    """
    texts = (path.read_text().splitlines() for path in (root / about["predictions"], answers))
    stored, new = (list(csv.DictReader(lines)) for lines in texts)
    if [sorted(row) for row in stored] != [sorted(row) for row in new]:
        return [f"changed: {len(new)} predictions with {sorted(new[0]) if new else 'no'} columns"], float("nan")
    found, most = [], 0.0
    for number, (before, after) in enumerate(zip(stored, new, strict=True)):
        gap = max(abs(float(before[name]) - float(after[name])) for name in ("probability", "confidence"))
        near = abs(float(before["probability"]) - about["threshold"]) <= about["tolerance"]
        rest = [name for name in before if name not in ("probability", "confidence") and before[name] != after[name]]
        most = max(most, gap)
        if not gap <= about["tolerance"] or (rest and not (near and rest == ["tumour"])):
            found.append(f"changed: prediction {number}: {dict(before)} became {dict(after)}")
    return found, most


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seal", help="SHA-256 of SHA256SUMS, told when the stick was made")
    parser.add_argument("--files-only", action="store_true", help="do not predict: nothing needs to be installed")
    options = parser.parse_args()
    root = Path(__file__).resolve().parent
    found = wrong_files(root, options.seal)
    if found:
        print(*found, "This stick is not what was made: do not use it.", sep="\n")
        return 1
    print(f"{len(set(present(root)))} files, every checksum right, {'seal right' if options.seal else 'NO SEAL GIVEN'}")
    if options.files_only:
        return 0
    about = json.loads((root / "about.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "predictions.csv"
        if failed := predict(root, about, answers):
            print(f"inference.py failed: {failed}\nIs everything of requirements.txt installed? See INSTALL.")
            return 1
        found, most = wrong_answers(root, about, answers)
    if found:
        print(*found[:10], f"{len(found)} of {about['n']} predictions differ: do not use it here.", sep="\n")
        return 1
    allowed = f"off by at most {most:.1e}, {about['tolerance']:g} allowed"
    print(f"{about['n']} {about['kind']} patches answered as stored ({allowed})")
    print(f"to use it: {sys.executable} -B {root / 'inference.py'} --checkpoint {root / about['checkpoint']} IMAGE...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
