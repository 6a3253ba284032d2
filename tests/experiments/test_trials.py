"""Trials that processes share: a torn journal is mended, the dead are told from the living, places stay exact."""

from __future__ import annotations

import json
import multiprocessing
import socket
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from pcamlib.config import validate
from pcamlib.errors import RunError
from pcamlib.experiments import trials
from pcamlib.experiments.space import Space
from pcamlib.experiments.trials import Journal, Round, pulse_in
from pcamlib.locks import Pulse

SPACE = validate(
    Space,
    {
        "base": "mlp",
        "metric": "auc",
        "sampler": {"name": "tpe", "startup": 3},
        "pruner": {"name": "none"},
        "phases": [{"trials": 5, "steps": 4}],
        "parameters": {
            "optimizer.lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
            "loader.batch_size": {"type": "categorical", "choices": [16, 32]},
        },
    },
)


@pytest.fixture
def pulse(tmp_path: Path) -> Iterator[Pulse]:
    made = pulse_in(tmp_path / "workers")
    yield made
    made.close()


def told(rounds: Round, trial: optuna.Trial | None, value: float = 0.5) -> None:
    assert trial
    rounds.study.tell(trial, value)


def dead(folder: Path) -> str:
    """The name of a process that claimed to live and died without a word."""
    name = f"{socket.gethostname()}-1-abcdef"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"host": socket.gethostname(), "pid": 1}))
    return name


# The journal file


def test_a_torn_last_line_is_cut_and_no_whole_line_is_lost(tmp_path: Path, pulse: Pulse) -> None:
    rounds = Round(tmp_path, SPACE, 0, [])
    told(rounds, rounds.claim(pulse), 0.7)
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    for torn in (b'{"op_code":6,"worker_id":"a-1","tri', b"\0" * 512, b'{"op_code":6}\0\0\n', b"[1]\n"):
        path.write_bytes(whole + torn)
        said: list[str] = []
        again = Round(tmp_path, SPACE, 0, [], said.append)
        assert path.read_bytes() == whole and len(said) == 1
        assert f"the last record was torn by a kill ({len(torn)} bytes): cut, nothing else lost" in said[0]
        assert [t.value for t in again.final()] == [0.7]


def test_a_record_is_never_glued_to_a_torn_one(tmp_path: Path, pulse: Pulse) -> None:
    said: list[str] = []
    rounds = Round(tmp_path, SPACE, 0, [], said.append)
    told(rounds, rounds.claim(pulse))
    with open(tmp_path / "journal.jsonl", "ab") as file:  # another worker is killed while we live on
        file.write(b'{"op_code":4,"worker')
    told(rounds, rounds.claim(pulse))
    assert len(said) == 1 and all(json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines())
    assert len(Round(tmp_path, SPACE, 0, []).final()) == 2


def test_a_damaged_line_in_the_middle_is_an_error_and_nothing_is_cut(tmp_path: Path, pulse: Pulse) -> None:
    rounds = Round(tmp_path, SPACE, 0, [])
    told(rounds, rounds.claim(pulse))
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"rubbish\n", *lines[1:]]))
    before = path.read_bytes()
    with pytest.raises(RunError, match=rf"line 2 of {len(lines) + 1} is damaged.*put a copy back"):
        Journal(path)
    assert path.read_bytes() == before


# The lock of a claim


@pytest.mark.slow
def test_a_lock_left_by_the_dead_is_broken(tmp_path: Path) -> None:
    (tmp_path / "claim.lock").write_text("")
    with trials.locked(tmp_path / "claim", grace=3):
        assert (tmp_path / "claim.lock").exists()
    assert not (tmp_path / "claim.lock").exists()


# Places


def test_places_are_given_out_once_and_the_last_one_ends_it(tmp_path: Path, pulse: Pulse) -> None:
    rounds = Round(tmp_path, SPACE, 0, [])
    held = [rounds.claim(pulse) for _ in range(5)]
    assert [trial and trial.user_attrs["place"] for trial in held] == [0, 1, 2, 3, 4]
    assert rounds.claim(pulse) is None and not rounds.finished()
    for number, trial in enumerate(held):
        told(rounds, trial, number / 10)
    assert rounds.finished() and rounds.claim(pulse) is None
    assert [t.value for t in rounds.final()] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert rounds.best(2) == [held[4].params, held[3].params]  # type: ignore[union-attr]


