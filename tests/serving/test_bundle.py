"""A stick installs and answers without a network; whatever is changed, missing or extra on it is named."""

from __future__ import annotations

import builtins
import errno
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from pcamlib.data.patches import open_split
from pcamlib.errors import ConfigError, PcamError
from pcamlib.files import sha256_file
from pcamlib.models import onnx
from pcamlib.serving import bundle
from pcamlib.serving.stick import verify
from pcamlib.sources import ROOT
from pcamlib.training import checkpoint as checkpoints

SAMPLE = "sample/camelyonpatch_level_2_split_valid_x.h5"
KINDS = (
    "inference.py", "pcamlib/errors.py", "pcamlib/serving/predict.py", "model/best.safetensors", "model/model.onnx",
    SAMPLE, "sample/predictions.csv", "requirements.txt", "requirements.lock", "about.json", "INSTALL", "verify.py",
)  # fmt: skip


def quiet(line: str) -> None:
    """Tell nobody."""


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stick without wheels; nobody may change it."""
    out = tmp_path_factory.mktemp("bundle") / "stick"
    bundle.write(out, checkpoint, wheels=False, report=quiet)
    return out


@pytest.fixture
def stick(made: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(made, tmp_path / "copy")


def check(stick: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, stick / "verify.py", *arguments], capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def sign(stick: Path) -> None:
    """Write SHA256SUMS anew, as somebody would who has something to hide."""
    lines = [f"{sha256_file(stick / name)}  {name}\n" for name in sorted(verify.present(stick))]
    (stick / verify.SUMS).write_text("".join(lines))


# A whole stick


def test_a_whole_stick_answers_as_stored(made):
    seal = sha256_file(made / verify.SUMS)
    code, out = check(made, "--seal", seal)
    assert code == 0 and "every checksum right, seal right" in out
    assert "100 synthetic patches answered as stored (off by at most 0.0e+00, 0.0001 allowed)" in out
    assert verify.wrong_files(made, seal) == []  # and nothing was written onto it
    code, out = check(made, "--files-only")
    assert code == 0 and "NO SEAL GIVEN" in out and "answered" not in out


def test_sha256sum_agrees(made):
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum here")
    done = subprocess.run(["sha256sum", "--strict", "-c", verify.SUMS], cwd=made, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == len(list(verify.present(made)))


def test_every_kind_of_file_is_there(made, checkpoint):
    names = set(verify.present(made))
    assert names >= set(KINDS) and not [name for name in names if "__pycache__" in name]
    assert (made / "model/best.safetensors").read_bytes() == checkpoint.read_bytes()
    carried = onnx.inscription(onnx.session((made / "model/model.onnx").read_bytes()))
    assert carried["parity"]["n"] == 100 and carried["synthetic"] is True
    about = json.loads((made / "about.json").read_text())
    assert about["weights"] == carried["weights"] and about["decision"]["threshold"] == about["threshold"]
    install = (made / "INSTALL").read_text().splitlines()
    assert len(install) == 3 and "--no-index" not in install[1]


def test_without_data_the_sample_is_synthetic_and_says_so(made):
    patches = open_split(made / "sample", "valid")
    assert patches.synthetic and len(patches) == 100 and set(patches.labels) == {0, 1}
    assert json.loads((made / "about.json").read_text())["kind"] == "synthetic"


def test_with_data_the_sample_is_of_its_valid_split(synthetic_dir, tmp_path):
    sample, valid = bundle._sample(tmp_path / "sample", synthetic_dir), open_split(synthetic_dir, "valid")
    assert len(sample) == 100 and sample.synthetic == valid.synthetic
    places = np.linspace(0, 255, 100).astype(int)
    assert (sample.images == valid.images[places]).all() and (sample.labels == valid.labels[places]).all()


def test_the_command_tells_each_part_and_the_seal_and_calls_real_patches_real(
    pcam, checkpoint, synthetic_dir, tmp_path
):
    for name in ("x", "y"):
        source = f"camelyonpatch_level_2_split_valid_{name}.h5"
        with h5py.File(synthetic_dir / source) as told, h5py.File(tmp_path / source, "w") as file:
            file[name] = told[name][:]  # without the mark of the generator
    stick = tmp_path / "stick"
    code, out, _ = pcam("bundle", stick, "--checkpoint", checkpoint, "--data", tmp_path, "--no-wheels")
    assert code == 0 and sha256_file(stick / verify.SUMS) in out.splitlines()[-1]
    for part in ("code", "checkpoint and ONNX", "sample (real)", "instructions and checksums", "total"):
        assert part in out
    assert "100 real patches answered as stored" in check(stick)[1]


# A changed stick


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_byte_is_named_in_each_kind_of_file(stick, name):
    size = (stick / name).stat().st_size
    for place in (0, size // 2, size - 1):
        flip(stick / name, place)
        assert verify.wrong_files(stick) == [f"changed: {name}"]
        flip(stick / name, place)
    assert verify.wrong_files(stick) == []


def test_a_flipped_byte_in_the_checksums_is_named_with_and_without_the_seal(stick):
    sums = stick / verify.SUMS
    seal = sha256_file(sums)
    for place in [*range(0, sums.stat().st_size, 61), *range(60, 90), sums.stat().st_size - 1]:
        flip(sums, place)
        assert verify.wrong_files(stick), place
        assert verify.wrong_files(stick, seal)[0].startswith(f"changed: {verify.SUMS} (its SHA-256 is ")
        flip(sums, place)


def test_line_ends_of_the_checksums_are_bytes_like_others(stick):
    sums = stick / verify.SUMS
    whole = sums.read_bytes()
    for place in [place for place, byte in enumerate(whole) if byte == ord("\n")]:
        sums.write_bytes(whole[:place] + b"\r" + whole[place + 1 :])
        assert verify.wrong_files(stick), place
    for change in (whole.replace(b"\n", b"\r\n"), whole.replace(b"\n", b"\r"), whole[:-1], whole + b"more"):
        sums.write_bytes(change)
        assert verify.wrong_files(stick)[0].startswith(f"changed: {verify.SUMS}")
    sums.write_bytes(whole * 2)
    number, first = whole.count(b"\n"), whole.split(b"\n")[0].decode()[66:]
    found = verify.wrong_files(stick)
    assert found[0] == f"changed: {verify.SUMS}, line {number + 1} tells {first} again" and len(found) == number


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_checked(stick, monkeypatch):
    flip(stick / "verify.py", 0)

    def broken(name: str) -> list[str]:
        def read(path: Any, *arguments: Any, **more: Any) -> Any:
            if Path(path) == stick / name:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return opened(path, *arguments, **more)

        with monkeypatch.context() as patch:
            opened = io.open
            patch.setattr(io, "open", read)  # Path.read_bytes
            patch.setattr(builtins, "open", read)
            return verify.wrong_files(stick, "0" * 64)[name != verify.SUMS :]

    assert broken("model/best.safetensors") == ["unreadable: model/best.safetensors", "changed: verify.py"]
    assert broken(verify.SUMS) == [f"unreadable: {verify.SUMS}"]


def test_a_file_changed_together_with_its_checksum_is_found_by_the_seal(stick):
    seal = sha256_file(stick / verify.SUMS)
    with open(stick / "inference.py", "a") as file:
        file.write("# harmless\n")
    sign(stick)
    assert verify.wrong_files(stick) == []
    (found,) = verify.wrong_files(stick, seal)
    assert found.startswith(f"changed: {verify.SUMS}") and seal in found
    code, out = check(stick, "--seal", seal)
    assert code == 1 and "do not use it" in out and "answered" not in out


def test_missing_and_extra_files_are_each_named(stick):
    (stick / "sample/predictions.csv").unlink()
    (stick / "wheels").mkdir()
    (stick / "wheels/other.whl").write_bytes(b"")
    (stick / "pcamlib/__pycache__").mkdir()
    (stick / "pcamlib/__pycache__/errors.pyc").write_bytes(b"")
    (stick / "link").symlink_to("pcamlib")
    code, out = check(stick)
    assert code == 1
    assert out.splitlines()[:4] == [
        "extra: link",
        "extra: pcamlib/__pycache__/errors.pyc; Python writes it unless started with -B: delete it",
        "missing: sample/predictions.csv",
        "extra: wheels/other.whl",
    ]
    (stick / verify.SUMS).unlink()
    assert verify.wrong_files(stick) == [f"missing: {verify.SUMS}"]


def test_a_file_replaced_by_a_link_to_its_like_is_named(stick, tmp_path):
    shutil.copy(stick / "INSTALL", tmp_path / "elsewhere")
    (stick / "INSTALL").unlink()
    (stick / "INSTALL").symlink_to(tmp_path / "elsewhere")
    assert verify.wrong_files(stick) == ["changed: INSTALL"]


def test_other_answers_are_named(stick):
    path = stick / "sample/predictions.csv"
    head, *rows = path.read_text().splitlines()
    column = head.split(",").index("probability")
    cells = rows[7].split(",")
    cells[column] = str((float(cells[column]) + 0.5) % 1)
    path.write_text("\n".join([head, *rows[:7], ",".join(cells), *rows[8:]]) + "\n")
    sign(stick)
    code, out = check(stick)
    assert code == 1 and "changed: prediction 7: " in out and "1 of 100 predictions differ" in out


def test_rounding_is_allowed_and_a_call_may_turn_only_at_the_threshold(tmp_path):
    about = {"predictions": "old", "threshold": 0.3, "tolerance": 1e-4}
    head = "file,row,probability,confidence,tumour\n"

    def compared(old: str, new: str) -> list[str]:
        (tmp_path / "old").write_text(head + old)
        (tmp_path / "new").write_text(head + new)
        return verify.wrong_answers(tmp_path, about, tmp_path / "new")[0]

    assert compared("a,0,0.5,0.5,1\n", "a,0,0.50005,0.5,1\n") == []
    assert compared("a,0,0.29999,0.3,0\n", "a,0,0.30001,0.3,1\n") == []
    assert len(compared("a,0,0.5,0.5,1\n", "a,0,0.5002,0.5,1\n")) == 1
    assert len(compared("a,0,0.5,0.5,1\n", "a,0,0.5,0.5,0\n")) == 1
    assert len(compared("a,0,0.5,0.5,1\n", "b,0,0.5,0.5,1\n")) == 1
    assert len(compared("a,0,0.5,0.5,1\n", "a,0,nan,0.5,1\n")) == 1
    assert compared("a,0,0.5,0.5,1\n", "") == ["changed: 0 predictions with no columns"]


def test_an_inference_that_fails_says_why(stick):
    (stick / "model/best.safetensors").write_bytes(b"")
    sign(stick)
    code, out = check(stick)
    assert code == 1 and "inference.py failed: " in out and "empty file" in out


# Whole or not at all


@pytest.mark.parametrize("name", ["stick", "stick.part"])
def test_what_exists_is_left_alone(checkpoint, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").touch()
    with pytest.raises(PcamError, match=rf"{name}: exists .*; choose another name or delete it"):
        bundle.write(tmp_path / "stick", checkpoint, wheels=False)
    assert [path.name for path in tmp_path.rglob("*")] == [name, "mine"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_and_nothing_stays(checkpoint, tmp_path, monkeypatch, number):
    copy = shutil.copyfile

    def full(source: Any, place: Path) -> None:
        if place.name == "best.safetensors":
            raise OSError(number, os.strerror(number))
        copy(source, place)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(PcamError, match="the disk is full or over quota"):
        bundle.write(tmp_path / "stick", checkpoint, wheels=False)
    assert list(tmp_path.iterdir()) == []


def test_wheels_that_cannot_be_had_are_told_and_nothing_stays(checkpoint, tmp_path):
    with pytest.raises(
        PcamError, match=r"pip cannot fetch the wheels for nowhere_1, Python 3\.11 \(ERROR: .*--no-wheels"
    ):
        bundle.write(tmp_path / "stick", checkpoint, platform="nowhere_1", report=quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_a_threshold_is_refused(checkpoint, tmp_path):
    tensors, meta = checkpoints.load(checkpoint)
    checkpoints.save(tmp_path / "early.safetensors", tensors, {k: v for k, v in meta.items() if k != "decision"})
    with pytest.raises(ConfigError, match="carries no threshold"):
        bundle.write(tmp_path / "stick", tmp_path / "early.safetensors", wheels=False)
    assert not (tmp_path / "stick").exists()


# What it rests on


def closure(names: list[str]) -> set[str]:
    """Distributions that these rest on, themselves included."""
    found: set[str] = set()
    while names:
        name = names.pop()
        if canonicalize_name(name) not in found:
            found.add(canonicalize_name(name))
            needs = map(Requirement, importlib.metadata.requires(name) or [])
            names += [each.name for each in needs if not each.marker or each.marker.evaluate({"extra": ""})]
    return found


#: Runs inference.py as if nothing but some distributions were installed, then prints which of `wanted` it imported.
ALONE = """
import importlib.abc, importlib.metadata, json, runpy, sys
allowed, wanted, sys.argv = map(json.loads, sys.argv[1:4])
packages = importlib.metadata.packages_distributions()
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if not path and name in packages and not {each.lower().replace("_", "-") for each in packages[name]} & allowed:
            raise ModuleNotFoundError(name)
