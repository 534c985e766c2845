"""The metrics that the documentation and the dashboard name are the metrics that the server has."""

import json
import re
from pathlib import Path

from prometheus_client import Counter
from prometheus_client.parser import text_string_to_metric_families

from neuron_minimax.serving.engine_thread import PREFIX, Metrics

DOCS = Path(__file__).parent.parent / "docs"


def exported():
    """(names of all samples, names of metrics, names of labels); each labelled metric is used
    once.
    """
    metrics = Metrics()
    for metric in vars(metrics).values():
        # One with a label has no sample before the label's first value.
        if isinstance(metric, Counter) and not any(family.samples for family in metric.collect()):
            metric.labels("x")
    families = list(text_string_to_metric_families(metrics.render().decode()))
    samples = [
        sample
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    names = {sample.name for sample in samples}
    return (
        names,
        {metric_of(name) for name in names},
        {label for sample in samples for label in sample.labels},
    )


def metric_of(sample):
    return re.sub("_(bucket|sum|count)$", "", sample)


def test_the_dashboard_asks_for_every_metric_and_for_no_other():
    names, metrics, labels = exported()
    dashboard = json.loads((DOCS / "grafana_dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = {name for query in queries for name in re.findall(rf"{PREFIX}_\w+", query)}
    assert used <= names
    assert {metric_of(name) for name in used} == metrics
    pairs = [pair for query in queries for pair in re.findall(r"by \((\w+)\)|\{(\w+)=", query)]
    assert {label for pair in pairs for label in pair if label} <= labels


def test_the_documented_metrics_are_all_and_only_those_that_exist():
    _, metrics, _ = exported()
    section = (DOCS / "serving.md").read_text().partition("## Watching it")[2].partition("##")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    documented = {
        f"{PREFIX}_{name}" for row in rows for name in re.findall(r"`(\w+)", row.split("| ")[1])
    }
    assert documented == metrics
