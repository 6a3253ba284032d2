"""Several processes are one training: the same loss, weights and predictions; no hang, whoever dies.

Processes are forked from a server that has imported torch once, and find each other as under torchrun; what torchrun
itself does is tried with torchrun.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from pcamlib.config import Config
from pcamlib.data.sampling import share
from pcamlib.errors import ConfigError, PcamError, RunError
from pcamlib.models.cnn import CNN
from pcamlib.models.d4 import D4CNN
from pcamlib.training import checkpoint, distributed, loop, runs, state
from pcamlib.training.reproduce import reproduce
from pcamlib.training.reproduce import same as same_outcome

KILLED = -signal.SIGKILL
#: 256 patches in batches of 50: shares of 25, or 16 and 17; the last batch of an epoch, at step 6, has 6.
COMMON = (
    "train.steps=8", "train.checkpoint_every=1", "train.evaluate_every=3", "loader.batch_size=50",
    "loader.augment=[d4, stain]", "schedule.name=onecycle", "train.grad_clip=0.5", "train.label_smoothing=0.1",
    "optimizer.name=sgd", "optimizer.lr=0.02",
)  # fmt: skip
#: A rounding error grows with the rate: at 0.02 from 1e-7 to 2e-4 of the loss within 20 steps of 30 patches.
CONVOLUTIONS = (*COMMON, "model.name=cnn", "model.width=8", "optimizer.lr=0.002")
EQUIVARIANT = (*CONVOLUTIONS, "model.name=d4")
DROPOUT = (*COMMON, "model.dropout_rate=0.2", "optimizer.name=adamw", "optimizer.lr=1e-3", "loader.sampler=balanced")


class Spoiled(state.Training):
    """A training in which something happens: `kill`, `raise`, `drift` at a step of the last process, `nan` in row 7.

    `notice` is USR1 at a step of the process `whose`.
    """

    what, at, whose = "", 0, 0

    def step(self, batch: Any, progress: float) -> dict[str, float]:
        if (batch.rows == 7).any() and self.what == "nan":
            images = batch.images.float()
            images[batch.rows == 7, 0, 3, 3] = torch.nan
            batch = batch._replace(images=images)
        row = super().step(batch, progress)
        if self.what == "notice" and self.world.rank == self.whose and self.progress.step + 1 == self.at:
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.world.rank == self.world.size - 1 and self.progress.step + 1 == self.at:
            if self.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "raise":
                raise PcamError("process 1 met a full disk")
            if self.what == "drift":
                with torch.no_grad():
                    next(self.model.parameters()).view(-1)[0] += 1e-7
        return row


def enter(rank: int, size: int, port: int) -> None:
    """What torchrun tells a process."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in told.items()}


def attempt(
    rank: int, size: int, port: int, config: Config, data: list[Path], out: Path, resume: bool, plan: dict[str, Any]
) -> None:
    """One process: what it reports, or the error that ended it, goes into OUT.RANK."""
    if size > 1:
        enter(rank, size, port)
    if tick := plan.pop("tick", None):
        ticks = itertools.count(0, tick * (1000 if rank else 1))
        loop.time = SimpleNamespace(monotonic=lambda: next(ticks))  # type: ignore[assignment]
    for name, value in plan.items():
        setattr(Spoiled, name, value)
    loop.Training = Spoiled  # type: ignore[misc]
    said: list[str] = []
    try:
        loop.train(config, data[rank % len(data)], out, resume=resume, report=said.append)
    except PcamError as error:
        said.append(f"{type(error).__name__}: {error}")
        raise SystemExit(2) from None
    finally:
        Path(f"{out}.{rank}").write_text("\n".join(said))


def work(rank: int, size: int, port: int, target: Callable[..., None], *arguments: Any) -> None:
    """`target` in a group of processes."""
    enter(rank, size, port)
    with distributed.join("cpu"):
        target(*arguments)


@pytest.fixture(scope="module")
def started(forkserver: ForkServerContext) -> Callable[..., list[int | None]]:
    """`started(size, target, ...)`: exit codes of `size` processes; one that hangs is killed and has none."""

    def start(size: int, target: Callable[..., None], *arguments: Any) -> list[int | None]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = [forkserver.Process(target=target, args=(rank, size, port, *arguments)) for rank in range(size)]
        for process in group:
            process.start()
        for process in group:
            process.join(100)
        codes = [process.exitcode for process in group]
        for process in group:
            process.kill()
        return codes

    return start


