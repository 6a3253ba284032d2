"""`inference.py` as people call it: options, streams and exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pcamlib import cli
from pcamlib.data.layout import split_path
from pcamlib.errors import ConfigError

FACE = Path(__file__).resolve().parents[2] / "inference.py"


def call(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    done = subprocess.run([sys.executable, FACE, *arguments], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_an_h5_with_labels_is_scored(checkpoint: Path, synthetic_dir: Path, tmp_path: Path) -> None:
    x, out = split_path(synthetic_dir, "test", "x"), tmp_path / "new" / "a.csv"
    code, said, _ = call("--checkpoint", checkpoint, x, "--out", out, "--threshold", "0.5", "--precision", "fp32")
    assert code == 0 and "n = 256 patches" in said and "threshold 0.5" in said and "(synthetic patches)" in said
    assert len(out.read_text().splitlines()) == 257


def test_rows_are_printed_and_a_bad_file_shows_in_the_exit_code(checkpoint: Path, tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(np.full((96, 96, 3), 100 + number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"")
    code, rows, said = call("--checkpoint", checkpoint, tmp_path)
    assert code == 1 and len(rows.splitlines()) == 3 and rows.startswith("file,row,x,y,probability")
    assert "not answered: " in said and "1.png: empty file" in said and "Traceback" not in said


def test_what_cannot_be_answered_is_one_line_and_exit_code_2(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(b"GIF89a and so on")
    code, _, said = call("--checkpoint", checkpoint, tmp_path / "a.gif")
    assert code == 2 and said.splitlines()[-1].startswith(f"pcam: {tmp_path / 'a.gif'}: no PNG, JPEG or TIFF")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--step", "32"], "--step 32: nothing is tiled; give --tile or --heat too"),
        (["--centre-crop", "--step", "32"], "--step 32: nothing is tiled"),
        (["--centre-crop", "--tile"], "--centre-crop: all of a picture is tiled; leave it out, or --tile and --heat"),
        (["--centre-crop", "--heat", "a.png"], "--centre-crop: all of a picture is tiled"),
    ],
)
def test_an_option_that_would_do_nothing_is_an_error(tmp_path: Path, options: list[str], what: str) -> None:
    code, _, said = call("--checkpoint", tmp_path / "none", tmp_path, *options)
    assert code == 2 and said.splitlines()[-1].startswith(f"pcam: {what}")


def test_serve_keeps_no_pixels_without_a_folder(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["serve", "--checkpoint", str(tmp_path / "none"), "--collect-pixels"])
    assert isinstance(done.exception, ConfigError) and "give --collect FOLDER too" in str(done.exception)
