"""Trials on a Ray cluster, one task each; without an address, on one of this machine that lives as long as we do."""

import contextlib
import importlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.config.federation import FederationConfig
from common.errors import ConfigError, LaunchError
from common.text import SENTENCE, one_line
from deploy.experiment.places import job
from deploy.experiment.places.cluster import NO_LIMIT, RULE, job_of, sees, wait_until_gone
from deploy.experiment.places.place import End, Trial

_REACH = 10.0  # seconds for a connection to an address
_CONNECT = 60.0  # seconds to become a part of the cluster
_PROBE = 60.0  # seconds in which a machine tells what it sees
_LOST = 600.0  # seconds without a machine that is large enough, after which the experiment ends
_LOOK = 10.0  # seconds between two looks at the machines
_SAID = 200  # bytes of Ray's word on a trial that died; it is long, with advice on Ray
_STORE = 100 * 2**20  # bytes of shared memory that Ray reserves on this machine; nothing of ours goes there
_TOKEN = "RAY_AUTH_TOKEN"  # noqa: S105 - a variable's name
#: Ray has no deadline of its own for an address where something else listens, and ends the process that waits.
_TRY = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level='error'); ray.shutdown()"


class RayJobs:
    """See ``Place``.

    Args:
        address: the cluster's: HOST:PORT, ray://HOST:PORT or "auto" (as ``ray start`` has noted it on this machine);
            None: a cluster of our own.
        slots: most trials at a time; None: what the cluster has room for.
        cpus: CPUs of each trial, and threads that PyTorch may use.
        gpus: GPUs of each trial; several trials can share one.

    Raises:
        ConfigError: Ray is not installed.
        LaunchError: the cluster does not answer, or no machine of it is large enough.
    """

    def __init__(self, address: str | None, slots: int | None, cpus: int, gpus: float) -> None:
        self.slots, self._cpus, self._gpus = slots or NO_LIMIT, cpus, gpus
        self._running: dict[Any, tuple[Trial, float]] = {}
        self._files = contextlib.ExitStack()
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        if address is None:  # Ray reads both when it is imported, and listens at all of this machine's addresses
            os.environ |= {"RAY_AUTH_MODE": "token", _TOKEN: secrets.token_hex(32)}
            # As trials without Ray: not behind all others, and not ended when others fill this machine's memory.
            os.environ.setdefault("RAY_worker_niceness", "0")
            os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError:
            needs = "`--on ray` needs a package that is not installed; run: pip install 'fedspan[ray]'"
            raise ConfigError(needs) from None
        self._join(address)
        self._ray.cloudpickle.register_pickle_by_value(job)  # where it runs, FedSpan need not be importable
        self._task = self._ray.remote(job.work)
        self._fits = self._looked = time.monotonic()
        if (lacks := self._lacks()) is not None:
            self.close()
            raise LaunchError(lacks)

    def check(self, federation: FederationConfig, summary: Path) -> None:
        """See ``Place``; asks every machine of the cluster."""
        wanted = {**sees(federation), str(summary): job.fingerprint(str(summary))}
        probe = self._ray.remote(job.unseen)
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        asked = {}
        for node in self._machines():
            there = strategy(node["NodeID"], soft=False)
            options = probe.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            asked[options.remote(wanted)] = node["NodeManagerHostname"]
        done, silent = self._ray.wait(list(asked), num_returns=len(asked), timeout=_PROBE)
        for answer in done:
            try:
                why = self._ray.get(answer)
            except self._ray.exceptions.RayError as error:
                why = f"{asked[answer]} cannot run a task: {_brief(error)}"
            if why is not None:
                raise LaunchError(f"{why}; {RULE}")
        if silent:
            raise LaunchError(f"{asked[silent[0]]} of the Ray cluster has not answered within {_PROBE:g} seconds")

    def start(self, trial: Trial) -> None:
        """See ``Place``."""
        task = self._task.options(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=0, name=trial.folder.name)
        self._running[task.remote(*job_of(trial, self._cpus))] = trial, time.monotonic()

    def ended(self, patience: float) -> Iterator[tuple[Trial, End]]:
        """See ``Place``."""
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=patience)
        for task in done:
            trial, _began = self._running.pop(task)
            try:
                yield trial, End(*self._ray.get(task))
            except self._ray.exceptions.RayError as error:  # the task's process, or its machine, is gone
                yield trial, End(None, _brief(error))
        if not done:
            self._look()

    def stop(self) -> None:
        """See ``Place``."""
        for task in self._running:
            self._ray.cancel(task, force=True)
        wait_until_gone(trial for trial, _ in self._running.values())
        self._running.clear()

    def close(self) -> None:
        """See ``Place``."""
        self.stop()
        self._ray.shutdown()
        self._files.close()

    def _join(self, address: str | None) -> None:
        own: dict[str, Any] = {}
        if address is None:
            folder = self._files.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
            own = {"_temp_dir": folder, "include_dashboard": False, "object_store_memory": _STORE}
            own |= {"num_cpus": len(os.sched_getaffinity(0))}
        else:
            _reach(address)
        try:
            self._ray.init(address or "local", log_to_driver=False, logging_level="error", **own)
        except Exception as error:  # noqa: BLE001 - Ray has no error of its own for this
            self._files.close()
            raise LaunchError(f"Ray at {address or 'this machine'}: {one_line(str(error), SENTENCE)}") from None

    def _machines(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _lacks(self) -> str | None:
        """Why no machine of the cluster can run a trial; None: one can."""
        have = [(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)) for node in self._machines()]
        if any(cpus >= self._cpus and gpus >= self._gpus for cpus, gpus in have):
            return None
        found = ", ".join(f"{cpus:g} CPUs and {gpus:g} GPUs" for cpus, gpus in sorted(set(have))) or "none"
        needs = f"{self._cpus} CPUs and {self._gpus:g} GPUs (--cpus-per-trial, --gpus-per-trial)"
        return f"a trial needs {needs}, and no machine of the Ray cluster has as many; its machines: {found}"

    def _look(self) -> None:
        """Raise a LaunchError when trials have waited long for a machine that is large enough."""
        now = time.monotonic()
        if now < self._looked + _LOOK:
            return
        self._looked, lacks = now, self._lacks()
        if lacks is None:
            self._fits = now
        elif now > self._fits + _LOST:
            raise LaunchError(f"{lacks}; since {_LOST:g} seconds")


def _reach(address: str) -> None:
    """Raise a LaunchError when no Ray cluster answers at an address within the deadline."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), _REACH).close()
        except OSError as error:
            raise LaunchError(f"no Ray cluster at --address {address}: {error.strerror or error}") from None
    elif address != "auto":
        raise ConfigError(f"--address {address!r}; allowed: HOST:PORT, ray://HOST:PORT, auto")
    try:
        tried = subprocess.run(  # noqa: S603
            [sys.executable, "-c", _TRY, address], capture_output=True, text=True, timeout=_CONNECT, check=False
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(f"no Ray cluster answers at --address {address} within {_CONNECT:g} seconds") from None
    if tried.returncode:
        said = [line for line in tried.stderr.splitlines() if line.strip()]
        raise LaunchError(f"no Ray cluster at --address {address}: {one_line(''.join(said[-1:]), SENTENCE)}")


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(str(error), _SAID)}"