@pytest.fixture(scope="module")
def train(started: Any, data: Path) -> Callable[..., list[int | None]]:
    """`train(size, config, out, resume=, data=, what=, at=)`: exit codes of one attempt."""

    def run(size: int, config: Config, out: Path, *, resume: bool = False, where: Any = None, **plan: Any) -> Any:
        return started(size, attempt, config, where or [data], out, resume, plan)

    return run


def said(out: Path, rank: int = 0) -> str:
    return Path(f"{out}.{rank}").read_text()


def close(a: runs.Run, b: runs.Run) -> None:
    """Equal to float32 tolerance: each step's loss, gradient norm and rate, each weight and statistic, predictions."""
    left, right = a.metrics(), b.metrics()
    assert [row["step"] for row in left] == [row["step"] for row in right] != []
    # a value that rounding moves across ReLU's kink jumps in the gradient: as large in one process whose weights are
    # moved by 3e-7; in float64 the gradients agree to 1e-13 (below)
    for key, tolerance in {"loss": 2e-5, "grad_norm": 2e-3, "lr": 0}.items():
        np.testing.assert_allclose([r[key] for r in left], [r[key] for r in right], rtol=tolerance, err_msg=key)
    one, other = (checkpoint.split(checkpoint.load(run.last)[0], "model") for run in (a, b))
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    np.testing.assert_allclose(a.predictions().probability, b.predictions().probability, atol=1e-5)
    assert a.predictions().index.tolist() == b.predictions().index.tolist()


def same(a: runs.Run, b: runs.Run) -> None:
    """Bitwise equal: metrics, weights, optimiser, generators, predictions."""
    assert [entry for entry in runs.diff(a, b) if not entry.what.startswith("code.")] == []
    assert a.predictions().probability.tobytes() == b.predictions().probability.tobytes()
    assert a.success and b.success and a.success["best"] == b.success["best"]


@pytest.mark.parametrize(
    ("items", "size"), [(COMMON, 3), (CONVOLUTIONS, 2), (EQUIVARIANT, 3)], ids=["mlp-3", "cnn-2", "d4-3"]
)
def test_several_processes_train_as_one(train: Any, tiny: Any, tmp_path: Path, items: Any, size: int) -> None:
    """Shares of unequal size, augmentation, clipping, smoothing; batch normalisation over the whole batch."""
    config = tiny(*items)
    assert train(1, config, tmp_path / "one") == [0]
    assert train(size, config, tmp_path / "many") == [0] * size
    one, many = (runs.open_run(tmp_path / name) for name in ("one", "many"))
    close(one, many)
    record = many.provenance
    assert record["machine"]["world_size"] == size and [entry["exit"] for entry in record["attempts"]] == ["ok"]
    assert said(tmp_path / "many", 1) == "" != said(tmp_path / "many")
    assert sorted(p.name for p in one.path.rglob("*")) == sorted(p.name for p in many.path.rglob("*"))


@pytest.mark.parametrize("items", [DROPOUT, CONVOLUTIONS], ids=["dropout", "cnn"])
def test_killed_and_resumed_bitwise(train: Any, tiny: Any, tmp_path: Path, items: Any) -> None:
    config = tiny(*items)
    for name in ("whole", "twin"):
        assert train(2, config, tmp_path / name) == [0, 0]
    same(runs.open_run(tmp_path / "whole"), runs.open_run(tmp_path / "twin"))
    codes = train(2, config, tmp_path / "killed", what="kill", at=5)
    assert codes == [2, KILLED]
    assert "RunError: process 0 of 2 lost another one, which was killed" in said(tmp_path / "killed")
    killed = runs.open_run(tmp_path / "killed")
    assert killed.success is None and checkpoint.load(killed.last)[1]["progress"]["step"] in (4, 5)
    assert train(2, config, tmp_path / "killed", resume=True) == [0, 0]
    same(runs.open_run(tmp_path / "whole"), killed)
    assert [entry["exit"] for entry in killed.provenance["attempts"]] == ["failed", "ok"]


def test_told_to_stop_all_stop_at_the_same_step_and_go_on_bitwise(train: Any, tiny: Any, tmp_path: Path) -> None:
    config = tiny(*DROPOUT, "train.checkpoint_every=100")
    assert train(2, config, tmp_path / "whole") == [0, 0]
    assert train(2, config, tmp_path / "told", what="notice", at=4) == [2, 2]
    for rank in range(2):
        assert "Stopped: " in said(tmp_path / "told", rank) and "saved at step 4;" in said(tmp_path / "told", rank)
    told = runs.open_run(tmp_path / "told")
    assert checkpoint.load(told.last)[1]["progress"]["step"] == 4
    assert train(2, config, told.path, resume=True) == [0, 0]
    same(runs.open_run(tmp_path / "whole"), told)
    assert [entry["exit"] for entry in told.provenance["attempts"]] == ["stopped", "ok"]
    assert train(2, config, tmp_path / "other", what="notice", at=4, whose=1) == [0, 0], "process 0's word counts"


