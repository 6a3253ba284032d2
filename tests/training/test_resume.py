"""The bitwise promise: killed at any step and resumed, a run ends exactly as if nothing had happened.

Every training runs in a process of its own, forked from a server that has imported torch once, and every kill is a
SIGKILL: nothing is flushed, nothing is cleaned up.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcamlib.config import Config
from pcamlib.data.layout import split_path
from pcamlib.data.patches import mask_path, open_split
from pcamlib.errors import RunError
from pcamlib.files import write_json
from pcamlib.training import checkpoint, loop, runs

STEPS = 30
#: Several epochs of 8 steps; dropout draws from torch's generator, so that its state matters.
ITEMS = (
    f"train.steps={STEPS}",
    "train.checkpoint_every=1",
    "model.dropout_rate=0.2",
    "loader.sampler=balanced",
    "loader.augment=[d4, stain]",
    "schedule.name=onecycle",
)
KILLED = -signal.SIGKILL

Train = Callable[..., runs.Run]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(name: str, number: int, torn: bool) -> Callable[[Path], Any]:
    """An `atomic_path` in which the process dies between writing and renaming the `number`th file called `name`."""
    real, seen = checkpoint.atomic_path, itertools.count(1)

    @contextmanager
    def atomic_path(path: Path) -> Iterator[Path]:
        with real(path) as part:
            yield part
            if path.name == name and next(seen) == number:
                if torn:
                    os.truncate(part, part.stat().st_size // 2)
                die()

    return atomic_path


def attempt(config: Config, data: Path, out: Path, resume: bool, kill: dict[str, Any], cores: int | None) -> None:
    """What a child does: train or resume, and die after a `step`, in writing the file `name`, or `before` SUCCESS."""
    os.environ.pop("OMP_NUM_THREADS", None)  # it would decide before the cores do
    if cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    if "name" in kill:
        checkpoint.atomic_path = dying(**kill)
    if "before" in kill:
        real = loop.write_json
        loop.write_json = lambda path, value: die() if path.name == kill["before"] else real(path, value)

    def on_step(step: int) -> None:
        if step == kill.get("step"):
            die()

    loop.train(config, data, out, resume=resume, report=lambda line: None, on_step=on_step)


@pytest.fixture(scope="module")
def child(forkserver: ForkServerContext) -> Callable[..., int | None]:
    """`child(config, data, out, resume=, step=...)`: one attempt in a process of its own; returns its exit code."""

    def start(
        config: Config, data: Path, out: Path, *, resume: bool = False, cores: int | None = None, **kill: Any
    ) -> Any:
        process = forkserver.Process(target=attempt, args=(config, data, out, resume, kill, cores))
        process.start()
        return process

    def run(*place: Any, **how: Any) -> int | None:
        process = start(*place, **how)
        process.join(120)
        code = process.exitcode
        process.kill()
        return code

    run.start = start  # type: ignore[attr-defined]  # for two at a time

    return run


@pytest.fixture(scope="module")
def straight(
    child: Callable[..., int | None], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Config], runs.Run]:
    """`straight(config)`: the run that nobody interrupted."""
    done: dict[str, runs.Run] = {}

    def trained(config: Config) -> runs.Run:
        if config.digest() not in done:
            out = tmp_path_factory.mktemp("straight") / "run"
            assert child(config, data, out) == 0
            done[config.digest()] = runs.open_run(out)
        return done[config.digest()]

    return trained


def all_of_it(run: runs.Run) -> dict[str, Any]:
    """Everything that must be equal, time and attempts left out."""
    assert run.success is not None, f"{run.path} did not succeed"
    predictions = run.predictions()
    raw = b"".join(a.tobytes() for a in (predictions.index, predictions.label, predictions.probability))
    last, meta = checkpoint.load(run.last)
    del meta["progress"]["elapsed"]
    return {
        "success": {k: v for k, v in run.success.items() if k != "seconds"},
        "metrics": [{k: v for k, v in row.items() if k not in ("seconds", "attempt")} for row in run.metrics()],
        "predictions": (predictions.split, predictions.fingerprint, hashlib.sha256(raw).hexdigest()),
        "report": (run.path / "report_valid.json").read_bytes(),
        "last": (checkpoint.tensor_digest(last), meta),
        "best": checkpoint.tensor_digest(checkpoint.load(run.best)[0]),
    }


def differing(run: runs.Run, whole: runs.Run) -> list[str]:
    """Names of what differs; also of files that a killed writer left behind."""
    a, b = all_of_it(run), all_of_it(whole)
    return [name for name in a if a[name] != b[name]] + [str(p.name) for p in run.path.rglob("*.part")]


def causes_and_effects(a: runs.Run, b: runs.Run) -> list[runs.Difference]:
    """`runs.diff`, without the code's digest: somebody may edit the package while its tests run."""
    return [entry for entry in runs.diff(a, b) if entry.what != "code.digest"]


