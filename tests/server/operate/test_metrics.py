"""Prometheus's view of a run: real HTTP, read with Prometheus's own parser."""

import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.errors import ConfigError
from common.system.processes import free_ports
from server.operate.prometheus import exposed
from server.run.state import STATES
from tests.harness.sample_run import SITES, begin, evaluate, play_round

RUN = (("run", "sample-run"), ("strategy", "fedftg"))
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(port: int) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def of(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, tuple(sorted([*RUN, *labels.items()]))))


def test_scrape_follows_the_run(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    folder = begin(tmp_path / "sample-run")
    with exposed(folder.path, "127.0.0.1", port):
        first = scrape(port)
        assert of(first, "fedspan_rounds") == 4
        assert of(first, "fedspan_round_seconds") is None
        assert of(first, "fedspan_sites_connected") == 3
        play_round(folder, 1)
        folder.event("client_disconnected", client="site-b")
        folder.event("update_refused", round=1, client="site-c", reason="site-c: NaN", kind="RefusedUpdate")
        evaluate(folder, "server", 1)
        seen = scrape(port)
        assert of(seen, "fedspan_round") == 1
        assert of(seen, "fedspan_round_seconds") == 80.0
        assert of(seen, "fedspan_bytes_total", direction="up") == 3 * 106_200_000
        assert of(seen, "fedspan_sites_connected") == 2
        assert of(seen, "fedspan_sites_admitted") == 3
        assert of(seen, "fedspan_site_connected", site="site-b") == 0
        assert of(seen, "fedspan_site_refusals", site="site-c") == 1
        assert of(seen, "fedspan_problems_total", kind="update refused") == 1
        assert of(seen, "fedspan_held_out_loss") == pytest.approx(3.91 - 1.3 * 0.5)
        states = {name: of(seen, "fedspan_run_state", fedspan_run_state=name) for name in STATES}
        assert [name for name, value in states.items() if value] == ["running"]
        folder.finish()
        folder.close()
        assert of(scrape(port), "fedspan_run_state", fedspan_run_state="completed") == 1
    with exposed(folder.path, "127.0.0.1", port):  # the port is free again, and nothing was lost
        assert of(scrape(port), "fedspan_bytes_total", direction="up") == 3 * 106_200_000


def test_labels_are_names_and_kinds_alone(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    folder = begin(tmp_path / "sample-run")
    folder.event(
        "client_failed", round=1, client="site-a", reason="a text that may be long", kind="MemoryError", counted=True
    )
    folder.close()
    with exposed(folder.path, "127.0.0.1", port):
        labels = {label for _, labels in scrape(port) for label in labels}
    allowed = {"down", "up", "failed", *STATES, *SITES, *dict(RUN).values()}
    assert {value for _, value in labels} <= allowed
    assert "failed" in {value for _, value in labels}


@pytest.mark.parametrize("given", [None, 70_000])
def test_port_that_cannot_be_had_is_named(tmp_path: Path, given: int | None) -> None:
    (port,) = free_ports(1)
    with (
        exposed(tmp_path, "127.0.0.1", port),
        pytest.raises(ConfigError, match=f"--metrics-port: 127.0.0.1:{given or port} cannot be listened on"),
        exposed(tmp_path, "127.0.0.1", given or port),
    ):
        pass
