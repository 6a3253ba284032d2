"""The configuration table: one parameter at a time, every number from the stored predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pcamlib.experiments import sensitivity


def test_rows_are_the_reports_of_the_runs(
    tiny: Any, synthetic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "CHANGES", (("optimizer.lr", "0.1"), ("model.hidden_units", "[4, 4]")))
    table, runs = sensitivity.table(tiny(), synthetic_dir, tmp_path, lambda line: None)
    assert table["parameter"].tolist() == ["(base)", "seed", "seed", "optimizer.lr", "model.hidden_units"]
    assert table["from"].tolist() == [None, "0", "0", "0.001", "[8]"]
    assert table["to"].tolist() == [None, "1", "2", "0.1", "[4, 4]"]
    reports = [run.predictions("valid").report()["metrics"] for run in runs]
    for row, found in zip(table.to_dict("records"), reports, strict=True):
        for name in ("auc", "nll"):
            assert row[f"valid {name}"] == round(found[name]["value"], 4)
            gap = found[name]["value"] - reports[0][name]["value"]
            if found is reports[0]:
                assert row[f"{name} minus base"] is row[f"95 % of {name} minus base"] is None
            else:
                low, high = row[f"95 % of {name} minus base"]
                assert row[f"{name} minus base"] == round(gap, 4) and low < gap < high
    weights = [(run.success or {})["weights"] for run in runs]
    assert len(set(weights)) == len({run.path for run in runs}) == 5, "five runs, not one"
    base = runs[0].config.model_dump()
    for (key, _), run in zip((("seed", ""), ("seed", ""), *sensitivity.CHANGES), runs[1:], strict=True):
        section, _, field = key.rpartition(".")
        changed = run.config.model_dump()
        if section:
            changed[section][field] = base[section][field]
        else:
            changed[field] = base[field]
        assert changed == base, "nothing else was changed"


def test_every_change_is_a_valid_setting_of_the_course_s_model_that_changes_something() -> None:
    base = sensitivity.Config.model_validate({**sensitivity.Config().model_dump(), "model": {"name": "mlp"}})
    changed = [base.override(f"{key}={value}") for key, value in sensitivity.CHANGES]
    assert len(sensitivity.CHANGES) == 5 and len({config.digest() for config in [base, *changed]}) == 6
