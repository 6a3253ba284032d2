"""Registered models: entered once, and every planted fault found."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pcamlib.errors import CheckpointError, ConfigError
from pcamlib.files import sha256_file
from pcamlib.serving import registry
from pcamlib.training import checkpoint as checkpoints


@pytest.fixture(scope="module")
def registered(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with one registered model; nobody may change it."""
    root = tmp_path_factory.mktemp("registry")
    registry.register(checkpoint, "small", root)
    return root


@pytest.fixture
def root(registered: Path, tmp_path: Path) -> Path:
    """A copy of `registered` to spoil."""
    return Path(shutil.copytree(registered, tmp_path / "root"))


def edit(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the one entry of the index."""
    path = root / "models/index.yaml"
    stored = yaml.safe_load(path.read_text())
    change(stored["models"][0])
    path.write_text(yaml.safe_dump(stored))


def rewrite(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what the checkpoint says of itself, and enter it anew: index and checkpoint then say the same."""
    tensors, meta = checkpoints.load(root / "models/small.safetensors")
    change(meta)
    checkpoints.save(root / "changed.safetensors", tensors, meta)
    (root / "models/index.yaml").unlink()
    registry.register(root / "changed.safetensors", "small", root)


def failed(root: Path, data: Path) -> dict[str, str]:
    """Reason by check, of those that failed."""
    return {row.check: row.reason for row in registry.verify(root, str(data)) if not row.passed}


def test_an_entry_says_what_the_model_must_reproduce(registered: Path, checkpoint: Path) -> None:
    (entry,) = registry.entries(registered)
    meta = checkpoints.load(checkpoint)[1]
    assert (entry.name, entry.file, entry.synthetic) == ("small", "models/small.safetensors", True)
    assert entry.sha256 == sha256_file(checkpoint) == sha256_file(registered / entry.file)
    assert entry.bytes == checkpoint.stat().st_size and entry.model == meta["model"]
    assert entry.metric.value == meta["recorded"]["metrics"]["auc"]["value"] and entry.metric.n == 256
    assert (entry.metric.split, entry.metric.fingerprint) == ("valid", meta["provenance"]["data"]["valid"])
    assert entry.decision.model_dump() == meta["decision"] and set(entry.data) == {"train", "valid"}


def test_a_whole_model_passes_every_check(registered: Path, synthetic_dir: Path) -> None:
    rows = registry.verify(registered, str(synthetic_dir))
    assert [(row.model, row.check, row.passed) for row in rows] == [
        ("small", check, True) for check in ("file", "size", "loads", "score")
    ]
    assert "n = 256 valid patches (synthetic)" in rows[-1].reason


def test_a_name_is_given_once(root: Path, checkpoint: Path) -> None:
    before = sha256_file(root / "models/index.yaml")
    with pytest.raises(ConfigError, match=r"'small' is registered already.*choose another name"):
        registry.register(checkpoint, "small", root)
    for name in ("../small", "", "a b", "Ä"):
        with pytest.raises(ConfigError, match="lower-case letters"):
            registry.register(checkpoint, name, root)
    assert sha256_file(root / "models/index.yaml") == before
    registry.register(checkpoint, "small-2", root)
    assert [entry.name for entry in registry.entries(root)] == ["small", "small-2"]


def test_what_cannot_be_registered_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = tmp_path / "last.safetensors"
    tensors, meta = checkpoints.load(checkpoint)
    checkpoints.save(unfinished, tensors, {k: v for k, v in meta.items() if k not in ("recorded", "decision")})
    with pytest.raises(CheckpointError, match="its run did not finish"):
        registry.register(unfinished, "one", tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        registry.register(tmp_path / "none", "one", tmp_path)
    monkeypatch.setattr(registry, "LARGEST", 1000)
    with pytest.raises(CheckpointError, match="1,000 at most"):
        registry.register(checkpoint, "one", tmp_path)
    assert not (tmp_path / "models").exists()


def test_another_file_under_the_name(root: Path, synthetic_dir: Path, tmp_path: Path) -> None:
    tensors, meta = checkpoints.load(root / "models/small.safetensors")
    checkpoints.save(root / "models/small.safetensors", tensors, {**meta, "note": "retrained"})
    found = failed(root, synthetic_dir)
    assert set(found) == {"file", "index"} and found["index"].startswith("bytes ")
    edit(root, lambda entry: entry.update(sha256="0" * 64))
    assert failed(root, synthetic_dir)["file"].endswith("000000000000 in the index")


def test_a_truncated_checkpoint(root: Path, synthetic_dir: Path) -> None:
    path = root / "models/small.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    found = failed(root, synthetic_dir)
    assert set(found) == {"file", "loads"} and "no whole safetensors file" in found["loads"]


def test_a_model_that_is_not_there_and_one_that_is_not_entered(root: Path, synthetic_dir: Path) -> None:
    (root / "models/small.safetensors").rename(root / "models/other.safetensors")
    rows = registry.verify(root, str(synthetic_dir))
    assert [(row.model, row.check, row.passed) for row in rows] == [
        ("small", "file", False), ("other", "index", False)
    ]  # fmt: skip
    assert rows[0].reason == "models/small.safetensors is missing"


@pytest.mark.parametrize(
    ("field", "lie"),
    [
        ("synthetic", False), ("commit", "0" * 40), ("bytes", 1), ("model.width", 16), ("data.train", "e" * 64),
        ("decision.threshold", 0.01), ("metric.interval", [0.999, 1.0]), ("metric.best_of", 1), ("metric.n", 12),
        ("metric.name", "accuray"), ("metric.value", 0.999), ("metric.fingerprint", "e" * 64), ("metric.split", "test"),
    ],
)  # fmt: skip
def test_an_index_that_says_otherwise_than_the_checkpoint(
    root: Path, synthetic_dir: Path, field: str, lie: Any
) -> None:
    *above, last = field.split(".")
    edit(root, lambda entry: (entry[above[0]] if above else entry).update({last: lie}))
    found = failed(root, synthetic_dir)
    assert set(found) == {"index"} and found["index"].startswith(f"{field} {lie} in the index, ")
    assert re.search(r", [^ ].* in the checkpoint$", found["index"]) and "None" not in found["index"]


def test_a_checkpoint_of_an_unfinished_run_under_the_name(root: Path, synthetic_dir: Path) -> None:
    tensors, meta = checkpoints.load(root / "models/small.safetensors")
    del meta["recorded"]
    checkpoints.save(root / "models/small.safetensors", tensors, meta)
    assert failed(root, synthetic_dir)["loads"].startswith("carries no recorded score: its run did not finish")


def test_a_wrong_metric_in_index_and_checkpoint_alike(root: Path, synthetic_dir: Path) -> None:
    told = registry.entries(root)[0].metric.value - 0.003  # three times the tolerance
    rewrite(root, lambda meta: meta["recorded"]["metrics"]["auc"].update(value=told))
    found = failed(root, synthetic_dir)
    assert set(found) == {"score"} and f"recorded {told:.4f}" in found["score"]


def test_without_the_data_nothing_is_called_reproduced(root: Path, course_dir: Path, tmp_path: Path) -> None:
    rewrite(root, lambda meta: meta["recorded"].update(fingerprint="e" * 64))
    assert "not reproduced here: data absent (recorded on eeeeeeeeeeee" in failed(root, course_dir)["score"]
    assert "data absent" in failed(root, tmp_path)["score"]


@pytest.mark.parametrize("text", ["models: 3", "models: [1]", "models:\n- {name: a}", "[", "a: 1", ""])
def test_a_damaged_index_is_one_line(root: Path, text: str) -> None:
    (root / "models/index.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"index\.yaml") as error:
        registry.verify(root)
    assert "\n" not in str(error.value)


def test_the_commands(checkpoint: Path, synthetic_dir: Path, tmp_path: Path, pcam: Callable[..., Any]) -> None:
    assert pcam("verify", "--root", tmp_path) == (0, "no model in models/index.yaml; `pcam register` adds one\n", "")
    code, out, _ = pcam("register", checkpoint, "--name", "small", "--root", tmp_path)
    assert code == 0 and out.startswith("models/small.safetensors: ") and out.endswith("patches (synthetic)\n")
    code, out, _ = pcam("verify", "--root", tmp_path, "--data", synthetic_dir)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["ok"] * 4
    edit(tmp_path, lambda entry: entry.update(sha256="0" * 64))
    code, out, _ = pcam("verify", "--root", tmp_path, "--data", synthetic_dir)
    assert code == 1 and out.startswith("FAIL small, file: ")