def test_processes_drop_out_apart(started: Any, tmp_path: Path) -> None:
    assert started(2, work, draws, tmp_path) == [0, 0]
    first, second = (np.load(tmp_path / f"{rank}.npy") for rank in range(2))
    assert not np.array_equal(first, second)


def draws(folder: Path) -> None:
    world = distributed.world()
    world.draw_apart(0, 5)
    found = torch.rand(8)
    world.draw_apart(0, 5)
    assert torch.rand(8).equal(found)
    np.save(folder / f"{world.rank}.npy", found.numpy())


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resuming_with_another_world_size_is_right(
    train: Any, tiny: Any, tmp_path: Path, before: int, after: int
) -> None:
    """Positions are those of whole batches: nothing is seen twice, and the run says that bits may differ from here."""
    config = tiny(*CONVOLUTIONS)
    assert train(1, config, tmp_path / "one") == [0]
    assert train(before, config, tmp_path / "moved", what="kill", at=5)[-1] == KILLED
    assert train(after, config, tmp_path / "moved", resume=True) == [0] * after
    end = f"bitwise equality with the first attempt ends here: machine.world_size was {before}, is {after}"
    assert end in said(tmp_path / "moved")
    close(runs.open_run(tmp_path / "one"), runs.open_run(tmp_path / "moved"))


def test_all_stop_with_the_clock_of_the_first(train: Any, tiny: Any, tmp_path: Path) -> None:
    """Process 1's clock runs a thousand times as fast; the schedule follows the first one's too."""
    config = tiny("train.steps=null", "train.time_limit=0.5", "schedule.name=cosine", "train.evaluate_every=1000")
    for size in (1, 2):
        assert train(size, config, tmp_path / str(size), tick=0.0625) == [0] * size
    rows = [runs.open_run(tmp_path / str(size)).metrics() for size in (1, 2)]
    assert len(rows[0]) == len(rows[1]) == 4
    for key in ("lr", "seconds"):
        assert [row[key] for row in rows[0]] == [row[key] for row in rows[1]]


def test_patience_is_one_patience(train: Any, tiny: Any, tmp_path: Path) -> None:
    config = tiny("train.steps=90", "train.evaluate_every=1", "train.patience=2", "optimizer.lr=0.3")
    assert train(2, config, tmp_path / "run") == [0, 0]
    end = runs.open_run(tmp_path / "run").success
    assert end and end["steps"] == end["best_step"] + 2 < 90


def test_reproduced_by_as_many_processes(train: Any, started: Any, tiny: Any, data: Path, tmp_path: Path) -> None:
    """Bitwise, told by process 0 alone; one process says how many there were."""
    assert train(2, tiny(*DROPOUT), tmp_path / "run") == [0, 0]
    assert started(2, again, tmp_path / "run", tmp_path / "two", data) == [0, 0]
    assert said(tmp_path / "two", 1) == "" and "REPRODUCED: metrics of all 8 steps" in said(tmp_path / "two")
    assert "differs" not in said(tmp_path / "two")
    assert started(1, again, tmp_path / "run", tmp_path / "one", data) == [1]
    told = "machine.world_size was 2, is 1 (bitwise equality is promised for a fixed one only); start it with `torchrun"
    assert told in said(tmp_path / "one") and "NOT REPRODUCED" in said(tmp_path / "one")


def again(rank: int, size: int, port: int, run: Path, out: Path, data: Path) -> None:
    """One process of `pcam runs reproduce`: what it reports goes into OUT.RANK, its exit code is the command's."""
    enter(rank, size, port)
    lines: list[str] = []
    _, found = reproduce(runs.open_run(run), out, data, lines.append)
    Path(f"{out}.{rank}").write_text("\n".join(lines))
    raise SystemExit(not same_outcome(found))


# Ruins: nobody hangs


def test_an_error_in_one_process_ends_all(train: Any, tiny: Any, tmp_path: Path) -> None:
    assert train(2, tiny(*COMMON), tmp_path / "run", what="raise", at=3) == [2, 2]
    assert said(tmp_path / "run", 1) == "PcamError: process 1 met a full disk"
    assert "process 0 of 2 lost another one" in said(tmp_path / "run")
    run = runs.open_run(tmp_path / "run")
    assert run.success is None and run.provenance["attempts"][0]["exit"] == "failed"