def test_the_uninterrupted_run_is_worth_comparing(straight: Any, tiny: Any) -> None:
    run = straight(tiny(*ITEMS))
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["epoch"] == 3 and run.success["evaluations"] == 4
    assert len({row["loss"] for row in rows}) == STEPS


def test_killed_after_any_step(child: Any, straight: Any, tiny: Any, data: Path, tmp_path: Path) -> None:
    config = tiny(*ITEMS)
    whole = straight(config)
    later = np.random.default_rng(2).choice(np.arange(21, STEPS), 5, replace=False)

    def ended(steps: list[int], how: Callable[[int], dict[str, Any]]) -> dict[int, int | None]:
        # two at a time from this one thread: multiprocessing loses exit codes when threads start children
        codes: dict[int, int | None] = {}
        for first in range(0, len(steps), 2):
            pair = {
                step: child.start(config, data, tmp_path / str(step), **how(step)) for step in steps[first : first + 2]
            }
            for step, process in pair.items():
                process.join(120)
                codes[step] = process.exitcode
        return codes

    steps = [*range(1, 21), *map(int, sorted(later))]
    assert set(ended(steps, lambda step: {"step": step}).values()) == {KILLED}
    for step in steps:
        run = runs.open_run(tmp_path / str(step))
        assert run.success is None
        assert checkpoint.load(run.last)[1]["progress"]["step"] == step
    assert set(ended(steps, lambda step: {"resume": True}).values()) == {0}
    different = {step: differing(runs.open_run(tmp_path / str(step)), whole) for step in steps}
    assert {step: names for step, names in different.items() if names} == {}


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn"])
@pytest.mark.parametrize(
    ("name", "number"), [("last.safetensors", 1), ("last.safetensors", 6), ("best.safetensors", 2)]
)
def test_killed_while_a_checkpoint_is_written(
    child: Any, straight: Any, tiny: Any, data: Path, tmp_path: Path, name: str, number: int, torn: bool
) -> None:
    """Between the temporary file and its renaming: the checkpoint before it still counts (none before the first)."""
    config, out = tiny(*ITEMS), tmp_path / "run"
    assert child(config, data, out, name=name, number=number, torn=torn) == KILLED
    run = runs.open_run(out)
    assert len(list(run.last.parent.glob(".*.part"))) == 1, "it died in mid-write"
    assert run.last.exists() == (number > 1)
    assert child(config, data, out, resume=True) == 0
    assert differing(run, straight(config)) == []


def test_killed_before_the_first_checkpoint_and_again_and_again(
    child: Any, straight: Any, tiny: Any, data: Path, tmp_path: Path
) -> None:
    """Steps since the last checkpoint come again: no row twice, and no step has another result."""
    config, out = tiny(*ITEMS, "train.checkpoint_every=7"), tmp_path / "run"
    assert child(config, data, out, step=3) == KILLED
    run = runs.open_run(out)
    assert not run.last.exists() and [row["step"] for row in run.metrics()] == [1, 2, 3]
    assert child(config, data, out, resume=True, step=12) == KILLED
    assert run.metrics()[-1]["step"] == 12 and checkpoint.load(run.last)[1]["progress"]["step"] == 7
    assert child(config, data, out, resume=True, step=20) == KILLED
    assert child(config, data, out, resume=True) == 0
    assert [row["step"] for row in run.metrics()] == list(range(1, STEPS + 1))
    assert [row["attempt"] for row in run.metrics()] == [1] * 7 + [2] * 7 + [3] * 16
    assert [entry["exit"] for entry in run.provenance["attempts"]] == [None, None, None, "ok"]
    assert differing(run, straight(config)) == []


def test_how_often_checkpoints_are_written_changes_nothing(straight: Any, tiny: Any) -> None:
    often, seldom = straight(tiny(*ITEMS)), straight(tiny(*ITEMS, "train.checkpoint_every=7"))
    assert often.success["weights"] == seldom.success["weights"]
    assert often.success["best"] == seldom.success["best"]


