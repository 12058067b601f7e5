"""Dashboard, alerts and scrape configuration ask for what the code exports, and show all of it."""

from __future__ import annotations

import json
import re
from functools import reduce
from typing import Any

import pytest
import yaml

from common.config import REPOSITORY, Section, TrainConfig
from common.events import EVENTS
from common.metrics import METRICS, gauge
from deploy import dashboard

FILES = REPOSITORY / "deploy" / "monitoring"
RUNBOOK = REPOSITORY / "docs" / "operations.md"
# The gauges as Prometheus sees them.
EXPORTED = {f"ray_{gauge(key.replace('<scorer>', 'any'))[0]}" for key in METRICS}


def names(query: str) -> set[str]:
    """The metrics of a PromQL expression: identifiers outside strings and braces, neither functions nor operators."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"|offset \w+", " ", query)
    assert bare.count("(") == bare.count(")"), query
    return set(re.findall(r"\b(?!and\b|or\b|unless\b|on\b|ignoring\b|by\b)[a-zA-Z_:][\w:]*\b(?!\s*\()", bare))


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    return json.loads((FILES / "grafana.json").read_text())


def test_metric_names_are_found_in_a_query() -> None:
    query = 'max_over_time(rate(a_b{run=~"x"}[5m])[1h:]) / c > 0.5 and (d offset 1h)'
    assert names(query) == {"a_b", "c", "d"}


def test_the_shipped_dashboard_is_the_one_of_the_code(shown: dict[str, Any]) -> None:
    assert (FILES / "grafana.json").read_text() == dashboard.render(), "run `make dashboard`"
    assert {key for row in dashboard.PANELS.values() for _, _, keys in row for key in keys} <= METRICS.keys()


def test_every_query_names_an_exported_metric_and_every_metric_is_shown(shown: dict[str, Any]) -> None:
    queries = [target["expr"] for panel in shown["panels"] for target in panel.get("targets", [])]
    asked = [names(query) for query in queries]
    assert all(len(found) == 1 and found <= EXPORTED for found in asked)
    assert set().union(*asked) == EXPORTED


def test_panels_do_not_overlap(shown: dict[str, Any]) -> None:
    cells = [
        (panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy)
        for panel in shown["panels"]
        for dx in range(panel["gridPos"]["w"])
        for dy in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    numbers = [panel["id"] for panel in shown["panels"]]
    assert len(numbers) == len(set(numbers))


def test_every_alert_names_exported_metrics_and_a_section_of_the_runbook() -> None:
    (group,) = yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]
    headings = re.findall(r"^## (.+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"])
    for rule in group["rules"]:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        found = names(rule["expr"])
        assert found and found <= EXPORTED, rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"].split("Runbook: ")[1] in headings
        assert re.fullmatch(r"\d+[mh]", rule.get("for", "1m"))


def test_the_runbook_names_fields_metrics_and_events_that_exist() -> None:
    named = set(re.findall(r"`([a-z_]+(?:[./][a-z_]+)*)(?:=[^`]*)?`", RUNBOOK.read_text()))
    sections = {field for field, value in TrainConfig() if isinstance(value, Section)}
    fields = {name for name in named if name.partition(".")[0] in sections and "." in name}
    metrics = {name for name in named if "/" in name and f"{name.partition('/')[0]}/" in " ".join(METRICS)}
    events = {name for name in named if re.fullmatch(r"(replica|learner|reward|checkpoint)_[a-z]+", name)}
    assert min(len(fields), len(metrics), len(events)) > 4
    for name in fields:
        reduce(getattr, name.split("."), TrainConfig())
    assert metrics <= METRICS.keys() and events <= EVENTS.keys()


def test_prometheus_reads_the_rules_and_rays_own_list_of_nodes() -> None:
    config = yaml.safe_load((FILES / "prometheus.yaml").read_text())
    assert config.keys() == {"global", "rule_files", "scrape_configs"}
    assert all((FILES / name).is_file() for name in config["rule_files"])
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
