"""A run's numbers for Prometheus, read from its folder at every scrape, so that they outlive the run's processes.

Labels name the run, its strategy and its sites; nothing here comes from a row.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, StateSetMetricFamily
from prometheus_client.registry import Collector

from common.errors import ConfigError
from server.run.state import STATES, RunState, SiteState, read_state

_RUN = ("run", "strategy")


class RunCollector(Collector):
    """Reads a run's folder whenever it is asked."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def collect(self) -> Iterator[Metric]:
        """All metrics of the run.

        Raises:
            RunFolderError: the folder cannot be read; the scrape then fails.
        """
        seen = read_state(self._run_dir)
        own = [seen.name, seen.strategy]
        state = StateSetMetricFamily("fedspan_run_state", "What the run does", labels=_RUN)
        state.add_metric(own, {name: name == seen.state for name in STATES})
        yield state
        for name, (what, value) in _of_run(seen).items():
            gauge = GaugeMetricFamily(name, what, labels=_RUN)
            if value is not None:
                gauge.add_metric(own, value)
            yield gauge
        moved = CounterMetricFamily(
            "fedspan_bytes", "Tensors sent and received, finished rounds", labels=[*_RUN, "direction"]
        )
        moved.add_metric([*own, "down"], seen.bytes_down)
        moved.add_metric([*own, "up"], seen.bytes_up)
        yield moved
        updates = CounterMetricFamily(
            "fedspan_updates", "Updates by age in rounds, buffered rounds", labels=[*_RUN, "age"]
        )
        for age, count in seen.ages.items():
            updates.add_metric([*own, str(age)], count)
        yield updates
        problems = CounterMetricFamily("fedspan_problems", "Refusals and failures of sites", labels=[*_RUN, "kind"])
        for kind, count in Counter(problem.what for problem in seen.problems).items():
            problems.add_metric([*own, kind], count)
        yield problems
        for name, what in _OF_SITE.items():
            gauge = GaugeMetricFamily(name, what, labels=[*_RUN, "site"])
            for site in seen.sites:
                if (number := _of_site(site)[name]) is not None:
                    gauge.add_metric([*own, site.site], number)
            yield gauge


def _of_run(seen: RunState) -> dict[str, tuple[str, float | None]]:
    """Gauges of the run: what they mean, and their values."""
    last = seen.finished_rounds[-1] if seen.finished_rounds else None
    return {
        "fedspan_round": ("The last round that was begun", seen.round),
        "fedspan_rounds": ("Rounds of the run", seen.rounds),
        "fedspan_round_seconds": ("Seconds of the last finished round", last.seconds if last else None),
        "fedspan_held_out_loss": ("Loss on the server's own set, of the last state that was evaluated", seen.loss),
        "fedspan_sites_connected": (
            "Admitted sites that are connected",
            sum(site.connection == "up" for site in seen.sites),
        ),
        "fedspan_sites_admitted": ("Sites that have been admitted", sum(site.rows is not None for site in seen.sites)),
        "fedspan_sites_left_out": (
            "Sites left out after refusals or errors in a row",
            sum(site.left_out is not None for site in seen.sites),
        ),
        "fedspan_last_event_timestamp_seconds": ("When something happened last", seen.last_event),
    }


_OF_SITE = {
    "fedspan_site_connected": "1 when the site is connected, 0 when not",
    "fedspan_site_last_seen_timestamp_seconds": "When the site gave its last sign of life",
    "fedspan_site_rounds": "Rounds that the site has trained in",
    "fedspan_site_work_round": "The round that the site was given work in last",
    "fedspan_site_refusals": "Its updates refused, and errors in their place, in a row",
    "fedspan_site_bytes_down": "Bytes of tensors sent to the site, of admitted updates' rounds",
    "fedspan_site_bytes_up": "Bytes of tensors it sent, of admitted updates' rounds",
    "fedspan_site_train_seconds": "Seconds of its last training",
}


def _of_site(site: SiteState) -> dict[str, float | None]:
    numbers = [site.connection == "up", site.last_seen, site.rounds, site.work, site.refusals]
    return dict(zip(_OF_SITE, [*numbers, site.bytes_down, site.bytes_up, site.seconds], strict=True))


@contextlib.contextmanager
def exposed(run_dir: Path, address: str, port: int | None) -> Iterator[None]:
    """Serve a run's metrics over HTTP at ``/metrics``; nothing without a port.

    Raises:
        ConfigError: the port cannot be had.
    """
    if port is None:
        yield
        return
    registry = CollectorRegistry()
    registry.register(RunCollector(run_dir))
    try:
        server, thread = start_http_server(port, addr=address, registry=registry)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--metrics-port: {address}:{port} cannot be listened on: {error}") from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
