"""The decision a checkpoint carries: the best threshold is found, the temperature stays finite, a run leaves both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pcamlib.config import Config
from pcamlib.training import checkpoint, decision, loop, metrics
from pcamlib.training.evaluate import Predictions


def scored(n: int = 600, gap: float = 1.5, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    label = (rng.random(n) < 0.4).astype(np.uint8)
    probability = 1 / (1 + np.exp(-(gap * (label - 0.5) * gap + gap * rng.normal(size=n))))
    return Predictions("valid", "f" * 64, np.arange(n), label, probability)


@pytest.mark.parametrize("rule", [decision.f_beta(2), decision.f_beta(0.5), decision.cost(10), decision.cost(0.2)])
def test_the_chosen_threshold_is_the_best_of_all(rule: decision.Rule) -> None:
    p = scored(200)
    p = Predictions(p.split, p.fingerprint, p.index, p.label, np.round(p.probability, 2))  # ties

    def loss(cut: float) -> float:
        n = metrics.confusion(p.label, p.probability, cut)
        return rule(n["tp"], n["fp"], n["tp"] + n["fn"], n["tn"] + n["fp"])

    best = min(loss(cut) for cut in np.linspace(0, 1.01, 2021))
    assert loss(decision.choose(p.label, p.probability, rule)) == pytest.approx(best)


def test_the_sweep_counts_what_each_threshold_calls() -> None:
    label, probability = np.array([1, 0, 1, 0]), np.array([0.9, 0.5, 0.5, 0.1])
    cuts, true, false = decision.sweep(label, probability)
    assert cuts.tolist() == pytest.approx([1.0, 0.7, 0.3, 0.0])
    assert true.tolist() == [0, 1, 2, 2] and false.tolist() == [0, 0, 1, 2]
    for cut, tp, fp in zip(cuts, true, false, strict=True):
        assert ((probability >= cut) & (label == 1)).sum() == tp and ((probability >= cut) & (label == 0)).sum() == fp


def test_f_beta_and_cost_are_those_of_the_metrics() -> None:
    p = scored()
    n = metrics.confusion(p.label, p.probability)
    counts = (n["tp"], n["fp"], n["tp"] + n["fn"], n["tn"] + n["fp"])
    f2 = metrics.scores(p.label, p.probability, np.ones((1, len(p.label))))["f2"][0]
    assert 1 - decision.f_beta(2)(*counts) == pytest.approx(f2)
    assert decision.cost(7)(*counts) == pytest.approx((7 * n["fn"] + n["fp"]) / len(p.label))


def test_temperature_of_certain_and_wrong_answers_stays_finite() -> None:
    label = np.array([0, 1, 0, 1] * 10)
    assert 1 < decision.temperature(label, np.where(np.arange(40) % 8 < 6, label, 1 - label).astype(float)) <= 20.1
    assert decision.temperature(label, label.astype(float)) < 1


def test_a_decision_is_the_best_on_what_it_was_chosen_on() -> None:
    p = scored()
    found = decision.decide(p)

    def f2(cut: float) -> float:
        return metrics.scores(p.label, p.probability, np.ones((1, len(p.label))), cut)["f2"][0]

    assert (found.rule, found.split, found.n, found.fingerprint) == ("F2", "valid", 600, "f" * 64)
    assert f2(found.threshold) >= max(f2(cut) for cut in np.linspace(0, 1, 501))
    assert f2(found.threshold) > f2(0.5)


def test_a_finished_run_tells_what_its_checkpoint_decides_scored_and_comes_from(
    data: Path, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    run = loop.train(tiny("seed=3"), data, tmp_path / "run", report=lambda line: None)
    tensors, meta = checkpoint.load(run.best)
    predictions = run.predictions()
    assert decision.Decision(**meta["decision"]) == decision.decide(predictions)
    stored, scores = meta["recorded"], predictions.report()["metrics"]
    assert stored["n"] == 128 and stored["precision"] == "fp32" and stored["best_of"] == 1
    assert stored["metrics"]["auc"] == {key: scores["auc"][key] for key in ("value", "interval")}
    assert meta["provenance"]["seed"] == 3 and meta["provenance"]["config"] == run.config.digest()
    assert meta["provenance"]["data"] == run.provenance["data"]
    assert run.success and checkpoint.tensor_digest(checkpoint.split(tensors, "model")) == run.success["best"]


def test_an_unfinished_run_decides_nothing(data: Path, tiny: Callable[..., Config], tmp_path: Path) -> None:
    def stop(row: dict[str, object]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(tiny(), data, tmp_path / "run", report=lambda line: None, on_evaluation=stop)
    assert "decision" not in checkpoint.load(tmp_path / "run" / "checkpoints" / "best.safetensors")[1]
    run = loop.resume(tmp_path / "run", data, report=lambda line: None)
    assert checkpoint.load(run.best)[1]["decision"]["n"] == 128
