"""Runs a federation on this machine: ``fedspan run FEDERATION.yaml``.

Starts a SuperLink, one SuperNode for every site file and the run, as separate processes that talk gRPC, just as on many
machines, but over Unix sockets that no other account of this one can reach. Stops all of them at the end, on Ctrl-C and
on failure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from client.connect.programs import supernode, worker
from client.privacy.agreement import agree_for_own_sites
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.errors import ConfigError, LaunchError
from common.system.processes import ProcessGroup, Started, last_lines
from server.operate.progress import teller
from server.operate.site_files import check_sites
from server.operate.supervise import Supervised, follow
from server.run.folder import check_resumable, read_lines, refuse_existing
from server.superlink.process import OwnSuperLink, environment, sockets
from server.tracking.trackers import check_trackers

_POLL = ("--poll", "0.5")  # seconds between a SuperNode's questions for messages


@dataclass(frozen=True)
class Plan:
    """The processes to start; all files are read and checked."""

    federation: FederationConfig
    sites: dict[str, Path]
    run_dir: Path
    resume: bool = False
    events: int = 0  # lines of events.jsonl from before


def make_plan(source: Path, runs: Path, name: str | None, *, resume: bool = False) -> Plan:
    """Read and check every file before anything is started.

    Raises:
        FedSpanError: names the file and what is wrong with it.
    """
    source = source.resolve()
    federation = resolved(load(source, FederationConfig), source)
    if federation.local is None:
        raise ConfigError(f"{source}: missing key `local.sites`; the launcher needs the site files")
    run_dir = (runs / (name or federation.name)).resolve()
    if resume:
        check_resumable(run_dir, federation)
    else:
        refuse_existing(run_dir)
    check_trackers(federation)
    sites = check_sites(map(Path, federation.local.sites), federation, source)
    events = len(read_lines(run_dir / "events.jsonl"))
    return Plan(federation, sites, run_dir, resume=resume, events=events)


def run(plan: Plan, console: Console, tries: int) -> None:
    """Start everything, follow the run to its end, stop everything.

    Raises:
        FedSpanError: with the reason of the site or the server that failed.
    """
    logs, tell = plan.run_dir / "logs", teller(console.print, plan.run_dir.name)
    local = plan.federation.local
    assert local is not None  # noqa: S101 - make_plan has checked it
    env = environment(plan.run_dir / "flwr", plan.federation, share=len(plan.sites))
    with sockets(plan.run_dir / "flwr") as folder, ProcessGroup(logs) as group:
        superlink = OwnSuperLink(folder / "superlink", f"unix:{folder / 'fleet'}")
        server = Supervised(plan.federation, plan.run_dir, group, superlink, env, tell, tries=tries)
        server.start_superlink()
        agreements = folder / "agreements.json"
        keys = agree_for_own_sites(agreements, plan.federation, plan.sites)
        sites = []
        for number, (name, file) in enumerate(plan.sites.items()):
            socket, isolation = folder / f"site-{number}", "process" if local.warm else "subprocess"
            options = ("--insecure", "--isolation", isolation, *_POLL)
            told = {"agreements": agreements} | ({"identity": keys[name]} if name in keys else {})
            link = supernode(file, superlink.fleet, socket, *options, told=told)
            sites.append(group.start(name, link, env))
            if local.warm:
                work = worker(f"unix:{socket}", "--site", str(file), "--status", str(logs / f"{name}-worker.json"))
                sites.append(group.start(f"{name}-worker", work, env))
        server.submit(resume=plan.resume)
        follow(server, plan.run_dir, console, plan.events, _Reviver(group, sites, tell, tries))


class _Reviver:
    """Restarts a site's processes when they die, like the service manager of a real site."""

    def __init__(self, group: ProcessGroup, sites: list[Started], tell: Callable[[str], None], tries: int) -> None:
        self._group, self._sites, self._tell, self._tries = group, sites, tell, tries
        self._deaths: dict[str, int] = {}

    def __call__(self) -> None:
        """Restart the processes that have died since the last call.

        Raises:
            LaunchError: a process has died too often.
        """
        for number, site in enumerate(self._sites):
            if site.process.poll() is None:
                continue
            count = self._deaths[site.name] = self._deaths.get(site.name, 0) + 1
            if count > self._tries:
                raise LaunchError(f"{site.name} ended {count} times by itself; {site.log} ends: {last_lines(site.log)}")
            self._tell(f"{site.name} ended by itself and is started again ({count} of {self._tries})")
            self._group.forget(site)
            self._sites[number] = self._group.start(site.name, site.command, site.env)
