"""The alerting rules are whole, and name metrics and labels that the service has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pcamlib.serving import telemetry

FILE = Path(telemetry.__file__).with_name("alerts.yml")
RULES = [rule for group in yaml.safe_load(FILE.read_text())["groups"] for rule in group["rules"]]
#: Of Prometheus itself.
FUNCTIONS = {"sum", "max", "increase", "rate", "histogram_quantile"}
WORDS = {"by", "and", "le", "up", "job", "instance"}


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Labels by name of each sample of a service that has done everything once."""
    one = telemetry.Telemetry({"run": "first"})
    one.requests.labels("/predict", "200").inc()
    one.latency.labels("/predict").observe(0.1)
    one.errors.labels("415").inc()
    one.statistic.labels("hue").set(0.1)
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(generate_latest(one.registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_is_whole(rule):
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))
    assert set(rule["annotations"]) == {"summary", "action"}
    assert "{{ $labels.instance }}" in rule["annotations"]["summary"]
    for text in rule["annotations"].values():
        assert text.count("{{") == text.count("}}")
    for pair in ("()", "[]", "{}"):
        assert rule["expr"].count(pair[0]) == rule["expr"].count(pair[1])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_asks_for_what_the_service_tells(rule, known):
    expression = re.sub(r'"[^"]*"', '""', rule["expr"])
    for metric, matchers in re.findall(r"\b((?:pcam|process)_\w+)(?:\{([^}]*)\})?", expression):
        assert metric in known, f"the service has no {metric}"
        for label in re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", matchers):
            assert label in known[metric] | {"job", "instance"}, f"{metric} has no label {label}"
    for labels in re.findall(r"\bby \(([^)]*)\)", expression):
        asked = {label.strip() for label in labels.split(",")} - {"instance"}
        assert any(asked <= labels for labels in known.values())
    rest = re.sub(r"\[\w+\]|\{[^}]*\}|\b(?:pcam|process)_\w+|\d[\de.]*", "", expression)
    assert set(re.findall(r"[a-z_]+", rest)) <= FUNCTIONS | WORDS | {
        label for labels in known.values() for label in labels
    }


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rate_is_taken_of_a_counter_and_of_nothing_else(rule):
    counters = re.findall(r"\bpcam_\w+_(?:total|bucket)\b", rule["expr"])
    rates = re.findall(r"(?:rate|increase)\((pcam_\w+)(?:\{[^}]*\})?\[\d+[mh]\]\)", rule["expr"])
    assert all(name.endswith(("_total", "_bucket")) for name in rates)
    if rule["alert"] != "PcamCollectingEnded":  # once ended, it stays ended
        assert sorted(rates) == sorted(counters)


def test_every_way_to_fail_has_a_rule():
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    text = " ".join(rule["expr"] for rule in RULES)
    for metric in ("up{", "pcam_drifted", "pcam_drift_statistic", "pcam_outlying_total", "pcam_predictions_total",
                   "pcam_queue_full_total", "pcam_latency_seconds_bucket", "pcam_collect_failures_total"):  # fmt: skip
        assert metric in text, metric
