"""`pcam submit train` and `pcam submit hpo` through a real Slurm, once each; how they survive is tested beside this."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster

from pcamlib.experiments.hpo import open_search
from pcamlib.files import read_json
from pcamlib.jobs import ledger

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]
SPACE = """
base: mlp
metric: auc
seed: 0
sampler: {name: random}
pruner: {name: none}
phases:
  - {trials: 3, limit: 256, samples: 256, evaluations: 1}
parameters:
  optimizer.lr: {type: float, low: 1.0e-3, high: 1.0e-2, log: true, why: "it decides most"}
"""


def test_a_training_and_a_search(
    cluster: Cluster, login: Callable[..., Any], tmp_path: Path, synthetic_dir: Path
) -> None:
    root, run, study = tmp_path / "a root", tmp_path / "a run", tmp_path / "a search"
    space = tmp_path / "space.yaml"
    space.write_text(SPACE)
    common = ("--site", "local", "--data", synthetic_dir, "--root", root, "--cpus", "1", "--memory", "2G")
    calls = (
        ("submit", "train", "--out", run, "--recipe", "mlp", *common, "train.epochs=1"),
        ("submit", "hpo", space, "--out", study, "--workers", "3", *common),
    )
    for call in calls:
        code, out, err = login(*call)
        assert code == 0 and ("forecast: about" in out) == (call[1] == "train"), (out, err)
    entries = ledger.read(root / "runs" / "slurm")
    assert [entry.name for entry in entries] == ["train-a-run", "hpo-a-search", "hpo-end-a-search"]
    assert all("on its way already" in login(*call)[1] for call in calls)
    assert ledger.read(root / "runs" / "slurm") == entries
    cluster.wait([entry.id for entry in entries], 180)
    _, told, _ = login("jobs", "--root", root)
    assert told.count("COMPLETED") == 5 and "log:" not in told, told
    assert (run / "SUCCESS").is_file() and (study / "champion.yaml").is_file()
    assert read_json(run / "provenance.json")["slurm"]["job_id"] == entries[0].id
    assert len(open_search(study).table()) == 3
    assert all("finished; nothing to submit" in login(*call)[1] for call in calls)
