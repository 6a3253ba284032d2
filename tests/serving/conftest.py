"""A checkpoint that many tests read: of a small network, trained for seconds on synthetic patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pcamlib.config import parse, recipe
from pcamlib.data.patches import open_split
from pcamlib.serving import service as serving
from pcamlib.serving.drift import Reference
from pcamlib.serving.predict import Predictor
from pcamlib.serving.upload import Limits
from pcamlib.training import loop


@pytest.fixture(scope="session")
def checkpoint(synthetic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best.safetensors of a finished run on `synthetic_dir`: a cnn 8 channels wide, 32 steps, float32."""
    changes = ["model.width=8", "train.epochs=null", "train.steps=32", "train.precision=fp32", "train.threads=1"]
    run = tmp_path_factory.mktemp("serving") / "run"
    done = loop.train(parse(recipe("cnn"), changes), synthetic_dir, run, report=lambda line: None)
    return done.best


@pytest.fixture(scope="session")
def reference(checkpoint: Path, synthetic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference of the synthetic valid split, for `checkpoint`."""
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    Reference.build(Predictor(checkpoint), open_split(synthetic_dir, "valid")).save(path)
    return path


@pytest.fixture
def make_service(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., serving.Service]]:
    """`make_service(limit=value, ..., reference=, collect=, pixels=)`: a service that computes with torch.

    Exporting the network takes seconds; one test of test_api.py does it.
    """
    monkeypatch.setattr(serving, "engine", lambda predictor, threads: predictor.probability)
    made: list[serving.Service] = []

    def make(
        reference: Path | None = None, collect: Path | None = None, pixels: bool = False, **limits: Any
    ) -> serving.Service:
        predictor = Predictor(checkpoint)
        known = Reference.load(reference, predictor.model) if reference else None
        made.append(serving.Service(predictor, Limits(**limits), known, collect, pixels))
        return made[-1]

    yield make
    for service in made:
        service.close()
