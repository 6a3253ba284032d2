"""Small roots with their own notebooks and journal folder, without evidence and with all of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from journal_evidence import data_evidence, notebook, reproducibility_evidence

from pcamlib.sources import ROOT


@pytest.fixture(scope="session")
def template_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with notebooks, journal folder and README, and no evidence."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(ROOT / "journal" / "templates", root / "journal" / "templates")
    (root / "journal" / "prose").mkdir()
    shutil.copy(ROOT / "journal" / "prose" / "README.md", root / "journal" / "prose")
    (root / "journal" / "group.yaml").write_text('number: ""\nmembers: []\nrepository: ""\nbase: ""\n')
    (root / "requirements.lock").write_text("torch==2.13.0\n")
    (root / "README.md").write_text("# PCam\n## Installation\n## Data set-up\n## Training\n## Inference\n")
    notebook(root, "00_data", "import pcamlib.files")
    notebook(root, "01_reproducibility", "from pcamlib.seeding import seed_everything")
    return root


@pytest.fixture(scope="session")
def evidence_root(template_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the complete synthetic evidence of both notebooks."""
    root = tmp_path_factory.mktemp("complete") / "root"
    shutil.copytree(template_root, root)
    data_evidence(root, synthetic=True).close()
    reproducibility_evidence(root, synthetic=True).close()
    return root


@pytest.fixture
def root(template_root: Path, tmp_path: Path) -> Path:
    """A fresh root without evidence."""
    return Path(shutil.copytree(template_root, tmp_path / "root"))


@pytest.fixture
def complete(evidence_root: Path, tmp_path: Path) -> Path:
    """A fresh root with complete evidence."""
    return Path(shutil.copytree(evidence_root, tmp_path / "complete"))