def test_killed_between_the_last_step_and_success(
    child: Any, straight: Any, tiny: Any, data: Path, tmp_path: Path
) -> None:
    config = tiny(*ITEMS)
    for name, kill in {"step": {"step": STEPS}, "success": {"before": "SUCCESS"}}.items():
        assert child(config, data, tmp_path / name, **kill) == KILLED
        assert runs.open_run(tmp_path / name).success is None
        assert child(config, data, tmp_path / name, resume=True) == 0
        assert differing(runs.open_run(tmp_path / name), straight(config)) == []


def test_a_run_that_lost_patience_does_not_find_it_again(child: Any, tiny: Any, data: Path, tmp_path: Path) -> None:
    """Killed after its last checkpoint, before SUCCESS: the end that it had reached is still the end."""
    config = tiny("train.steps=60", "train.evaluate_every=2", "train.patience=2", "optimizer.lr=0.3")
    assert child(config, data, tmp_path / "a") == 0
    end = runs.open_run(tmp_path / "a").success["steps"]
    assert end < 60
    assert child(config, data, tmp_path / "b", step=end) == KILLED
    assert child(config, data, tmp_path / "b", resume=True) == 0
    assert differing(runs.open_run(tmp_path / "b"), runs.open_run(tmp_path / "a")) == []


def test_twins_in_two_processes(child: Any, straight: Any, tiny: Any, data: Path, tmp_path: Path) -> None:
    config = tiny(*ITEMS)
    whole = straight(config)
    assert child(config, data, tmp_path / "twin") == 0
    twin = runs.open_run(tmp_path / "twin")
    assert differing(twin, whole) == []
    assert causes_and_effects(twin, whole) == []
    assert child(config.override("seed=1"), data, tmp_path / "other") == 0
    found = causes_and_effects(twin, runs.open_run(tmp_path / "other"))
    assert [str(found[0]), found[1].kind, found[1].what] == ["config: seed: 0 | 1", "metrics", "step 1 loss"]


def test_the_cnn_keeps_the_promise_too(child: Any, straight: Any, tiny: Any, data: Path, tmp_path: Path) -> None:
    """bf16 where the CPU has it; channels_last weights, batch normalisation, gradient clipping."""
    config = tiny(
        "model.name=cnn", "model.width=8", "model.dropout_rate=0.1", "loader.augment=[d4]", "train.precision=auto",
        "train.steps=12", "train.checkpoint_every=1", "train.grad_clip=1.0", "optimizer.lr=1e-2",
    )  # fmt: skip
    whole = straight(config)
    assert child(config, data, tmp_path / "twin") == 0
    assert differing(runs.open_run(tmp_path / "twin"), whole) == []
    assert child(config, data, tmp_path / "killed", step=5) == KILLED
    assert child(config, data, tmp_path / "killed", resume=True) == 0
    assert differing(runs.open_run(tmp_path / "killed"), whole) == []


def test_sgd_keeps_it_too(child: Any, straight: Any, tiny: Any, data: Path, tmp_path: Path) -> None:
    config = tiny(*ITEMS, "optimizer.name=sgd", "optimizer.lr=1e-3", "loader.sampler=shuffle")
    assert child(config, data, tmp_path / "killed", step=11) == KILLED
    assert child(config, data, tmp_path / "killed", resume=True) == 0
    assert differing(runs.open_run(tmp_path / "killed"), straight(config)) == []


# Where the promise ends


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_another_thread_count_is_named_before_floating_point(child: Any, tiny: Any, data: Path, tmp_path: Path) -> None:
    """The course's MLP: 27,648 inputs, whose sums two threads split."""
    config = tiny("model.crop=96", "model.hidden_units=[64, 32]", "train.threads=null", "train.steps=6")
    for cores in (1, 2):
        assert child(config, data, tmp_path / str(cores), cores=cores) == 0
    found = causes_and_effects(*(runs.open_run(tmp_path / str(cores)) for cores in (1, 2)))
    assert str(found[0]) == "provenance: machine.threads: 1 | 2"
    kinds = [kind for kind, _ in itertools.groupby(entry.kind for entry in found)]
    assert kinds == ["provenance", "metrics", "weights"]
    metrics = [entry for entry in found if entry.kind == "metrics"]
    assert len(metrics) == 1 and metrics[0].what.startswith("step "), "the first step that differs, and only it"
    tensors = [entry.what for entry in found if entry.kind == "weights"]
    assert any(what.startswith("model.network.layers.0.weight (largest gap ") for what in tensors)


