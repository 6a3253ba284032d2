"""Twins compared bit by bit: equal where they must be, and the first difference named where they are not."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pcamlib.errors import RunError
from pcamlib.experiments import twins
from pcamlib.experiments.twins import BASE, first_difference, trajectory
from pcamlib.training import runs

STEPS = 4


@pytest.fixture(scope="module")
def base(synthetic_dir: Path) -> list[dict[str, str]]:
    return trajectory(synthetic_dir, BASE, STEPS)


def test_the_same_condition_twice_is_bitwise_equal(base: list[dict[str, str]], synthetic_dir: Path) -> None:
    again = trajectory(synthetic_dir, BASE, STEPS)
    assert first_difference(base, again) is None and again == base
    assert len(base) == STEPS + 1 and all(a != b for a, b in itertools.pairwise(base)), "every step changes it"


def test_training_goes_on_into_the_next_epoch(synthetic_dir: Path) -> None:
    steps = trajectory(synthetic_dir, BASE, 3, batch_size=256)  # two batches an epoch
    assert len({step[next(iter(step))] for step in steps}) == 4


@pytest.mark.parametrize(
    ("change", "step"),
    [
        ({"seed": 1}, 0),
        ({"seed": None}, 0),
        ({"order_seed": 1}, 1),
        ({"order_seed": None}, 1),
        ({"augmentation": "global"}, 1),
    ],
)
def test_what_chance_changes_and_when(
    base: list[dict[str, str]], synthetic_dir: Path, change: dict[str, int | None], step: int
) -> None:
    found = first_difference(base, trajectory(synthetic_dir, replace(BASE, **change), STEPS))
    assert found is not None and found[0] == step and found[1] in base[step]


def test_resuming_whole_changes_nothing_and_resuming_weights_does(
    base: list[dict[str, str]], synthetic_dir: Path
) -> None:
    whole = trajectory(synthetic_dir, replace(BASE, resume_at=2), STEPS)
    assert first_difference(base, whole) is None
    weights = first_difference(base, trajectory(synthetic_dir, replace(BASE, resume_at=2, resume="weights"), STEPS))
    assert weights is not None and weights[0] == 2 and weights[1].startswith("adam."), "the optimiser is what is lost"


def test_a_planted_difference_is_found_at_its_step_and_tensor(base: list[dict[str, str]]) -> None:
    other = copy.deepcopy(base)
    name = list(other[3])[2]
    other[3][name] = "0" * 16
    other[4][next(iter(other[4]))] = "0" * 16
    assert first_difference(base, other) == (3, name)
    del other[1][name]
    assert first_difference(base, other) == first_difference(other, base) == (1, name)
    with pytest.raises(ValueError, match="shorter"):
        first_difference(base, base[:-1])


def test_a_trajectory_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"trajectory Condition\(seed=0.*DataError: .*no such folder"):
        twins.measured(tmp_path / "nowhere", [BASE], 1)


@pytest.mark.slow
def test_each_source_alone_and_its_control(synthetic_dir: Path) -> None:
    said: list[str] = []
    table = twins.source_table(synthetic_dir, steps=6, report=said.append)
    assert table["source"].tolist() == [source for source, *_ in twins.SOURCES] and "of 6 steps" in said[0]
    assert table["equal with control"].all()
    rows = {row["source"].split(",")[0]: row for row in table.to_dict("records")}
    for source, step in (("random seed", 0), ("sampling order", 1), ("worker count", 1)):
        assert (rows[source]["equal weights"], rows[source]["first differing step"]) == (False, step)
    lost = rows["resume with the weights alone"]
    assert lost["first differing step"] == 5 and lost["first differing tensor"].startswith("adam.")
    for row in rows.values():  # whether kernels and threads change the sum is the machine's affair
        assert (row["first differing step"] is None) == row["equal weights"] == (row["first differing tensor"] is None)


@pytest.mark.slow
def test_twin_runs_are_one_command_in_two_processes(synthetic_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "twin-a").mkdir()
    (tmp_path / "twin-a" / "SUCCESS").write_text("of an older pair")
    a, b = twins.twin_runs(synthetic_dir, tmp_path, steps=2)
    assert (a.name, b.name) == ("twin-a", "twin-b") and runs.diff(a, b) == []
    table = twins.twin_table(a, b)
    assert table["weights"].nunique() == 1 and table["steps"].tolist() == [2, 2]
    assert table["weights"][0] == (a.success or {})["weights"][:16]
    series = twins.twin_series(a, b)
    assert series["step"] == [1, 2] and series["twin-a"] == series["twin-b"] == [row["loss"] for row in a.metrics()]


def test_a_twin_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"twin run .*twin-a: pcam: .*nowhere: no such folder"):
        twins.twin_runs(tmp_path / "nowhere", tmp_path, steps=2)


def test_the_figure_draws_both_members_and_their_difference() -> None:
    series = {"step": [1.0, 2.0, 3.0], "twin-a": [0.9, 0.8, 0.7], "twin-b": [0.9, 0.75, 0.8]}
    top, bottom = twins.plot_twins(series).axes
    assert [list(line.get_ydata()) for line in top.lines] == [series["twin-a"], series["twin-b"]]
    assert [line.get_label() for line in top.lines] == ["twin-a", "twin-b"]
    assert list(bottom.lines[0].get_xdata()) == series["step"]
    assert list(bottom.lines[0].get_ydata()) == pytest.approx([0.0, 0.05, -0.1])


def test_cost_is_a_ratio_with_an_interval_and_a_floor(synthetic_dir: Path) -> None:
    torch.set_num_threads(2)
    torch.set_deterministic_debug_mode("warn")
    found = twins.cost(synthetic_dir, rounds=3, steps=1, batch_size=4)
    assert torch.get_num_threads() == 2 and torch.get_deterministic_debug_mode() == 1
    assert set(found) == {"ratio", "interval", "floor", "rounds", "seconds"} and found["rounds"] == 3
    ratios = sorted(a / b for a, b, _ in found["seconds"])
    assert found["ratio"] == pytest.approx(ratios[1]) and found["floor"] >= 0
    assert ratios[0] <= found["interval"][0] <= found["ratio"] <= found["interval"][1] <= ratios[2]
