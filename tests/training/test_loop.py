"""The loop: it learns, it stops where it should, and it leaves a whole run or an honest ruin."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pcamlib.config import Config
from pcamlib.data.layout import split_path
from pcamlib.data.patches import open_split
from pcamlib.errors import CheckpointError, ConfigError, DataError, RunError
from pcamlib.files import digest
from pcamlib.training import checkpoint, loop, metrics, runs
from pcamlib.training.evaluate import evaluate
from pcamlib.training.state import Training, choose_device, choose_precision, load_classifier


def quiet(line: str) -> None:
    """Reports nothing."""


@pytest.fixture(scope="module")
def finished(tiny: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """60 steps of an MLP: about 0.5 s."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return loop.train(tiny("train.steps=60", f"data.dir={data}"), data, out, report=quiet)


# Learning


def test_an_mlp_learns_an_easy_signal(finished: runs.Run) -> None:
    loss = [row["loss"] for row in finished.metrics()]
    assert np.mean(loss[-8:]) < 0.5 * np.mean(loss[:8])
    report = json.loads((finished.path / "report_valid.json").read_text())
    assert report["n"] == 128 and report["metrics"]["auc"]["value"] > 0.9
    assert report["metrics"]["auc"]["interval"][0] > 0.8 > report["metrics"]["auc"]["baseline"]["prevalence"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cnn_learns_it_too(tiny: Any, data: Path, tmp_path: Path, precision: str) -> None:
    config = tiny(
        "model.name=cnn", "model.width=8", "loader.augment=[d4]", "optimizer.lr=1e-2", "train.steps=32",
        "schedule.name=onecycle", f"train.precision={precision}",
    )  # fmt: skip
    run = loop.train(config, data, tmp_path / "run", report=quiet)
    loss = [row["loss"] for row in run.metrics()]
    assert np.mean(loss[-8:]) < 0.6 * np.mean(loss[:8])
    assert run.predictions().report(resamples=20)["metrics"]["auc"]["value"] > 0.8


def test_a_run_holds_all_that_it_should(finished: runs.Run, data: Path) -> None:
    names = {path.relative_to(finished.path).as_posix() for path in finished.path.rglob("*") if path.is_file()}
    assert names == {
        "config.yaml", "provenance.json", "metrics.jsonl", "predictions_valid.npz", "report_valid.json", "SUCCESS",
        "checkpoints/last.safetensors", "checkpoints/best.safetensors", ".lock",
    }  # fmt: skip
    rows, success = finished.metrics(), finished.success
    assert success and success["steps"] == len(rows) == 60 and success["evaluations"] == 8
    assert [row["epoch"] for row in rows[:9]] == [0] * 7 + [1] * 2, "the loader's epoch after the step"
    assert all({"step", "loss", "lr", "grad_norm", "epoch", "seconds", "attempt"} <= set(row) for row in rows)
    scored = {row["step"]: row["valid_auc"] for row in rows if "valid_auc" in row}
    assert list(scored) == [8, 16, 24, 32, 40, 48, 56, 60], "once an epoch and at the end"
    assert success["best_step"] == max(scored, key=lambda step: scored[step])
    record = finished.provenance
    prints = {split: open_split(data, split).fingerprint for split in ("train", "valid")}
    assert record["data"] == {**prints, "rows": digest(open_split(data, "train").rows().tolist())}
    assert record["machine"]["threads"] == 1 and record["config"] == finished.config.digest()
    assert [entry["exit"] for entry in record["attempts"]] == ["ok"]


def test_every_number_comes_from_the_stored_predictions(finished: runs.Run, data: Path) -> None:
    valid, predictions = open_split(data, "valid"), finished.predictions()
    assert predictions.index.tolist() == list(range(len(valid))) and predictions.fingerprint == valid.fingerprint
    assert predictions.label.tolist() == valid.labels.tolist()  # type: ignore[union-attr]
    stored = json.loads((finished.path / "report_valid.json").read_text())
    looks = finished.success["evaluations"]  # type: ignore[index]
    assert stored == {**metrics.report(predictions.label, predictions.probability), "best_of": looks}
    best = next(row for row in finished.metrics() if row["step"] == finished.success["best_step"])  # type: ignore[index]
    assert stored["metrics"]["auc"]["value"] == best["valid_auc"]


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_checkpoint_alone_predicts_bitwise_the_same(tiny: Any, data: Path, tmp_path: Path, name: str) -> None:
    """Normalisation and running statistics travel with the weights; the configuration is in the header."""
    config = tiny(f"model.name={name}", "model.width=8", "model.dropout_rate=0.3", "train.steps=8")
    run = loop.train(config, data, tmp_path / "run", report=quiet)
    model, meta = load_classifier(run.best)
    assert not model.training and meta["model"]["name"] == name and meta["synthetic"] is False
    found = evaluate(model, open_split(data, "valid"))
    assert found.probability.tobytes() == run.predictions().probability.tobytes()
    assert run.success and checkpoint.weights_digest(model) == run.success["best"]
    assert run.best.stat().st_size < 1e6
    last, _ = load_classifier(run.last)
    assert checkpoint.weights_digest(last) == run.success["weights"]


def test_evaluating_again_and_on_another_split(finished: runs.Run) -> None:
    before = finished.predictions().probability.tobytes()
    looks = finished.success["evaluations"]  # type: ignore[index]
    assert loop.evaluate_run(finished) == {**finished.predictions().report(), "best_of": looks}
    assert finished.predictions().probability.tobytes() == before
    train = loop.evaluate_run(finished, "train")
    assert train["n"] == 256 and train["best_of"] == 0 and (finished.path / "report_train.json").is_file()
    assert train["metrics"]["auc"]["value"] > finished.predictions().report()["metrics"]["auc"]["value"]
    with pytest.raises(DataError, match="missing"):
        loop.evaluate_run(finished, "test")


def test_a_run_that_does_not_know_its_data_asks_for_them(tiny: Any, data: Path, tmp_path: Path) -> None:
    run = loop.train(tiny(), data, tmp_path / "run", report=quiet)
    for call in (lambda: loop.evaluate_run(run), lambda: loop.resume(run.path)):
        with pytest.raises(RunError, match="does not say where its data lie; give --data DIR"):
            call()
    run.best.unlink()
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        loop.evaluate_run(run, folder=data)


def test_resuming_what_is_finished_changes_nothing(finished: runs.Run) -> None:
    before, said = (finished.path / "SUCCESS").read_bytes(), list[str]()
    again = loop.resume(finished.path, report=said.append)
    assert said == [f"{finished.path}: already finished after 60 steps"] and again.path == finished.path
    assert (finished.path / "SUCCESS").read_bytes() == before and len(finished.provenance["attempts"]) == 1


def test_it_says_what_it_does(tiny: Any, data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    loop.train(tiny("train.evaluate_every=2"), data, tmp_path / "run", report=said.append)
    assert "mlp, 24,602 weights, 256 of 256 train and 128 valid patches (real data), cpu fp32" in said[0]
    assert "from step 0" in said[0] and "step 2/4" in said[1] and "step 4/4" in said[2]
    assert "n = 128" in said[-1] and "best of 2 evaluations" in said[-1]
    assert any("ALARM" in line for line in said[3:-1]), "after 4 steps a constant still has the better F2"


# Ends


def test_epochs_count_batches(tiny: Any, data: Path, tmp_path: Path) -> None:
    config = tiny("train.epochs=2", "data.limit=70")  # 70 patches: batches of 32, 32 and 6
    run = loop.train(config, data, tmp_path / "run", report=quiet)
    assert run.success and (run.success["steps"], run.success["evaluations"]) == (6, 2)
    assert json.loads((run.path / "report_valid.json").read_text())["n"] == 128, "the limit is on training alone"


def test_a_time_limit_is_kept_and_the_schedule_follows_it(tiny: Any, data: Path, tmp_path: Path) -> None:
    config = tiny("train.steps=null", "train.time_limit=1.0", "train.evaluate_every=50", "schedule.name=cosine")
    run = loop.train(config, data, tmp_path / "run", report=quiet)
    rows = run.metrics()
    assert run.success and 1.0 <= run.success["seconds"] < 2.5 and rows[-1]["step"] == run.success["steps"] > 10
    assert rows[0]["lr"] <= 1e-3 and rows[-1]["lr"] < 0.1 * 1e-3
    assert rows[-2]["seconds"] < 1.0, "it ends with the first step past the limit"
    assert "valid_auc" in rows[-1] and run.last.exists()


def test_time_of_earlier_attempts_counts(tiny: Any, data: Path, tmp_path: Path) -> None:
    config = tiny("train.steps=null", "train.time_limit=1.0", "train.checkpoint_every=1")

    begun = time.monotonic()

    def interrupt(step: int) -> None:
        if time.monotonic() - begun > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(config, data, tmp_path / "run", report=quiet, on_step=interrupt)
    run = loop.resume(tmp_path / "run", data, report=quiet)
    assert run.success and 1.0 <= run.success["seconds"] < 2.5
    seconds = [row["seconds"] for row in run.metrics()]
    assert seconds == sorted(seconds), "the clock goes on where it stood"
    assert {row["attempt"] for row in run.metrics()} == {0, 1}


def test_patience_ends_early_and_keeps_the_best(tiny: Any, data: Path, tmp_path: Path) -> None:
    config = tiny("train.steps=400", "train.evaluate_every=2", "train.patience=3", "optimizer.lr=0.3")
    run = loop.train(config, data, tmp_path / "run", report=quiet)
    scored = {row["step"]: row["valid_auc"] for row in run.metrics() if "valid_auc" in row}
    best = max(scored, key=lambda step: scored[step])
    assert run.success and run.success["steps"] == best + 3 * 2 < 400 and run.success["best_step"] == best
    assert run.success["best"] != run.success["weights"]
    assert checkpoint.load(run.best)[1]["valid"]["valid_auc"] == max(scored.values())


def test_the_best_may_be_chosen_by_likelihood(tiny: Any, data: Path, tmp_path: Path) -> None:
    config = tiny("train.steps=40", "train.evaluate_every=4", "train.select=nll", "optimizer.lr=0.02")
    run = loop.train(config, data, tmp_path / "run", report=quiet)
    scored = {row["step"]: row["valid_nll"] for row in run.metrics() if "valid_nll" in row}
    assert run.success and run.success["best_step"] == min(scored, key=lambda step: scored[step]) < 40


# Ruins


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_loss_that_is_not_finite_stops_the_run(tiny: Any, data: Path, tmp_path: Path, optimizer: str) -> None:
    config = tiny("optimizer.lr=1e30", f"optimizer.name={optimizer}", "train.steps=9", "train.checkpoint_every=1")
    with pytest.raises(RunError, match=r"step \d: loss .* patches of the batch: \d+, .* Lower optimizer.lr") as caught:
        loop.train(config, data, tmp_path / "run", report=quiet)
    run, step = runs.open_run(tmp_path / "run"), int(str(caught.value).split()[1].rstrip(":"))
    tensors, meta = checkpoint.load(run.last)
    assert meta["progress"]["step"] == step - 1 == run.metrics()[-1]["step"], "the last good checkpoint is kept"
    assert all(not t.isnan().any() for t in checkpoint.split(tensors, "model").values())
    assert run.success is None and run.provenance["attempts"][0]["exit"] == "failed"


def test_the_patches_that_broke_it_are_named(tiny: Any, data: Path, tmp_path: Path) -> None:
    state = Training(tiny(), data)
    with torch.no_grad():
        next(state.model.parameters())[0, 0] = math.nan
    batch = next(iter(state.loader))
    before = checkpoint.weights_digest(state.model)
    with pytest.raises(RunError, match=f"step 1: loss nan.*: {', '.join(map(str, batch.rows[:8]))}, "):
        state.step(batch, 0.0)
    assert checkpoint.weights_digest(state.model) == before, "no step was taken"


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("part", ["x", "y"])
def test_missing_files_leave_nothing_behind(tiny: Any, make_split: Any, tmp_path: Path, split: str, part: str) -> None:
    for name in ("train", "valid"):
        make_split(tmp_path / "data", name, np.arange(8) % 2, seed=0)
    split_path(tmp_path / "data", split, part).unlink()
    with pytest.raises(DataError, match=f"split_{split}_{part}.h5: missing"):
        loop.train(tiny(), tmp_path / "data", tmp_path / "run", report=quiet)
    assert not (tmp_path / "run").exists()


def test_validation_with_one_class_is_refused_before_training(tiny: Any, make_split: Any, tmp_path: Path) -> None:
    make_split(tmp_path, "train", np.arange(40) % 2, seed=0)
    make_split(tmp_path, "valid", np.zeros(20, int), seed=1)
    with pytest.raises(DataError, match=r"split_valid_x.h5: all 20 labels are 0; validation needs both classes"):
        loop.train(tiny(), tmp_path, tmp_path / "run", report=quiet)


def test_a_checkpoint_of_another_configuration_or_a_damaged_one_is_refused(
    tiny: Any, data: Path, tmp_path: Path
) -> None:
    def interrupt(step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(tiny("train.checkpoint_every=1"), data, tmp_path / "run", report=quiet, on_step=interrupt)
    run = runs.open_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"written under another configuration than the run's config.yaml"):
        loop.train(tiny("optimizer.lr=2e-3"), data, run.path, resume=True, report=quiet)
    whole = run.last.read_bytes()
    run.last.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"last.safetensors: damaged"):
        loop.resume(run.path, data, report=quiet)
    assert len(run.provenance["attempts"]) == 1
    run.last.write_bytes(whole)
    assert loop.resume(run.path, data, report=quiet).success


# One step


def stepped(config: Config, data: Path, progress: float = 0.5) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """One step: what it reports, and by how much each weight moved."""
    state = Training(config, data)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    row = state.step(next(iter(state.loader)), progress)
    return row, {name: p.detach() - before[name] for name, p in state.model.named_parameters()}


def length(moved: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in moved.values()))


