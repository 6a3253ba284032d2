"""A stick for a machine without a network: code, weights, wheels, a sample with its answers, and a way to check it all.

    pcam bundle STICK --checkpoint runs/first/checkpoints/best.safetensors
    cat STICK/INSTALL                                # three lines, to be run there
    python STICK/verify.py --seal HEX                # every byte, then the stored predictions; stick/verify.py

Wheels come from wherever pip is told to look. They are what `NEEDS` rests on, in the versions of requirements.lock: pip
adds what torch, scipy and pydantic require, nothing that only training, notebooks or the service import.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pcamlib import provenance, sources
from pcamlib.data import synthetic
from pcamlib.data.layout import split_path
from pcamlib.data.patches import open_split, sample, take
from pcamlib.errors import PcamError
from pcamlib.files import disk_errors, sha256_file, write_json
from pcamlib.serving import export
from pcamlib.serving.predict import Predictor
from pcamlib.serving.stick import verify

#: What inference.py imports, and why; a test runs it with no other package in reach.
NEEDS = {
    "torch": "the network", "safetensors": "the checkpoint's file", "pydantic": "its settings, checked",
    "pyyaml": "imported with them", "numpy": "pixels and probabilities", "scipy": "the calibrated probability",
    "h5py": "patches in the official files", "pillow": "PNG, JPEG and TIFF", "matplotlib": "the heat map",
    "typer": "the command line",
}  # fmt: skip
COUNT = 100  # patches of the sample
TOLERANCE = 1e-4  # of a probability on another processor; 3e-7 was seen between torch and ONNX Runtime on one


def write(
    out: str | Path, checkpoint: str | Path, *, data: str | Path | None = None,
    platform: str = "manylinux_2_28_x86_64", python: str = "3.11", wheels: bool = True,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write the stick into `out`, whole or not at all.

    Args:
        out: folder that does not exist yet; made as `out`.part, then renamed.
        checkpoint: best.safetensors of a finished run.
        data: folder whose valid split gives the sample; None: synthetic patches are generated. Real pixels go onto the
            stick only when their folder is given here.
        platform: as in the name of a wheel; older glibc builds are taken too.
        python: version there.
        wheels: also fetch the packages; without them the machine needs an index.
        report: told one line a part, and the seal.

    Returns:
        rows `part`, `files`, `MB`, the last one the total.

    Raises:
        CheckpointError, ConfigError: not a checkpoint of a finished run.
        PcamError: `out` exists, a full disk, a wheel that cannot be had, or a sample that cannot be answered.
    """
    out = Path(out)
    part = out.with_name(f"{out.name}.part")
    predictor = Predictor(checkpoint)
    threshold = predictor.threshold()
    for path, why in ((out, "a stick is written into a new folder"), (part, "left by a writer that was killed")):
        if os.path.lexists(path):
            raise PcamError(f"{path}: exists ({why}); choose another name or delete it")
    with disk_errors(part):
        part.mkdir(parents=True)
        try:
            rows = _fill(part, predictor, threshold, data, platform, python, wheels, report)
            os.sync()  # a stick is pulled out soon
            part.rename(out)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    report(f"{out}: whole; its seal, to be kept elsewhere and given to verify.py: {sha256_file(out / verify.SUMS)}")
    return rows


