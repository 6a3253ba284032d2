"""Calibration: a known temperature is found, on the half that does not judge it."""

from __future__ import annotations

import numpy as np
import pytest

from pcamlib.experiments import calibration


def test_temperature_undoes_a_known_one() -> None:
    rng = np.random.default_rng(0)
    honest = rng.uniform(0.02, 0.98, 8000)
    label = (rng.random(8000) < honest).astype(np.uint8)
    boasting = calibration.scaled(honest, 1 / 3)  # logits three times too large
    assert calibration.temperature(label, boasting) == pytest.approx(3, rel=0.1)
    after, both = calibration.crossed(label, boasting)
    assert np.abs(after - honest).max() < 0.03 and both == pytest.approx([3, 3], rel=0.1)
    rows = calibration.table(label[:1500], boasting[:1500], after[:1500]).set_index("metric")
    assert rows.loc["nll", "95 %"][1] < 0 and rows.loc["ece", "95 %"][1] < 0
    assert abs(rows.loc["auc", "difference"]) < 0.001
    curve = calibration.reliability(label, after)
    assert np.abs(np.subtract(curve["said"], curve["is"])).max() < 0.08 and sum(curve["patches"]) == 8000
    assert len(calibration.plot({"before": curve, "after": curve}).axes) == 4
