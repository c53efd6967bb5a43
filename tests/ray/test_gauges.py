"""Figures of a run that Ray serves to Prometheus are those of its records, and the dashboard asks for no others."""

import json
import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest
import ray
import tiny

from peftscale import driver, gauges, records, workers
from peftscale.config import RunConfig
from peftscale.records import StepRecord

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

DASHBOARD = Path(__file__).parents[2] / "cluster" / "monitoring" / "dashboard.json"


def _served(port: int, wanted: int) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Name -> (tags, value) of our figures, once so many of them are there."""
    deadline = time.monotonic() + 30
    while True:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for name, tags, value in re.findall(r"^ray_(peftscale_\w+)\{(.*)\} (\S+)$", text, flags=re.MULTILINE):
            found.setdefault(name, []).append((dict(re.findall(r'(\w+)="([^"]*)"', tags)), float(value)))
        if len(found) >= wanted or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def _run(tmp_path: Path) -> RunConfig:
    cfg = tiny.run_config(tmp_path, **{"name": "seen", "cluster.workers": 2, "cluster.cpus_per_worker": 0.5})
    driver.run(cfg, show=False)
    return cfg


def test_prometheus_is_told_what_the_records_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers.set_ray_defaults()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 1024**2,
        _metrics_export_port=port,
    )
    try:
        cfg = _run(tmp_path)
        found = _served(port, len(gauges.FIGURES) - 1)  # no step was skipped
    finally:
        ray.shutdown()
    steps = [row for row in records.read(cfg.metrics_path) if isinstance(row, StepRecord)]
    names = {figure.name + ("_total" if figure.kind == "counter" else "") for figure in gauges.FIGURES}
    assert set(found) == names - {"peftscale_skipped_steps_total"}
    assert all(tags["run"] == "seen" for of_name in found.values() for tags, _ in of_name)
    assert [value for _, value in found["peftscale_step"]] == [len(steps)]
    assert {tags["adapter"]: value for tags, value in found["peftscale_loss"]} == pytest.approx(steps[-1].adapters)
    for name in ("reduced", "gathered"):
        by_rank = {tags["rank"]: value for tags, value in found[f"peftscale_{name}_bytes_total"]}
        assert by_rank["0"] == sum(getattr(row, f"{name}_bytes") for row in steps) and set(by_rank) == {"0", "1"}
    assert {tags["rank"] for tags, _ in found["peftscale_peak_rank_bytes"]} == {"0", "1"}


def test_the_dashboard_asks_for_every_figure_and_for_no_other() -> None:
    asked = set(re.findall(r"ray_(peftscale_\w+)", DASHBOARD.read_text()))
    assert asked == {figure.name + ("_total" if figure.kind == "counter" else "") for figure in gauges.FIGURES}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert all(panel["title"] and panel["targets"] for panel in panels)