def test_what_a_dead_process_held_is_given_out_again_with_the_same_parameters(tmp_path: Path, pulse: Pulse) -> None:
    rounds = Round(tmp_path, SPACE, 0, [])
    told(rounds, rounds.claim(pulse))
    lost = rounds.claim(pulse)
    assert lost
    lost.set_user_attr("worker", dead(tmp_path / "workers"))
    kept = rounds.claim(pulse)
    assert kept and kept.user_attrs["place"] == 1 and kept.params == lost.params and kept.number != lost.number
    assert rounds.study.trials[lost.number].state == TrialState.FAIL
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):  # the dead one speaks after all: nobody listens
        lost.report(0.9, 1)
    told(rounds, kept)
    while trial := rounds.claim(pulse):
        told(rounds, trial)
    assert rounds.finished() and len(rounds.final()) == 5
    assert sum(t.state == TrialState.COMPLETE for t in rounds.study.trials) == 5


def test_what_stopped_by_itself_does_not_count_as_a_death(tmp_path: Path, pulse: Pulse) -> None:
    rounds = Round(tmp_path, SPACE, 0, [])
    for _ in range(2 * trials.ATTEMPTS):
        trial = rounds.claim(pulse)
        assert trial and trial.user_attrs["place"] == 0
        trial.set_user_attr("stopped", True)
        rounds.study.tell(trial, state=TrialState.FAIL)
    lost = rounds.claim(pulse)
    assert lost
    lost.set_user_attr("worker", dead(tmp_path / "workers"))
    again = rounds.claim(pulse)
    assert again and again.user_attrs["place"] == 0 and again.params == lost.params


def test_a_place_that_kills_its_processes_is_given_up(tmp_path: Path, pulse: Pulse) -> None:
    rounds = Round(tmp_path, SPACE, 0, [])
    for _ in range(trials.ATTEMPTS):
        trial = rounds.claim(pulse)
        assert trial and trial.user_attrs["place"] == 0
        trial.set_user_attr("worker", dead(tmp_path / "workers"))
    following = rounds.claim(pulse)
    assert following and following.user_attrs["place"] == 1
    assert [t.state for t in rounds.final()] == [TrialState.PRUNED]


@pytest.mark.parametrize("records", range(1, 9))
def test_a_claim_that_dies_halfway_costs_nothing(tmp_path: Path, pulse: Pulse, records: int) -> None:
    """Killed after the first, second, ... record of a claim, also of one that repeats a lost trial."""
    rounds = Round(tmp_path, SPACE, 0, [])
    lost = rounds.claim(pulse)
    assert lost
    lost.set_user_attr("worker", dead(tmp_path / "workers"))
    path = tmp_path / "journal.jsonl"
    before = len(path.read_bytes().splitlines())
    rounds.claim(pulse)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: before + records]))

    again = Round(tmp_path, SPACE, 0, [])
    other = pulse_in(tmp_path / "workers")
    pulse.close()
    while trial := again.claim(other):
        told(again, trial)
    other.close()
    assert again.finished() and len(again.final()) == 5
    assert again.final()[0].params == lost.params
    assert sum(t.state == TrialState.COMPLETE for t in again.study.trials) == 5


def test_a_later_phase_repeats_what_it_is_given(tmp_path: Path, pulse: Pulse) -> None:
    fixed = [{"optimizer.lr": 0.001, "loader.batch_size": 16}, {"optimizer.lr": 0.002, "loader.batch_size": 32}]
    rounds = Round(tmp_path, SPACE, 1, fixed)
    while trial := rounds.claim(pulse):
        told(rounds, trial)
    assert [t.params for t in rounds.final()] == fixed and rounds.finished()


def test_a_search_that_was_interrupted_proposes_what_it_would_have(tmp_path: Path, pulse: Pulse) -> None:
    def score(trial: optuna.Trial) -> float:
        return -abs(trial.params["optimizer.lr"] - 0.003)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, restart in ((whole, False), (parts, True)):
        folder.mkdir()
        rounds = Round(folder, SPACE, 0, [])
        while trial := rounds.claim(pulse):
            told(rounds, trial, score(trial))
            rounds = Round(folder, SPACE, 0, []) if restart else rounds
    found = [[t.params for t in Round(folder, SPACE, 0, []).final()] for folder in (whole, parts)]
    assert found[0] == found[1] and len(found[0]) == 5


def claim_all(folder: Path) -> None:
    """What a worker does, without training."""
    pulse, rounds = pulse_in(folder / "workers"), Round(folder, SPACE.sized(trials=12), 0, [])
    while trial := rounds.claim(pulse):
        rounds.study.tell(trial, 0.5)
    pulse.close()


def test_processes_that_claim_at_once_share_the_places(tmp_path: Path) -> None:
    several = [multiprocessing.get_context("fork").Process(target=claim_all, args=(tmp_path,)) for _ in range(3)]
    for process in several:
        process.start()
    for process in several:
        process.join(120)
    rounds = Round(tmp_path, SPACE.sized(trials=12), 0, [])
    assert sorted(rounds.places()) == list(range(12)) and all(len(held) == 1 for held in rounds.places().values())
    assert len(rounds.study.trials) == 12