def _fill(
    root: Path, predictor: Predictor, threshold: float, data: str | Path | None, platform: str, python: str,
    wheels: bool, report: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    _code(root, python, wheels)
    if wheels:  # first, since it may fail
        _fetch(root, platform, python)
    weights, split = root / "model" / "best.safetensors", _sample(root / "sample", data)
    weights.parent.mkdir()
    shutil.copyfile(predictor.path, weights)
    made, parity = export.build(predictor, split, np.arange(len(split)), None)
    (weights.parent / export.FILES["fp32"]).write_bytes(made["fp32"])
    kind = "synthetic" if split.synthetic else "real"
    about = {
        "made": provenance.now(), "code": {**provenance.git_state(), "digest": sources.package_digest()},
        **export.carried(predictor), "parity of the ONNX file": parity, "platform": platform, "python": python,
        "checkpoint": "model/best.safetensors", "sample": f"sample/{split.stored.path.name}",
        "predictions": "sample/predictions.csv", "n": len(split), "kind": kind, "threshold": threshold,
        "tolerance": TOLERANCE,
    }  # fmt: skip
    write_json(root / "about.json", about)
    if failed := verify.predict(root, about, root / "sample" / "predictions.csv"):
        raise PcamError(f"the sample cannot be answered by the stick's own inference.py: {failed}")
    names = sorted(verify.present(root))
    (root / verify.SUMS).write_text("".join(f"{sha256_file(root / name)}  {name}\n" for name in names))
    return _sizes(root, [*names, verify.SUMS], kind, report)


def _code(root: Path, python: str, wheels: bool) -> None:
    """inference.py, this library, the requirements of inference, and what stick/ holds."""
    entry = sources.ROOT / "inference.py"
    lock = sources.ROOT / "requirements.lock"
    if not (entry.is_file() and lock.is_file()):
        raise PcamError(f"{sources.ROOT}: no inference.py and requirements.lock beside pcamlib; bundle from a clone")
    package = (path for path in sources.PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    for path in (entry, lock, *package):
        place = root / path.relative_to(sources.ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    pins = {line.split("==")[0].lower(): line for line in lock.read_text().splitlines() if "==" in line}
    lines = [f"{pins[name]:24s}  # {why}" for name, why in NEEDS.items()]
    (root / "requirements.txt").write_text("\n".join(["-c requirements.lock", *lines]) + "\n")
    stick = Path(verify.__file__).parent
    shutil.copyfile(stick / "verify.py", root / "verify.py")
    offline = "--no-index --find-links wheels " if wheels else ""
    (root / "INSTALL").write_text((stick / "INSTALL").read_text().format(python=python, offline=offline))


def _sample(folder: Path, data: str | Path | None) -> Any:
    """`COUNT` labelled patches in the official layout, opened."""
    if data is None:
        synthetic.generate(folder, seed=0, sizes={"valid": COUNT}, report=lambda line: None)
        return open_split(folder, "valid")
    given = open_split(data, "valid", labels=True)
    rows = sample(given, COUNT)
    assert given.labels is not None
    folder.mkdir()
    values = {"x": take(given.images, rows), "y": given.labels[rows].reshape(-1, 1, 1, 1)}
    for name, array in values.items():
        with h5py.File(split_path(folder, "valid", name), "w") as file:
            file[name] = array
            if given.synthetic:
                file.attrs[synthetic.SYNTHETIC] = json.dumps(given.synthetic)
    return open_split(folder, "valid")


def _fetch(root: Path, platform: str, python: str) -> None:
    """Wheels for another machine into wheels/, by pip as it is configured here."""
    tags = [platform]
    if platform.startswith("manylinux_2_"):  # pip takes a tag at its word: builds for an older glibc are asked for too
        newest, machine = platform.removeprefix("manylinux_2_").split("_", 1)
        tags = [f"manylinux_2_{minor}_{machine}" for minor in range(int(newest), 4, -1)]
        tags += [f"manylinux{year}_{machine}" for year in (2014, 2010, 1)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--python-version", python]
    command += [f"--platform={tag}" for tag in tags] + ["--dest", "wheels", "-r", "requirements.txt"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise PcamError(
            f"pip cannot fetch the wheels for {platform}, Python {python} ({' '.join(errors[-1:])}); run it where pip "
            f"reaches an index, or leave them out with --no-wheels"
        )


def _sizes(root: Path, names: list[str], kind: str, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Files and MB of each part, told as they come."""
    parts = {"model": "checkpoint and ONNX", "sample": f"sample ({kind})", "wheels": "wheels", "pcamlib": "code"}
    parts |= {"inference.py": "code"}
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        for part in (parts.get(name.split("/")[0], "instructions and checksums"), "total"):
            row = found.setdefault(part, {"part": part, "files": 0, "MB": 0.0})
            row["files"] += 1
            row["MB"] += (root / name).stat().st_size / 1e6
    found["total"] = found.pop("total")  # last
    for row in found.values():
        report(f"{row['part']:26s} {row['files']:4d} files {row['MB']:9.2f} MB")
    return list(found.values())
