"""`pcam`: every command once, and every bad input: exit code 2, one line that says what to do, nothing half-written."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from pcamlib import cli, config
from pcamlib.data import fetch, folder
from pcamlib.data.layout import inspect, split_path
from pcamlib.errors import DataError
from pcamlib.sources import ROOT
from pcamlib.training import checkpoint, loop, runs

#: A model of 3 thousand weights, a few batches, one thread.
TINY = ("model.name=mlp", "model.crop=32", "model.hidden_units=[1]", "train.threads=1", "train.precision=fp32",
        "train.device=cpu", "loader.batch_size=32")  # fmt: skip
Call = Callable[..., "tuple[int, str, str]"]


def shell(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`pcam ARGUMENTS` in a process of its own."""
    call = [sys.executable, "-m", "pcamlib.cli", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PCAM_")}
    return subprocess.run(call, cwd=cwd, env=environment, capture_output=True, text=True)


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def refused(pcam: Call) -> Callable[..., str]:
    """`refused("train", ...)`: the one line with which bad input is refused; nothing may have been written."""

    def call(*arguments: str | Path) -> str:
        code, _, err = pcam(*arguments)
        assert code == 2 and err.startswith("pcam: ") and err.count("\n") == 1, err
        assert list(Path().iterdir()) == []
        return err

    return call


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder of 24 train and 12 valid patches, to be damaged."""
    rng = np.random.default_rng(0)
    data = tmp_path / "small"
    data.mkdir()
    for split, count in (("train", 24), ("valid", 12)):
        write(data, split, "x", rng.integers(0, 256, (count, 96, 96, 3), np.uint8))
        write(data, split, "y", (np.arange(count) % 2).astype(np.uint8).reshape(-1, 1, 1, 1))
    return data


def write(data: Path, split: str, part: str, values: np.ndarray) -> None:
    with h5py.File(split_path(data, split, part), "w") as file:
        file[part] = values


@pytest.fixture(scope="module")
def trained(synthetic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `a` of `pcam train` in a new process, its twin `b` trained in this one, and `c` with another seed."""
    where, items = tmp_path_factory.mktemp("trained"), [*TINY, "train.steps=3"]
    done = shell("train", "--data", synthetic_dir, "--out", "a", *items, cwd=where)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "SYNTHETIC data" in done.stdout and "from step 0" in done.stdout and "valid AUC" in done.stdout
    for name, seed in (("b", 0), ("c", 1)):
        settings = config.parse(config.recipe("cnn"), [*items, f"seed={seed}"])
        loop.train(settings, synthetic_dir, where / name, report=lambda line: None)
    return where


# Help


def test_help_lists_the_commands() -> None:
    listed = CliRunner().invoke(cli.app, ["--help"])
    assert listed.exit_code == 0
    for group, names in {
        "": ("train", "resume", "evaluate", "data", "runs", "notebook", "journal"),
        "data": ("fetch", "synthetic", "info"),
        "runs": ("table", "diff", "reproduce", "sync"),
        "notebook": ("run",),
        "journal": ("make", "render", "draft", "check"),
    }.items():
        text = CliRunner().invoke(cli.app, [*group.split(), "--help"]).output
        for name in names:
            assert f"\n  {name} " in text
            assert CliRunner().invoke(cli.app, [*group.split(), name, "--help"]).exit_code == 0


def test_a_reader_that_leaves_early_sees_no_traceback(tmp_path: Path) -> None:
    call = [sys.executable, "-m", "pcamlib.cli", "--help"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


# Training, evaluation, runs


def test_train_leaves_a_finished_run(trained: Path, synthetic_dir: Path) -> None:
    run = runs.open_run(trained / "a")
    assert run.success and run.success["steps"] == 3 and run.config.data.dir == str(synthetic_dir)
    assert len(run.predictions().label) == 256
    assert not list(trained.rglob("*.part"))


def test_the_time_limit_replaces_the_length_of_the_recipe(pcam: Call, small: Path) -> None:
    code, _, _ = pcam("train", "--data", small, "--out", "run", "--time-limit", "0.2", *TINY)
    run = runs.open_run("run")
    assert code == 0 and run.success
    assert run.config.train.time_limit == 0.2 and run.config.train.epochs is None and run.config.train.steps is None


@pytest.mark.parametrize("way", ["option", "override", "variable"])
def test_the_data_folder_is_recorded_and_resumed_from_whatever_its_name(
    pcam: Call, small: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = small.rename(small.with_name("a # folder: 1"))  # YAML would read half of it, or a mapping
    given = {"option": ["--data", odd], "override": [f'data.dir="{odd}"'], "variable": []}[way]
    if way == "variable":
        monkeypatch.setenv("PCAM_DATA", str(odd))
    assert pcam("train", *TINY, "train.steps=1", "--out", "run", *given)[0] == 0
    run = runs.open_run("run")
    assert run.config.data.dir == str(odd)
    assert run.provenance["synthetic"] is None
    (run.path / "SUCCESS").unlink()
    assert pcam("resume", "run")[0] == 0 and run.success


def test_evaluate_prints_every_metric_and_stores_what_it_rests_on(pcam: Call, trained: Path) -> None:
    run = shutil.copytree(trained / "a", Path("run"))
    code, out, err = pcam("evaluate", run, "--split", "test")
    assert code == 0 and err == ""
    assert "n = 256 patches" in out and "stored: run/predictions_test.npz" in out
    report = json.loads((run / "report_test.json").read_text())
    for name, entry in report["metrics"].items():
        assert f"{name:9s} {entry['value']:.4f}  95 % interval {entry['interval'][0]:.4f}" in out
    stored = runs.open_run(run).predictions("test").report()
    assert {key: report[key] for key in stored} == stored


def test_resume_goes_on_where_a_run_was_interrupted(pcam: Call, trained: Path, synthetic_dir: Path) -> None:
    def stop(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    settings = config.parse(config.recipe("cnn"), [*TINY, "train.steps=3", "train.checkpoint_every=1", "seed=0"])
    with pytest.raises(KeyboardInterrupt):
        loop.train(settings, synthetic_dir, "run", report=lambda line: None, on_step=stop)
    code, out, err = pcam("train", "--data", synthetic_dir, "--out", "run", *TINY)
    assert code == 2 and "already holds an unfinished run; `pcam resume run` continues it" in err
    code, out, err = pcam("resume", "run")
    assert code == 2 and "the run does not say where its data lie; give --data DIR" in err
    code, out, err = pcam("resume", "run", "--data", synthetic_dir)
    assert code == 0 and "from step 2" in out
    code, out, err = pcam("resume", "run", "--data", synthetic_dir)
    assert code == 0 and "already finished after 3 steps" in out
    code, out, err = pcam("runs", "diff", trained / "a", "run")
    assert "config: train.checkpoint_every: None | 1" in out and "weights are bitwise equal all the same" in out


def test_runs_diff_says_equal_with_0_and_names_the_first_difference_with_1(pcam: Call, trained: Path) -> None:
    code, out, _ = pcam("runs", "diff", trained / "a", trained / "b")
    assert code == 0 and "equal" in out and "differs" not in out and out.count("\n") == 1
    code, out, _ = pcam("runs", "diff", trained / "a", trained / "c")
    assert code == 1 and out.startswith("first difference: config: seed: 0 | 1\n") and "step 1 loss" in out


def test_runs_table_lists_every_run_and_groups_seeds(pcam: Call, trained: Path, tmp_path: Path) -> None:
    code, out, _ = pcam("runs", "table", trained, "--csv", tmp_path / "table.csv")
    assert code == 0 and len(out.splitlines()) == 4 and out.count("finished") == 3
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 4
    code, out, _ = pcam("runs", "table", trained, "--by", "config")
    assert code == 0 and "a and b are one run, their weights are equal" in out
    code, _, err = pcam("runs", "table", trained, "--by", "model")
    assert code == 2 and "--by model: runs are grouped by 'config' only" in err
    assert pcam("runs", "table") == (0, "no runs here\n", "")


def test_runs_reproduce_says_equal_with_0_and_different_with_1(
    pcam: Call, trained: Path, synthetic_dir: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained / "b", tmp_path / "b"))
    code, out, _ = pcam("runs", "reproduce", run, "--data", synthetic_dir)
    assert code == 0 and "REPRODUCED: metrics of all 3 steps" in out and (tmp_path / "b-again" / "SUCCESS").exists()
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"loss": 0.', '"loss": 1.', 1))
    code, out, _ = pcam("runs", "reproduce", run, "--data", synthetic_dir, "--out", "other")
    assert code == 1 and "NOT REPRODUCED\nfirst difference: metrics: step 1 loss: 1." in out


def test_runs_sync_sends_nothing_unasked(pcam: Call, trained: Path) -> None:
    assert pcam("runs", "sync", trained) == (0, "0 wandb runs, 0 KiB, to be sent; --send sends them\n", "")
    assert pcam("runs", "sync")[0] == 2


# Data


def test_data_info(pcam: Call, synthetic_dir: Path) -> None:
    code, out, err = pcam("data", "info", "--data", synthetic_dir)
    assert code == 0 and err == ""
    first = out.splitlines()[1].split()
    labels = h5py.File(split_path(synthetic_dir, "train", "y"))["y"][:]
    assert first[:6] == ["train", "512", str(labels.sum()), str((labels == 0).sum()), "uint8", "contiguous"]


def test_data_synthetic_writes_the_layout_and_leaves_it_alone_the_second_time(pcam: Call) -> None:
    call = ("data", "synthetic", "d", "--train", "20", "--valid", "10", "--test", "5", "--seed", "3")
    code, out, err = pcam(*call, "--course", "c")
    assert code == 0 and err == "" and "train: 20 synthetic patches in" in out
    assert inspect(split_path("d", "valid", "x"), "x").shape == (10, 96, 96, 3)
    assert inspect(split_path("c", "train", "x"), "x").dtype == np.float32
    before = tree(Path("d"))
    code, out, _ = pcam(*call)
    assert code == 0 and "train: 20 synthetic patches are there" in out and tree(Path("d")) == before


def test_data_synthetic_refuses(refused: Callable[..., str], small: Path) -> None:
    assert "cannot write 0 patches" in refused("data", "synthetic", "d", "--train", "0")
    before = tree(small)
    assert "exists and is not synthetic" in refused("data", "synthetic", small)
    assert tree(small) == before


def test_data_fetch(pcam: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(fetch, "fetch", seen.append)
    assert pcam("data", "fetch", "there")[0] == 0 and seen == [Path("there")]

    def breaks(dest: Path) -> None:
        raise DataError("the connection broke off; run again to go on from there")

    monkeypatch.setattr(fetch, "fetch", breaks)
    assert pcam("data", "fetch", "there") == (2, "", "pcam: the connection broke off; run again to go on from there\n")


# Journal


def test_journal_check_exit_codes(pcam: Call) -> None:
    Path("root").mkdir()
    check = ("journal", "check", "--root", "root")
    code, out, _ = pcam(*check)
    assert code == 1 and "fault: JOURNAL.md: missing; run `make journal`" in out
    code, out, _ = pcam("journal", "render", "--root", "root")
    assert code == 0 and [Path(line).name for line in out.splitlines()] == ["JOURNAL.md", "JOURNAL.html"]
    code, out, _ = pcam(*check)
    assert code == 0 and "\n0 faults, " in out and "open: Question 1, 1. Sources" in out
    assert pcam(*check, "--strict")[0] == 1
    with open("root/JOURNAL.md", "a") as journal:
        journal.write("our AUC is the best\n")
    code, out, _ = pcam(*check)
    assert code == 1 and "reads 'our AUC is the best' where the evidence gives '(nothing)'" in out
    code, out, _ = pcam(*check, "--json")
    assert code == 1 and json.loads(out)["findings"][0]["kind"] == "journal" and json.loads(out)["form"] is None


def test_a_filled_form_is_judged_wherever_it_lies(pcam: Call) -> None:
    blank = (ROOT / "journal/templates/dtu_exam.md").read_text()
    Path("filled.md").write_text(blank.replace("--- question 12 fill here ---", "word " * 60))
    code, out, _ = pcam("journal", "check", "filled.md")
    assert code == 1 and out.endswith("31 answers of 31; 30 fall short\n")
    code, out, _ = pcam("journal", "check", "filled.md", "--json")
    form = json.loads(out)["form"]
    assert code == 1 and not form["ok"] and form["questions"][11]["problems"] == [] == form["problems"]
    assert form["questions"][11]["words"] == 60 and form["questions"][11]["words_wanted"] == [50, 100]
    code, _, err = pcam("journal", "check", "filled.md", "--template", "assignment_1")
    assert code == 2 and "assignment_1 states no limits" in err
    code, _, err = pcam("journal", "check", "none.md")
    assert code == 2 and "none.md: no such file" in err
    code, _, err = pcam("journal", "check", "dtu_exm", "--root", ".")
    assert code == 2 and "there is no journal or form 'dtu_exm'; did you mean 'dtu_exam'?" in err


def test_a_draft_is_taken_over_once(pcam: Call) -> None:
    Path("root").mkdir()
    code, out, _ = pcam("journal", "draft", "q7_3", "--root", "root")
    assert code == 0 and out.endswith("root/journal/prose/q7_3.md\n")
    code, _, err = pcam("journal", "draft", "q7_3", "--root", "root")
    assert code == 2 and "journal/prose/q7_3.md: is there already" in err


# Bad input


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing x": (lambda d: split_path(d, "valid", "x").unlink(), "split_valid_x.h5: missing; `pcam data fetch"),
    "missing y": (lambda d: split_path(d, "train", "y").unlink(), "split_train_y.h5: missing; `pcam data fetch"),
    "lengths": (
        lambda d: write(d, "train", "y", np.zeros((23, 1, 1, 1), np.uint8)),
        "24 patches but 23 labels in the y file",
    ),
    "truncated x": (lambda d: half(split_path(d, "train", "x")), "split_train_x.h5: truncated"),
    "truncated y": (lambda d: half(split_path(d, "valid", "y")), "split_valid_y.h5: truncated"),
    "empty": (lambda d: os.truncate(split_path(d, "train", "x"), 0), "split_train_x.h5: empty file; fetch it again"),
    "shape": (
        lambda d: write(d, "train", "x", np.zeros((24, 64, 64, 3), np.uint8)),
        "'x' has shape (24, 64, 64, 3), expected (N, 96, 96, 3)",
    ),
    "dtype": (
        lambda d: write(d, "train", "x", np.zeros((24, 96, 96, 3), np.float64)),
        "'x' is float64, expected uint8 or float32",
    ),
    "key": (lambda d: write_as(d, "images"), "no array 'x'; known: images"),
    "labels": (
        lambda d: write(d, "train", "y", np.full((24, 1, 1, 1), 2, np.uint8)),
        "label 2 in row 0 (24 such rows)",
    ),
    "one class": (
        lambda d: write(d, "valid", "y", np.ones((12, 1, 1, 1), np.uint8)),
        "validation needs both classes",
    ),
    "web page": (lambda d: web_page(d, pack=False), "split_train_x.h5.gz: a web page saved under this name"),
    "packed web page": (lambda d: web_page(d, pack=True), "split_train_x.h5.gz: a web page saved under this name"),
}


def write_as(data: Path, key: str) -> None:
    with h5py.File(split_path(data, "train", "x"), "w") as file:
        file[key] = np.zeros((24, 96, 96, 3), np.uint8)


def web_page(data: Path, pack: bool) -> None:
    path = split_path(data, "train", "x")
    path.unlink()
    page = b"<!DOCTYPE html><html>Please log in</html>"
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(page) if pack else page)


@pytest.mark.parametrize("kind", DAMAGE)
def test_bad_data_are_refused(refused: Callable[..., str], small: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(small)
    before = tree(small)
    assert message in refused("train", "--data", small, "--out", "run", *TINY, "train.steps=1")
    assert tree(small) == before
    if kind not in ("missing x", "one class"):  # a folder may hold one split; one class is no matter for a count
        assert message in refused("data", "info", "--data", small)


@pytest.mark.parametrize("kind", ["truncated x", "web page"])
def test_in_a_process_of_its_own_it_is_one_line_too(small: Path, tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(small)
    before = tree(tmp_path)
    done = shell("train", "--data", small, "--out", "run", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("pcam: ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == "" and tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "train.stepz=3"], "unknown key 'train.stepz'; did you mean 'train.steps'?"),
        (["train", "lr=1e-3"], "unknown key 'lr'; did you mean 'optimizer.lr'?"),
        (["train", "train.steps=many"], "train.steps='many': Input should be a valid integer"),
        (["train", "steps"], "'steps' is no override; write key=value"),
        (["train", "--time-limit", "-1"], "train.time_limit=-1.0: Input should be greater than 0"),
        (["train", "--recipe", "mpl"], "unknown recipe 'mpl'; did you mean 'mlp'?"),
        (["train", "--recipe", "none.yaml"], "none.yaml: no such configuration file"),
        (["notebook", "run", "00", "-p", "epoch=2"], "00_data has no parameter 'epoch'; did you mean 'epochs'?"),
        (["notebook", "run", "00", "-p", "epochs=two"], "parameter epochs='two': input should be a valid integer"),
        (["notebook", "run", "00", "-p", "epochs=1e-3"], "parameter epochs=0.001: input should be a valid integer"),
        (["notebook", "run", "00", "-p", "epochs"], "'epochs' is no parameter; write name=value"),
        (["notebook", "run", "00", "-p", "data_dir=nowhere"], "parameter data_dir is set by --data DIR here"),
        (["notebook", "run", "00_dat"], "unknown notebook '00_dat'"),
        (["notebook", "run", "77"], "unknown notebook '77'"),
        (["notebook", "run", "00", "--scale", "smokey"], "unknown scale 'smokey'; did you mean 'smoke'?"),
        (["journal", "make", "--scale", "smokey"], "unknown scale 'smokey'; did you mean 'smoke'?"),
    ],
)
def test_bad_settings_are_refused_before_any_data_are_made(
    refused: Callable[..., str], arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "generate", lambda *_, **__: pytest.fail("patches were generated"))
    assert message in refused(*arguments)


def test_what_is_not_there_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.mkdir()
    for command in (["train"], ["data", "info"], ["notebook", "run", "00"], ["journal", "make"]):
        assert f"{nowhere}: no such folder; --data or PCAM_DATA must name" in refused(*command, "--data", nowhere)
        assert "train_x.h5: missing; `pcam data fetch" in refused(*command, "--data", empty)
    for command in (["resume"], ["evaluate"], ["runs", "diff", empty]):
        assert "no run here (no config.yaml); `pcam runs table`" in refused(*command, nowhere)
    assert "no such template" in refused("journal", "render", "essay", "--root", empty)
    assert list(empty.iterdir()) == []


def flip(run: Path, other: Path) -> None:
    path = run / "checkpoints" / "best.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "damaged: its bytes do not match the digest in its header"),
        (lambda run, other: shutil.copy(other / "checkpoints/best.safetensors", run / "checkpoints"), "another model"),
        (lambda run, other: (run / "checkpoints/best.safetensors").unlink(), "no such checkpoint"),
        (lambda run, other: (run / "checkpoints/best.safetensors").write_bytes(b""), "empty file"),
        (lambda run, other: (run / "config.yaml").write_text("model: ["), "not valid YAML"),
    ],
)
def test_evaluate_refuses_a_checkpoint_that_is_not_the_run_s(
    pcam: Call, trained: Path, small: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    settings = config.parse(config.recipe("cnn"), [*TINY, "model.hidden_units=[2]", "train.steps=1"])
    other = loop.train(settings, small, tmp_path / "other", report=lambda line: None)
    run = Path(shutil.copytree(trained / "a", tmp_path / "run"))
    damage(run, other.path)
    before = tree(run)
    code, out, err = pcam("evaluate", run)
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err
    assert tree(run) == before, "predictions and report are those of the whole checkpoint"


def test_evaluate_of_what_cannot_be_evaluated(pcam: Call, trained: Path, small: Path) -> None:
    before = tree(trained / "a")
    code, _, err = pcam("evaluate", trained / "a", "--split", "vald")
    assert code == 2 and "unknown split 'vald'; did you mean 'valid'?" in err
    code, _, err = pcam("evaluate", trained / "a", "--split", "test", "--data", small)
    assert code == 2 and "split_test_x.h5: missing" in err
    assert tree(trained / "a") == before


def test_a_taken_run_folder_is_left_alone(pcam: Call, trained: Path, synthetic_dir: Path) -> None:
    before = tree(trained / "a")
    code, _, err = pcam("train", "--data", synthetic_dir, "--out", trained / "a", *TINY)
    assert code == 2 and "already holds a finished run; choose another --out" in err
    assert tree(trained / "a") == before


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    pcam: Call, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, target = checkpoint.atomic_path, Path("run/checkpoints/best.safetensors")

    @contextmanager
    def full(path: Path) -> Iterator[Path]:
        with real(path) as part:
            part.symlink_to("/dev/full")
            yield part

    monkeypatch.setattr(checkpoint, "atomic_path", full)
    code, _, err = pcam("train", "--data", small, "--out", "run", *TINY, "train.steps=1")
    assert code == 2 and err == f"pcam: {target}: the disk is full or over quota; free some space and run again\n"
    assert not target.exists() and not list(Path().rglob("*.part"))
    run = runs.open_run("run")
    assert run.success is None and run.provenance["attempts"][-1]["exit"] == "failed"
