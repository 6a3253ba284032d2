"""Runs that notebooks ask for: trained once, found again while everything they rest on is the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pcamlib import provenance, seeding, sources
from pcamlib.config import Config
from pcamlib.data.patches import open_split
from pcamlib.files import digest
from pcamlib.training import loop
from pcamlib.training.runs import Run
from pcamlib.training.state import choose_device

_CODE = sources.digests(Path(loop.__file__))  # as loaded: an edit while a notebook runs must not relabel its results


def run(name: str, config: Config, data: Path, folder: Path, report: Callable[[str], None] = print) -> Run:
    """Train `config` into `folder/NAME-DIGEST`, or return the finished run there.

    The digest covers the configuration, the training code, the data and the promised environment, so a run that is
    found is the run that training would give again, bit by bit. Older runs of the same name are removed.
    """
    threads = seeding.set_threads(config.train.threads)
    basis = [
        config.digest(),
        _CODE,
        [open_split(data, split).fingerprint for split in ("train", "valid")],
        digest(open_split(data, "train").rows(clean=config.data.clean).tolist()),
        [torch.__version__, np.__version__, provenance.capability(), threads, provenance.world_size()],
        torch.cuda.get_device_name() if choose_device(config.train.device) == "cuda" else "cpu",
    ]
    path = folder / f"{name}-{digest(basis)[:8]}"
    for old in folder.glob(f"{name}-????????"):
        if old != path or not Run(old).success:
            shutil.rmtree(old)
    return Run(path) if path.exists() else loop.train(config, data, path, report=report)