allowed = {*allowed, "pcamlib"}
sys.meta_path.insert(0, Refuse())
sys.path[0] = "."
try:
    runpy.run_path("inference.py", run_name="__main__")
except SystemExit as end:
    names = {each.lower() for name in sys.modules for each in packages.get(name, [])}
    print(json.dumps([end.code or 0, sorted(set(wanted) & names)]))
"""


def test_requirements_are_what_inference_imports_no_less_and_no_more(made, tmp_path):
    Image.fromarray(np.full((200, 200, 3), 200, np.uint8)).save(tmp_path / "slide.png")
    common = ["inference.py", "--checkpoint", "model/best.safetensors", "--out", str(tmp_path / "out.csv")]
    allowed, used = sorted(closure(list(bundle.NEEDS))), set()
    for what in (["--heat", str(tmp_path / "heat.png"), str(tmp_path / "slide.png")], [SAMPLE]):
        given = [json.dumps(each) for each in (allowed, list(bundle.NEEDS), [*common, *what])]
        done = subprocess.run([sys.executable, "-B", "-c", ALONE, *given], cwd=made, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        code, imported = json.loads(done.stdout.splitlines()[-1])
        assert code == 0, done.stderr
        used |= set(imported)
    assert used == set(bundle.NEEDS)
    pins = [line.split()[0] for line in (made / "requirements.txt").read_text().splitlines()[1:]]
    assert set(pins) <= set((ROOT / "requirements.lock").read_text().splitlines()) and len(pins) == len(bundle.NEEDS)


# Without a network


def cut_off() -> list[str]:
    """A command before which there is no network but a loopback that is down; skips where none can be made."""
    for command in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    pytest.skip("NOT PROVEN HERE: `unshare -n` and `unshare -rn` are both refused, so no network can be taken away")


@pytest.mark.install
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_in_an_empty_environment_without_a_network_it_installs_and_answers(checkpoint, tmp_path):
    if sysconfig.get_platform() != "linux-x86_64":
        pytest.skip(f"NOT PROVEN HERE: the stick is for Linux on x86_64, this is {sysconfig.get_platform()}")
    command, python = cut_off(), f"{sys.version_info.major}.{sys.version_info.minor}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp_path / "one", "safetensors"]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"NOT PROVEN HERE: pip reaches no package index ({done.stderr.strip().splitlines()[-1:]})")
    rows = bundle.write(tmp_path / "stick", checkpoint, python=python, report=quiet)
    assert next(row for row in rows if row["part"] == "wheels")["files"] >= len(bundle.NEEDS)

    home = tmp_path / "home"
    (home / "bin").mkdir(parents=True)
    named = home / "bin" / f"python{python}"  # the system's own, whatever it is called here
    named.write_text(f'#!/bin/sh\nexec "{sys._base_executable}" "$@"\n')
    named.chmod(0o755)
    seal = sha256_file(tmp_path / "stick" / verify.SUMS)
    lines = (tmp_path / "stick" / "INSTALL").read_text().replace("THE-SEAL-YOU-WERE-TOLD", seal)
    alone = f"{named} -c 'import socket as s; assert [name for _, name in s.if_nameindex()] == [\"lo\"]'"
    env = {"HOME": str(home), "PATH": f"{home / 'bin'}:/usr/bin:/bin", "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(
        [*command, "sh", "-ec", f"{alone}\n{lines}"], cwd=tmp_path / "stick", env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 synthetic patches answered as stored" in done.stdout and "seal right" in done.stdout
    where = subprocess.run([home / "pcam-env/bin/python", "-c", "import torch; print(torch.__file__)"],
                           capture_output=True, text=True, env=env)  # fmt: skip
    assert where.stdout.startswith(str(home / "pcam-env"))
    assert verify.wrong_files(tmp_path / "stick", seal) == []
    wheel = next((tmp_path / "stick/wheels").glob("numpy*"))
    flip(wheel, wheel.stat().st_size // 2)
    assert verify.wrong_files(tmp_path / "stick", seal) == [f"changed: wheels/{wheel.name}"]