def test_the_gradient_norm_is_the_gradient_s(tiny: Any, data: Path) -> None:
    sgd = ("optimizer.name=sgd", "optimizer.momentum=0.0", "optimizer.lr=0.01")
    row, moved = stepped(tiny(*sgd), data)
    assert length(moved) == pytest.approx(0.01 * row["grad_norm"], rel=1e-3)
    clipped, moved = stepped(tiny(*sgd, "train.grad_clip=0.1"), data)
    assert clipped["grad_norm"] == row["grad_norm"] > 0.1, "as it was before clipping"
    assert length(moved) == pytest.approx(0.01 * 0.1, rel=1e-2)


def test_the_learning_rate_follows_the_schedule(tiny: Any, data: Path) -> None:
    row, moved = stepped(tiny("schedule.name=cosine", "optimizer.lr=0.01"), data, 0.5)
    assert row["lr"] == pytest.approx(0.005)
    assert max(float(t.abs().max()) for t in moved.values()) == pytest.approx(0.005, rel=1e-2), "AdamW's first step"


def test_only_matrices_decay(tiny: Any, data: Path) -> None:
    plain, decayed = (stepped(tiny(f"optimizer.weight_decay={d}"), data)[1] for d in (0.0, 0.5))
    differ = {name for name in plain if not plain[name].equal(decayed[name])}
    assert differ == {"network.layers.0.weight", "network.layers.3.weight"}


def test_label_smoothing_changes_the_loss(tiny: Any, data: Path) -> None:
    a, b = (stepped(tiny(f"train.label_smoothing={s}"), data)[0]["loss"] for s in (0.0, 0.2))
    assert a != b


def test_patches_that_are_dropped_are_not_trained_on(tiny: Any, make_split: Any, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        make_split(tmp_path, split, np.arange(40) % 2, seed=3)
    with h5py.File(split_path(tmp_path, "train", "x"), "r+") as file:
        file["x"][5], file["x"][6] = 0, 255
    state = Training(tiny(), tmp_path)
    assert len(state.loader.rows) == 38 and {5, 6}.isdisjoint(state.loader.rows.tolist())
    kept = Training(tiny("data.drop=[white]"), tmp_path).loader.rows.tolist()
    assert 5 in kept and 6 not in kept


def test_device_and_precision_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match=r"train.device=cuda, but torch sees no GPU"):
        choose_device("cuda")
    assert choose_precision("fp32", "cuda") == "fp32" and choose_precision("auto", "cuda") == "bf16"
    for amx, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("pcamlib.provenance.has_amx", lambda amx=amx: amx)
        assert choose_precision("auto", "cpu") == precision