@pytest.mark.parametrize("size", [1, 2])
def test_the_patch_that_broke_it_is_named_whoever_had_it(train: Any, tiny: Any, tmp_path: Path, size: int) -> None:
    assert train(size, tiny(*CONVOLUTIONS), tmp_path / "run", what="nan") == [2] * size
    errors = {said(tmp_path / "run", rank).splitlines()[-1] for rank in range(size)}
    assert len(errors) == 1 and "patches 7: their pixels are not finite" in errors.pop()


def test_other_data_in_one_process_are_refused(
    train: Any, tiny: Any, make_split: Any, data: Path, tmp_path: Path
) -> None:
    for split, count in (("train", 256), ("valid", 128)):
        make_split(tmp_path / "other", split, np.arange(count) % 2, seed=5)
    assert train(2, tiny(), tmp_path / "run", where=[data, tmp_path / "other"]) == [2, 2]
    for rank in range(2):
        assert f"processes {rank} and {1 - rank} of 2 differ in data.train" in said(tmp_path / "run", rank)
    assert not (tmp_path / "run").exists()


def test_weights_that_drift_apart_are_noticed(train: Any, tiny: Any, tmp_path: Path) -> None:
    assert train(2, tiny(*COMMON), tmp_path / "run", what="drift", at=2) == [2, 2]
    assert "step 3: the processes' weights drifted apart" in said(tmp_path / "run")


def test_more_processes_than_patches_of_a_batch(train: Any, tiny: Any, tmp_path: Path) -> None:
    config = tiny("loader.batch_size=85")  # 256 = 3 * 85 + 1
    assert train(2, config, tmp_path / "run") == [2, 2]
    assert said(tmp_path / "run") == (
        "ConfigError: loader.batch_size=85: the smallest batch of 256 patches has 1 for 2 processes; choose another "
        "batch size, or fewer processes"
    )
    assert not (tmp_path / "run").exists()


def test_a_world_without_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2, but RANK, .* not set: start the processes with torchrun"):
        distributed.join("cpu").__enter__()
    assert distributed.speaks()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 2, "LOCAL_RANK": 2, "WORLD_SIZE": 4, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="3 or more processes on this machine, but 2 GPUs"):
        distributed.join("cuda").__enter__()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:4711"), True),
        (RuntimeError("[pair.cc:161] Read error [127.0.0.1]:4711: Connection reset by peer"), True),
        (RuntimeError("[unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete"), True),
        (torch.distributed.DistBackendError("ncclRemoteError: a remote process exited prematurely"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), False),
        (RuntimeError("Tensors must be contiguous"), False),
    ],
)
def test_only_a_broken_connection_is_a_lost_process(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError, lost: bool
) -> None:
    def gather(*_: Any) -> None:
        raise error

    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(RunError if lost else type(error), match="process 0 of 2 lost" if lost else str(error)):
        distributed.World(0, 2).gather(1)


def test_processes_that_never_met_say_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*_: Any, **__: Any) -> None:
        raise torch.distributed.DistNetworkError("the port is\nin use (EADDRINUSE)")

    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "here", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "speaks", lambda: True)  # would wait for the store
    monkeypatch.setattr(torch.distributed, "init_process_group", taken)
    with pytest.raises(RunError, match="process 1 of 2 did not meet the others at here:1: the port is in use"):
        distributed.join("cpu").__enter__()


def test_alone_nothing_is_joined() -> None:
    with distributed.join("cpu") as world:
        assert world == distributed.World() and world.leads
        assert world.gather(3) == [3] and world.clock(1.5, True) == (1.5, True)
        with world.statistics():  # would need a process group
            torch.nn.BatchNorm1d(3)(torch.ones(2, 3))


# Batch normalisation over the whole batch


@pytest.mark.parametrize("size", [2, 3])
def test_batch_statistics_are_those_of_the_whole_batch(started: Any, size: int) -> None:
    assert started(size, work, normalise) == [0] * size


