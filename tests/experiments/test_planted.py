"""Planted rows: spikes that point at them, a NaN that stops the run by name, values as stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcamlib.config import Config, parse
from pcamlib.data.flaws import rare_flaws
from pcamlib.data.patches import open_split
from pcamlib.errors import ConfigError, RunError
from pcamlib.experiments import culprits, gradients, planted
from pcamlib.training import loop
from pcamlib.training.state import Training


def quiet(line: str) -> None:
    """Reports nothing."""


def test_on_a_learned_class_spikes_point_at_flipped_labels(make_split: Any, tmp_path: Path) -> None:
    flipped = (11, 123, 222)
    make_split(tmp_path, "train", 512, 0, flip=flipped)
    make_split(tmp_path, "valid", 32, 1)
    config = parse({
        "loader": {"batch_size": 32, "augment": ["d4"]}, "optimizer": {"lr": 0.01},
        "model": {"name": "mlp", "crop": 32, "pool": 4, "hidden_units": [4]},
        "train": {"epochs": 8, "threads": 1, "precision": "fp32", "device": "cpu"},
    })  # fmt: skip
    run = loop.train(config, tmp_path, tmp_path / "run", report=quiet)
    patches = open_split(tmp_path, "train")
    spikes = [each.step for each in gradients.spikes(gradients.norms(run)) if each.step > 96]
    traced = culprits.trace(run, tmp_path, spikes)
    witness = planted.Witness("mlp", [run], traced, {"flip": np.array(flipped)})
    holding = [s for s in range(97, 129) if np.isin(culprits.batch_rows(config, patches, s), flipped).any()]
    # in the last two epochs, when all else is learned
    assert spikes == holding, "each batch with a flipped label spikes, and no other"
    assert all(each.rows[0] in flipped and each.share > 0.5 for each in traced)
    assert all(each.without < 0.5 * gradients.norms(run)[each.step - 1] for each in traced), "it was that patch"
    (row,) = planted.marked(witness, patches)
    assert row["precision"] == row["outranks"] == 1.0 and row["loss, spiked"] > 1
    table = culprits.spike_table([run], traced, patches)
    assert all(line["spike"] and line["first patch"] in flipped for line in table)
    figure, shown = culprits.gallery(traced, patches, {"flip": np.array(flipped)}, most=3)
    assert len(figure.axes) == 3 * len(traced) and all("flip: no flag" in line[0] for line in shown.values())


def raw(*items: str) -> Config:
    """A small CNN with batch norm, which spreads one NaN over all logits of a batch, fed the values as stored."""
    return parse({**planted.BASE, "train": {"steps": 20, "checkpoint_every": 1, "threads": 1}}, [*items])


def test_nan_stops_the_run_names_the_patch_and_keeps_the_last_good_checkpoint(make_split: Any, tmp_path: Path) -> None:
    holes = (40, 41, 150)
    make_split(tmp_path, "train", 192, 0, nan=holes)
    make_split(tmp_path, "valid", 32, 1)
    config = raw("data.drop=[]", "seed=1", "loader.batch_size=16", "model.width=4")
    patches = open_split(tmp_path, "train")
    stop = planted.stopped("nan", config, tmp_path, tmp_path / "runs", quiet)
    batches = [set(culprits.batch_rows(config, patches, step).tolist()) & set(holes) for step in range(1, 13)]
    first = next(place for place, found in enumerate(batches, start=1) if found)
    assert first > 1, "another seed: the point is what was kept"
    assert stop.step == first and set(stop.named) == batches[first - 1]
    assert "their pixels are not finite: leave them out (data.drop)" in stop.message
    assert stop.again == stop.message and stop.kept == first - 1 and stop.finite
    with pytest.raises(RunError, match="came to its end; no loss was infinite or NaN"):
        planted.stopped("clean", raw("train.steps=1", "model.width=4"), tmp_path, tmp_path / "runs", quiet)


def test_without_raw_the_same_rows_are_harmless(make_split: Any, tmp_path: Path) -> None:
    make_split(tmp_path, "train", 64, 0, nan=(3,))
    make_split(tmp_path, "valid", 32, 1)
    config = raw("data.drop=[]", "data.raw=false", "train.steps=3", "model.width=4")
    assert loop.train(config, tmp_path, tmp_path / "run", report=quiet).success


def test_a_patch_whose_answer_alone_is_infinite_is_named(tiny: Any, synthetic_dir: Path) -> None:
    state = Training(tiny(), synthetic_dir)
    batch = next(iter(state.loader))
    images = batch.images.float()
    images[5] = 3e38
    state.model.scale.fill_(10)
    with pytest.raises(RunError, match=rf"patches {batch.rows[5]}: the answers to them alone are not finite"):
        state.step(batch._replace(images=images), 0.0)


def test_raw_and_whole_grey_levels_exclude_each_other(tiny: Any) -> None:
    for items in (("model.pool=2",), ("loader.augment=[stain]",)):
        with pytest.raises(ConfigError, match=r"data.raw=true needs model.pool=1, no stain augmentation and"):
            tiny("data.raw=true", *items)


def test_spiked_mlp_points_at_1e5_and_the_clean_copy_does_not_show_it(tmp_path: Path, synthetic_dir: Path) -> None:
    truth = rare_flaws(synthetic_dir, tmp_path, patches=256, each=3, nan=1).rows
    patches = open_split(tmp_path, "train")
    steps = ("train.epochs=2", "train.threads=1", "loader.batch_size=16")
    config = parse(planted.BASE, [*planted.WITNESSES["mlp"][0], *steps])
    run = loop.train(config, tmp_path, tmp_path / "run", report=quiet)
    spikes = gradients.spikes(gradients.norms(run))
    traced = culprits.trace(run, tmp_path, [each.step for each in spikes])
    far = [each for each, spike in zip(traced, spikes, strict=True) if spike.norm > 10 * spike.usual]
    assert far and all(each.rows[0] in truth["train/spike"] for each in far), "hard patches make small spikes too"
    assert all("range" in culprits.flags(patches, int(each.rows[0])) for each in far)
    copy = loop.train(config.override("data.raw=false"), tmp_path, tmp_path / "copy", report=quiet)
    assert gradients.norms(copy).max() < 0.2 * gradients.norms(run).max()
    assert set(planted.truth_of(tmp_path)) == {"1e5", "flip", "nan"}


def test_witnesses_are_traced_where_they_spike_and_where_planted_rows_came_last(
    tmp_path: Path, synthetic_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = rare_flaws(synthetic_dir, tmp_path / "data", patches=160, each=3, nan=1).rows
    small = ("model.name=mlp", "model.hidden_units=[8]", "loader.batch_size=8", "train.threads=1", "train.epochs=1")
    monkeypatch.setattr(planted, "WITNESSES", {"mlp": (small, ("1e5", "flip"))})
    (witness,) = planted.witnesses(tmp_path / "data", [0, 1], tmp_path / "runs", quiet)
    patches = open_split(tmp_path / "data", "train")
    rows = np.concatenate([truth["train/spike"], truth["train/flip"]])
    for run in witness.runs:
        steps = {each.step for each in witness.traced if each.seed == run.config.seed}
        spiked = {each.step for each in gradients.spikes(gradients.norms(run))}
        judged = range(gradients.FEWEST + 1, 21)
        holding = [s for s in judged if np.isin(culprits.batch_rows(run.config, patches, s), rows).any()]
        assert steps == spiked | set(holding[-planted.LATE :])
    table = planted.marked(witness, patches)
    assert [row["planted"] for row in table] == ["1e5", "flip"] and all(row["seeds"] == 2 for row in table)
    assert all(0 <= row["recall"] <= 1 and 0 <= row["outranks"] <= 1 for row in table)
