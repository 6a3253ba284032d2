"""What makes an executed notebook stale, each reason alone; and what does not."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from pcamlib.errors import NotebookError, PcamError
from pcamlib.jobs import freshness, notebook
from pcamlib.jobs.freshness import is_fresh, stamp, write_stamp

DATA = {"train": "abc"}


@pytest.fixture
def done(make, tmp_path):
    """A notebook, its output and a product with a stamp, as after a good run."""
    path = make("00_data", "from pcamlib import errors")
    output, product = tmp_path / "out" / "00_data.ipynb", tmp_path / "out" / "x.png"
    output.parent.mkdir()
    output.write_text("executed")
    product.write_bytes(b"png")
    write_stamp(output, stamp(path, {"seed": 0}, DATA), [product])
    return path, output, product


def test_nothing_changed(done):
    path, output, _ = done
    assert is_fresh(output, stamp(path, {"seed": 0}, DATA)) == (True, "nothing changed")


@pytest.mark.parametrize(
    ("parameters", "data", "reason"),
    [
        ({"seed": 1}, DATA, "parameter seed: 0 -> 1"),
        ({}, DATA, "parameter seed: 0 -> default"),
        ({"seed": 0, "split": "a"}, DATA, "parameter split: default -> 'a'"),
        ({"seed": 0}, {"train": "abd"}, "data train changed"),
        ({"seed": 0}, {"train": "abc", "valid": "x"}, "data valid is new"),
        ({"seed": 0}, {}, "data train is no longer used"),
    ],
)
def test_a_changed_parameter_or_data_set(done, parameters, data, reason):
    path, output, _ = done
    assert is_fresh(output, stamp(path, parameters, data)) == (False, reason)


def test_where_things_lie_does_not_count(done):
    """A job may read a copy of the data on its node; their fingerprints are in `data`."""
    path, output, _ = done
    moved = {"seed": 0, "data_dir": "/scratch/7", "course_dir": "", "root": "/home/me"}
    assert is_fresh(output, stamp(path, moved, DATA)) == (True, "nothing changed")


def test_a_changed_source(done):
    path, output, _ = done
    now = stamp(path, {"seed": 0}, DATA)
    changed = copy.deepcopy(now)
    changed["sources"]["pcamlib/errors.py"] = "0"
    assert is_fresh(output, changed) == (False, "pcamlib/errors.py changed")
    changed = copy.deepcopy(now)
    changed["sources"]["pcamlib/training/loop.py"] = "0"
    assert is_fresh(output, changed) == (False, "pcamlib/training/loop.py is new")
    del now["sources"]["pcamlib/errors.py"]
    assert is_fresh(output, now) == (False, "pcamlib/errors.py is no longer used")


def test_the_environment(done, monkeypatch, tmp_path):
    path, output, _ = done
    now = stamp(path, {"seed": 0}, DATA)
    now["environment"]["requirements.lock"] = "0"
    assert is_fresh(output, now)[1].startswith("requirements.lock ")
    monkeypatch.setattr(freshness.platform, "python_version", lambda: "3.99.0")
    assert is_fresh(output, stamp(path, {"seed": 0}, DATA))[1].endswith(" -> 3.99.0")


def test_markdown_does_not_count_and_code_does(done, make):
    path, output, _ = done
    make("00_data", "from pcamlib import errors", title="# Another title, with more prose")
    assert is_fresh(output, stamp(path, {"seed": 0}, DATA))[0]
    make("00_data", "from pcamlib import errors\nprint(1)")
    assert is_fresh(output, stamp(path, {"seed": 0}, DATA)) == (False, "00_data.ipynb changed")


def test_files_touched_after_the_run(done):
    path, output, product = done
    now = stamp(path, {"seed": 0}, DATA)
    product.write_bytes(b"edited")
    assert is_fresh(output, now) == (False, f"{product} was changed after the run")
    product.unlink()
    assert is_fresh(output, now) == (False, f"{product} is missing")
    output.write_text("edited")
    assert is_fresh(output, now) == (False, f"{output} was changed after the run")
    output.unlink()
    assert is_fresh(output, now) == (False, "never run")


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"stamp": {}, "notebook": "0", "products": {}}'])
def test_without_a_readable_record_it_is_stale(done, text):
    path, output, _ = done
    beside = output.with_name("00_data.ipynb.json")
    beside.unlink()
    if text is not None:
        beside.write_text(text)
    assert is_fresh(output, stamp(path, {}, {})) == (False, "no record of what its last run rested on")


def test_a_product_that_was_not_written_is_an_error(done):
    path, output, _ = done
    with pytest.raises(PcamError, match=r"ran to its end, but did not write .*none\.png"):
        write_stamp(output, stamp(path, {}, {}), [Path("none.png")])


def test_run_if_stale(make, tmp_path):
    product = tmp_path / "x.txt"
    path = make("00_data", f"open({str(product)!r}, 'w').write(str(seed))")
    output, said = tmp_path / "out" / "00_data.ipynb", []

    def go(**parameters):
        return notebook.run_if_stale(
            path, parameters, output, timeout=60, data=DATA, products=lambda: [product], report=said.append
        )

    assert (go().ran, said[0]) == (True, "00_data  runs: never run")
    record = json.loads(output.with_name("00_data.ipynb.json").read_text())
    assert list(record["products"]) == [str(product)]
    said.clear()
    assert (go().ran, said) == (False, ["00_data  up to date"])
    second = go(seed=3)
    assert (second.ran, second.reason, product.read_text()) == (True, "parameter seed: default -> 3", "3")
    before = output.read_bytes()
    make("00_data", "1/0")
    with pytest.raises(NotebookError, match="ZeroDivisionError"):
        go(seed=3)
    assert output.read_bytes() == before
    with pytest.raises(NotebookError, match="ZeroDivisionError"):  # a failure is no reason to call it done
        go(seed=3)