def normalise() -> None:
    """Output, running statistics and every gradient in float64, beside BatchNorm on the whole batch."""
    world, generator = distributed.world(), torch.Generator().manual_seed(0)
    kinds = ((), torch.nn.BatchNorm1d, True), ((5, 7), torch.nn.BatchNorm2d, True), ((), torch.nn.BatchNorm1d, False)
    for dimensions, kind, affine in kinds:
        whole = (torch.randn(11, 4, *dimensions, generator=generator, dtype=torch.float64) + 3).requires_grad_()
        upstream = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
        plain, ours = (kind(4, affine=affine).double() for _ in range(2))
        for module in (plain, ours) if affine else ():
            torch.nn.init.uniform_(module.weight, generator=torch.Generator().manual_seed(1))
        mine = share(len(whole), world.rank, world.size)
        part = whole[mine].detach().requires_grad_()
        for _ in range(2):
            plain.zero_grad(), ours.zero_grad()
            whole.grad = part.grad = None
            with world.statistics():
                found = ours(part)
            expected = plain(whole)
            torch.testing.assert_close(found, expected[mine])
            (expected * upstream).sum().backward()
            (found * upstream[mine]).sum().backward()
            torch.testing.assert_close(part.grad, whole.grad[mine])
        world.add_up(found.sum(), ours.parameters())
        for name, value in plain.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name).grad, value.grad)
        for name, value in plain.named_buffers():
            torch.testing.assert_close(ours.get_buffer(name), value)
        with world.statistics():
            torch.testing.assert_close(ours.eval()(part), plain.eval()(part))
    plain, ours = torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4)  # statistics and weights stay float32 under autocast
    whole = torch.randn(11, 4, 5, 7, generator=generator).bfloat16().requires_grad_()
    part = whole[share(11, world.rank, world.size)].detach().requires_grad_()
    with world.statistics():
        found = ours(part)
    found.square().sum().backward()
    assert found.dtype == part.grad.dtype == torch.bfloat16
    torch.testing.assert_close(found, plain(whole)[share(11, world.rank, world.size)])
    torch.testing.assert_close(ours.running_var, plain.running_var)


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_are_those_of_the_whole_batch(started: Any, size: int) -> None:
    assert started(size, work, gradients) == [0] * size


def gradients() -> None:
    """In float64, where nothing hides behind rounding."""
    world = distributed.world()
    for kind in (CNN, D4CNN):
        torch.manual_seed(0)
        plain, ours = kind(8).double(), kind(8).double()
        ours.load_state_dict(plain.state_dict())
        images, labels = torch.randn(10, 3, 16, 16, dtype=torch.float64), torch.arange(10) % 2
        functional.cross_entropy(plain(images), labels).backward()
        mine = share(10, world.rank, world.size)
        with world.statistics():
            loss = functional.cross_entropy(ours(images[mine]), labels[mine]) * (len(labels[mine]) / 10)
        loss.backward()
        world.add_up(loss, ours.parameters())
        for name, weight in plain.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name).grad, weight.grad, rtol=1e-9, atol=1e-12)


# torchrun itself

DRIVER = """
import os, sys
sys.path.insert(0, {tests!r})
from pcamlib import cli
from pcamlib.training import loop
from test_distributed import Spoiled
Spoiled.what, Spoiled.at = os.environ.get("WHAT", ""), 3
loop.Training = Spoiled
cli.main()
"""


@pytest.fixture
def torchrun(tmp_path: Path, data: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`torchrun(*items, what=)`: `pcam train` on two processes."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(tests=str(Path(__file__).parent)))
    items = [f"model.{item}" for item in ("name=mlp", "crop=32", "hidden_units=[8]", "pool=1")]
    items += ["train.device=cpu", "train.precision=fp32", "loader.batch_size=32"]

    def run(*more: str, what: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", driver, "train"]
        command += ["--recipe", "mlp", "--data", data, "--out", tmp_path / "run", *items, *more]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "WHAT": what}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=variables)

    return run


@pytest.mark.slow
def test_under_torchrun(torchrun: Any, tmp_path: Path) -> None:
    done = torchrun("train.steps=8")
    assert done.returncode == 0, done.stderr
    run = runs.open_run(tmp_path / "run")
    assert run.success and run.success["steps"] == 8 and run.provenance["machine"]["world_size"] == 2
    assert done.stdout.count("from step 0") == 1 and "2 processes" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "item", "message"),
    [
        ("raise", "train.steps=8", "pcam: process 1 met a full disk"),
        ("kill", "train.steps=8", "Signal 9 (SIGKILL)"),  # torchrun's: it may end the other before that can speak
        ("", "train.step=8", "pcam: unknown key 'train.step'; did you mean 'train.steps'?"),
    ],
    ids=["error", "killed", "every process"],
)
def test_under_torchrun_one_tells(torchrun: Any, what: str, item: str, message: str) -> None:
    done = torchrun(item, what=what)
    assert done.returncode != 0
    assert done.stderr.count("pcam: ") == 1 or (what == "kill" and done.stderr.count("pcam: ") == 0)
    assert message in done.stderr
