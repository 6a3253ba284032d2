"""Settings compared over the same seeds: paired differences, a choice by rule, the rates that were used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pcamlib.errors import ConfigError
from pcamlib.experiments import schedules
from pcamlib.training.runs import Run
from pcamlib.training.schedule import factor


def quiet(line: str) -> None:
    """Reports nothing."""


def ended(folder: Path, name: str, aucs: tuple[float, ...]) -> list[Run]:
    """Finished runs of two steps that reached these AUCs."""
    made = []
    for seed, auc in enumerate(aucs):
        run = Run(folder / f"{name}-{seed}")
        run.path.mkdir()
        rows: list[dict[str, Any]] = [{"step": 1, "epoch": 0, "loss": 0.7, "grad_norm": 1.0, "lr": 1e-3}]
        rows.append({**rows[0], "step": 2, "epoch": 1, "valid_auc": auc, "valid_nll": 1 - auc, "valid_accuracy": auc})
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made.append(run)
    return made


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    arms = {
        "constant": ended(tmp_path, "constant", (0.70, 0.80, 0.90)),  # seeds scatter by 0.1
        "better": ended(tmp_path, "better", (0.719, 0.820, 0.921)),  # by 0.02 for every seed
        "noise": ended(tmp_path, "noise", (0.80, 0.70, 0.99)),
        "worse": ended(tmp_path, "worse", (0.69, 0.789, 0.891)),
    }
    table = schedules.compare(arms)
    assert [row["verdict"] for row in table] == [None, "better", "none", "worse"]
    assert table[0]["valid auc minus constant"] is None and table[0]["sd of valid auc"] == 0.1
    low, high = table[1]["95 % of that"]
    assert table[1]["valid auc minus constant"] == 0.02 and 0 < low < 0.02 < high
    assert table[2]["valid auc"] > table[1]["valid auc"], "the highest mean is not what is chosen"
    chosen, why = schedules.choose(table)
    assert chosen == "better" and why.startswith(f"'better' beats 'constant' by {low:.4f} to {high:.4f} AUC")
    assert "Of the 1 shown to do so" in why


def test_the_more_settings_are_tried_the_more_a_difference_must_be(tmp_path: Path) -> None:
    arms = {"constant": ended(tmp_path, "constant", (0.70, 0.80, 0.90))}
    arms["lucky"] = ended(tmp_path, "lucky", (0.714, 0.820, 0.926))  # t 5.8: between 4.3, for one, and 7.6, for three
    assert schedules.compare(arms)[1]["verdict"] == "better"
    arms |= {name: ended(tmp_path, name, (0.71, 0.79, 0.90)) for name in ("second", "third")}
    table = schedules.compare(arms)
    low, high = table[1]["95 % of that"]
    assert table[1]["verdict"] == "none" and low == pytest.approx(0.02 - high + 0.02, abs=2e-4) and low < 0
    assert schedules.choose(table)[0] == "constant"


def test_without_a_shown_difference_the_simplest_stays(tmp_path: Path) -> None:
    arms = {"constant": ended(tmp_path, "a", (0.7, 0.8, 0.9)), "cosine": ended(tmp_path, "b", (0.9, 0.7, 0.95))}
    chosen, why = schedules.choose(schedules.compare(arms))
    assert chosen == "constant"
    assert why.startswith(
        "'cosine' has the highest mean AUC, 0.8500, but no setting is shown to beat 'constant' (0.8000)"
    )


def test_every_schedule_is_trained_over_the_same_seeds(tiny: Any, synthetic_dir: Path, tmp_path: Path) -> None:
    base = tiny("train.steps=10", "loader.batch_size=64", "train.evaluate_every=10")
    arms = schedules.train(base, schedules.SCHEDULES, [0, 3], synthetic_dir, tmp_path, quiet)
    assert next(iter(arms)) == "constant" and len(arms) == 5
    shown = schedules.series(arms)
    for name, runs in arms.items():
        assert [run.config.seed for run in runs] == [0, 3]
        setting = runs[0].config.schedule
        rates = [1e-3 * factor(setting.name, step / 10, setting.warmup) for step in range(10)]
        assert shown[f"{name} lr"] == pytest.approx(rates)
        assert schedules.by_epoch(runs[0]) == pytest.approx(
            {"epoch 1": sum(rates[:8]) / 8, "epoch 2": sum(rates[8:]) / 2}, rel=5e-3
        )
        last = [row["loss"] for row in runs[1].metrics()][8:]
        found = schedules.scores(runs[1])
        assert found["train loss"] == pytest.approx(sum(last) / 2) and found["valid auc"] == shown[f"{name} auc"][1]
    assert len({tuple(shown[f"{name} lr"]) for name in arms}) == 5, "five different courses of the rate"
    left, _, right = schedules.plot(shown).axes
    assert [line.get_label() for line in left.lines] == list(arms)
    assert [tick.get_text() for tick in right.get_xticklabels()] == list(arms)


def test_a_repeated_seed_is_refused(tiny: Any, synthetic_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 is listed twice"):
        schedules.train(tiny(), schedules.SCHEDULES, [1, 1], synthetic_dir, tmp_path, quiet)


def test_steps_that_were_clipped_are_counted(tiny: Any, synthetic_dir: Path, tmp_path: Path) -> None:
    arms = schedules.train(tiny("train.steps=3"), {"low": ("train.grad_clip=1e-6",), "high": ("train.grad_clip=1e6",)},
                           [0, 1], synthetic_dir, tmp_path, quiet)  # fmt: skip
    assert schedules.clipped(arms["low"]).startswith("6 of 6, at most by ")
    assert schedules.clipped(arms["high"]) == "0 of 6, at most by 1.0"