def test_a_resumed_run_says_that_its_promise_ended(tiny: Any, data: Path, tmp_path: Path) -> None:
    config, said = tiny("train.steps=8", "train.checkpoint_every=1"), list[str]()

    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(config, data, tmp_path / "run", on_step=stop)
    run = runs.open_run(tmp_path / "run")
    whole = run.provenance
    assert whole["attempts"][0]["exit"] == "failed"
    whole["attempts"][0]["machine"]["capability"] = "AVX2"  # as if it had begun on another node
    runs.write_json(run.path / "provenance.json", whole)
    loop.resume(run.path, data, report=said.append)
    assert any("bitwise equality" in line and "machine.capability was AVX2" in line for line in said)
    loop.train(config, data, tmp_path / "whole", report=said.append)
    found = causes_and_effects(run, runs.open_run(tmp_path / "whole"))
    assert found[0].what == "machine.capability" and {entry.kind for entry in found} == {"provenance"}


def test_a_fresh_interpreter_is_a_twin_and_another_cpu_capability_is_named_first(
    straight: Any, tiny: Any, data: Path, tmp_path: Path
) -> None:
    """Two fresh interpreters with other string hashes; one of them is told to use no vector instructions."""
    (tmp_path / "config.yaml").write_text(tiny(*ITEMS).yaml(), encoding="utf-8")
    code = "import sys; from pcamlib import config; from pcamlib.training.loop import train; "
    code += "train(config.parse(config.read_yaml(sys.argv[1])), *sys.argv[2:], report=str)"

    def fresh(name: str, **environment: str) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-c", code, tmp_path / "config.yaml", data, tmp_path / name]
        return subprocess.Popen(arguments, env={**os.environ, **environment})

    started = [
        fresh("native", PYTHONHASHSEED="1"),
        fresh("plain", PYTHONHASHSEED="2", ATEN_CPU_CAPABILITY="default"),
    ]
    assert [process.wait(120) for process in started] == [0, 0]
    assert differing(runs.open_run(tmp_path / "native"), straight(tiny(*ITEMS))) == []
    found = causes_and_effects(runs.open_run(tmp_path / "native"), runs.open_run(tmp_path / "plain"))
    assert (found[0].kind, found[0].what) == ("provenance", "machine.capability")
    assert "DEFAULT" in found[0].b and "ATEN_CPU_CAPABILITY=default" in found[0].b
    assert {entry.kind for entry in found} <= {"provenance", "metrics", "weights"}


def test_another_data_set_refuses_to_go_on(child: Any, tiny: Any, data: Path, make_split: Any, tmp_path: Path) -> None:
    folder, config = tmp_path / "data", tiny(*ITEMS)
    shutil.copytree(data, folder)
    assert child(config, folder, tmp_path / "run", step=3) == KILLED
    run = runs.open_run(tmp_path / "run")
    before = run.provenance, run.last.read_bytes()
    make_split(folder, "valid", np.arange(128) % 2, seed=9)
    with pytest.raises(RunError, match="the valid patches are not those that this run began with"):
        loop.train(config, folder, run.path, resume=True)
    with open(split_path(folder, "train", "x"), "r+b") as file:  # one pixel of another file is enough
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(RunError, match="the train patches are not those"):
        loop.train(config, folder, run.path, resume=True)
    assert (run.provenance, run.last.read_bytes()) == before, "a refused attempt leaves no trace"
    assert child(config, data, run.path, resume=True) == 0  # the same patches elsewhere will do


def test_the_children_die_of_nothing_else(child: Any, tiny: Any, tmp_path: Path) -> None:
    """The harness: a child that fails by itself is not taken for a killed one."""
    assert child(tiny(), tmp_path / "no data", tmp_path / "run") == 1
    assert not (tmp_path / "run").exists(), "bad data leave no run folder behind"


def test_a_run_goes_on_only_with_the_rows_it_began_with(
    tmp_path: Path, make_split: Callable[..., None], tiny: Callable[..., Config]
) -> None:
    for split, seed in (("train", 1), ("valid", 2)):
        make_split(tmp_path / "data", split, np.arange(64) % 2, seed)
    patches = open_split(tmp_path / "data", "train")

    def audited(*rows: int) -> None:
        mask = {"fingerprint": patches.fingerprint, "beside": {}, "rules": {"poison": list(rows)}}
        write_json(mask_path(patches.stored), mask)

    def cut(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    audited(3, 4)
    config = tiny("data.clean=[poison]", "train.checkpoint_every=1")
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "data", tmp_path / "run", on_step=cut)
    audited(3, 5)
    with pytest.raises(RunError, match="the audit leaves out other patches than when this run began"):
        loop.resume(tmp_path / "run", tmp_path / "data")
    audited(3, 4)
    assert loop.resume(tmp_path / "run", tmp_path / "data").success
