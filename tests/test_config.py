"""The configuration is strict, and its errors name the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pcamlib.config import Config, keys, parse, read_yaml, recipe
from pcamlib.errors import ConfigError


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"optimzer": {}}, "unknown key 'optimzer'; did you mean 'optimizer"),
        ({"optimizer": {"learning_rate": 1.0}}, "unknown key 'optimizer.learning_rate'"),
        ({"loader": {"batchsize": 3}}, "unknown key 'loader.batchsize'; did you mean 'loader.batch_size'"),
        ({"train": {"epochs": True}}, "train.epochs=True: "),
        ({"train": {"epochs": 1.5}}, "train.epochs=1.5: "),
        ({"train": {"epochs": "3"}}, "train.epochs='3': "),
        ({"train": {"epochs": 0}}, "train.epochs=0: .*greater than 0"),
        ({"seed": -1}, "seed=-1: "),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr='fast': "),
        ({"model": {"name": "resnet"}}, "model.name='resnet': .*'mlp', 'cnn' or 'd4'"),
        ({"data": {"drop": ["nan", "grey"]}}, r"data.drop.1='grey': "),
        ({"train": {"epochs": 1, "steps": 1}}, "give train.epochs or train.steps, not both"),
        ({"train": {}}, "training has no end"),
        ({"model": 3}, "model=3: "),
    ],
)
def test_errors_name_the_key(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(mapping)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "+1e-3", ".1e-2", "1.e-3"])
def test_override_reads_every_float(text: str) -> None:
    assert parse({}, [f"optimizer.lr={text}"]).optimizer.lr == 0.001


def test_overrides() -> None:
    config = parse(
        {"optimizer": {"lr": 0.5}}, ["seed=7", "loader.augment=[d4, stain]", "data.dir=/a=b", "schedule.warmup=0.1"]
    )
    assert (config.seed, config.optimizer.lr, config.loader.augment) == (7, 0.5, ["d4", "stain"])
    assert config.data.dir == "/a=b" and config.schedule.warmup == 0.1
    assert config.override("optimizer.lr=1").optimizer.lr == 1 and config.optimizer.lr == 0.5
    steps = config.override("train.steps=9")  # the two lengths exclude each other: the later wins
    assert (steps.train.steps, steps.train.epochs) == (9, None)
    assert steps.override("train.epochs=2").train.steps is None


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("lr", "'lr' is no override; write key=value"),
        ("lr=1", "unknown key 'lr'; did you mean 'optimizer.lr'"),
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'"),
        ("seed.x=1", "unknown key 'seed.x'"),
        ("train.epochs=true", "train.epochs=True"),
        ("train.epochs=1e1", "train.epochs=10.0"),
        ("optimizer.lr=[1", "optimizer.lr='\\[1'"),
    ],
)
def test_wrong_overrides(item: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse({"seed": 1}, [item])


def test_the_given_mapping_is_not_changed() -> None:
    mapping = {"optimizer": {"lr": 0.5}}
    parse(mapping, ["optimizer.lr=1"])
    assert mapping == {"optimizer": {"lr": 0.5}}


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 3  # type: ignore[misc]


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = parse({}, ["optimizer.lr=3e-7", "loader.augment=[d4]", "train.time_limit=1.5", "data.dir='1e5'"])
    (tmp_path / "c.yaml").write_text(config.yaml())
    again = parse(read_yaml(tmp_path / "c.yaml"))
    assert again == config and again.digest() == config.digest() and again.data.dir == "1e5"


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1\nb: 2\n", "not valid YAML"), ("- 1\n", "expected `key: value` lines, found list"), ("", "found NoneType")],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value) and "c.yaml" in str(caught.value)


def test_recipes() -> None:
    for name in ("mlp", "cnn"):
        assert parse(recipe(name)).model.name == name
    with pytest.raises(ConfigError, match="unknown recipe 'cn'; did you mean 'cnn'"):
        recipe("cn")
    with pytest.raises(ConfigError, match="no such configuration file"):
        recipe("nowhere.yaml")


def test_digest_is_of_what_decides_the_result() -> None:
    config = Config()
    same = config.override("data.dir=/elsewhere", "tracking.wandb=offline", "tracking.group=x")
    assert same.digest() == config.digest()
    items = ["seed=1", "optimizer.lr=0.5", "data.limit=5", "model.width=8", "train.epochs=2", "loader.augment=[d4]"]
    assert len({config.digest(), *(config.override(item).digest() for item in items)}) == len(items) + 1


def test_keys_lists_every_leaf() -> None:
    found = keys()
    assert "seed" in found and "optimizer.lr" in found and "train.select" in found
    assert not {"optimizer", "train", "data"} & set(found)
