"""The scales: strict files, an order that respects `after`, and the committed ones fit their notebooks."""

from __future__ import annotations

from pathlib import Path

import pytest

from pcamlib.errors import ConfigError
from pcamlib.jobs import scale
from pcamlib.jobs.parameters import validate_parameters
from pcamlib.sources import ROOT


@pytest.fixture
def load(tmp_path: Path):
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    for stem in ("00_data", "01_twins", "02_leakage"):
        (notebooks / f"{stem}.ipynb").touch()

    def loaded(text: str, name: str = "smoke"):
        (tmp_path / "smoke.yaml").write_text(text)
        return scale.load(name, tmp_path, notebooks)

    return loaded


def test_order_and_defaults(load):
    jobs = load("01_twins: {after: [02_leakage]}\n00_data: {timeout: 60}\n02_leakage: {after: [00_data]}")
    assert list(jobs) == ["00_data", "02_leakage", "01_twins"]
    assert jobs["00_data"].timeout == 60.0
    assert jobs["01_twins"].parameters == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("00_dta: {}", "unknown notebook '00_dta'; did you mean '00_data'?"),
        ("7: {}", "unknown notebook '7'"),
        ("00_data: {timeuot: 3}", "00_data: unknown key 'timeuot'; did you mean 'timeout'?"),
        ("00_data: {resources: {cpu: 3}}", "unknown key 'resources.cpu'; did you mean 'resources.cpus'?"),
        ("00_data: {timeout: 0}", "timeout=0"),
        ("00_data: {timeout: '60'}", "timeout='60'"),
        ("00_data: {resources: {memory: lots}}", "resources.memory='lots'"),
        ("00_data: {resources: {time: 1:00:00}}", "put it in quotes"),
        ("00_data:", "expected `key: value` lines, found NoneType"),
        ("00_data: {after: [01_twins]}", "after: unknown notebook '01_twins'"),
        ("00_data: {after: [01_twins]}\n01_twins: {after: [00_data]}", "wait for each other: "),
        ("00_data: {after: [00_data]}", "wait for each other: 00_data -> 00_data"),
    ],
)
def test_what_does_not_fit_is_named(load, text, message):
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert message in str(caught.value)
    assert "smoke.yaml" in str(caught.value)


def test_an_unknown_scale(load):
    with pytest.raises(ConfigError, match="unknown scale 'smok'; did you mean 'smoke'"):
        load("00_data: {}", "smok")


def test_resources_in_units():
    wanted = scale.Resources(memory="28G", time="1-02:03:04")
    assert (wanted.megabytes, wanted.seconds) == (28_672, 93_784)
    assert scale.Resources(memory="900M").megabytes == 900 and scale.seconds("30:00") == 1800


@pytest.mark.parametrize("name", ["smoke", "course", "full"])
def test_the_committed_scales_fit_their_notebooks(name):
    jobs = scale.load(name)
    assert sorted(jobs) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    for stem, job in jobs.items():
        validate_parameters(ROOT / "notebooks" / f"{stem}.ipynb", job.parameters)
        assert job.timeout < job.resources.seconds, "Slurm would kill the job before its own limit"
