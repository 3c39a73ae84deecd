"""Take part in federations: ``fedspan site join SITE.yaml --superlink HOST:PORT``.

Starts the link to the server (``supernode.py``) and the worker that keeps model and rows in memory (``worker.py``),
restarts either when it dies, and ends both on SIGTERM and Ctrl-C. All connections are outgoing; the SuperNode's Runtime
API listens on a socket that no other account of this machine can reach (decision 025).
"""

import argparse
import json
import logging
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from client.connect.programs import supernode, worker
from client.connect.supernode import link_arguments
from client.privacy.agreement import agreements_of, read_agreements
from client.privacy.ledger import owner
from client.superlink.dial import proxy_for
from client.superlink.probe import split
from client.watch.link_state import LOST, REFUSED, UP, WAITING
from client.watch.status import LINK, WHOLE, WORK, WORKER, home_of
from common.config.load import load
from common.config.section import resolve
from common.config.site import SiteConfig
from common.errors import ConfigError, DataError, LaunchError, LedgerError
from common.system.command import FAILED, WRONG, Command, add_tries, address, number, start_log
from common.system.files import keep_private, make_private, read_object, write_atomically
from common.system.flower import environment
from common.system.processes import ProcessGroup, Started, socket_folder

POLL_SECONDS = 0.5
_LONGEST_PAUSE = 30.0  # seconds before a dead process is restarted; the first pause is one second
_SETTLED = 300.0  # seconds after which earlier deaths no longer count
_MOST_LOG = 10_000_000  # bytes of Flower's lines; as many earlier ones are kept beside them
log = logging.getLogger("join")


class Ended(Exception):  # noqa: N818 - not an error
    """The machine, or the user, asked to end."""


@dataclass
class Service:
    """One of the two processes, restarted when it dies.

    Attributes:
        started: the process; None while it waits for its restart.
        deaths: number of deaths in a row.
        since: monotonic time of the last start.
        resume: monotonic time of the next restart.
        proven: whether the process has ever worked; if not, a refusal by the server is final.
        log: file of what Flower and other libraries print.
    """

    name: str
    command: list[str]
    log: Path
    started: Started | None = None
    deaths: int = 0
    since: float = 0.0
    resume: float = 0.0
    proven: bool = False

    def look_after(self, group: ProcessGroup, env: dict[str, str], tries: int) -> None:
        """Start the process, or restart it if it has died.

        Raises:
            LaunchError: the process has died too often.
        """
        now = time.monotonic()
        if self.started is None:
            if now >= self.resume:
                self.started, self.since = group.start(self.name, self.command, env), now
            return
        code = self.started.process.poll()
        if code is None:
            return
        group.forget(self.started)
        self.started = None
        self.deaths = 1 if now - self.since > _SETTLED else self.deaths + 1
        if code == WRONG or (code == FAILED and not self.proven) or self.deaths > tries:
            times = "" if self.deaths == 1 else f" {self.deaths} times in a row"
            raise LaunchError(
                f"{self.name} ended{times} with exit code {code}; its last lines above, or those of {self.log}, say why"
            )
        pause = min(2.0 ** (self.deaths - 1), _LONGEST_PAUSE)
        self.resume = now + pause
        again = f"started again in {pause:g} s ({self.deaths} of {tries})"
        log.warning("%s ended with exit code %s; %s", self.name, code, again)


@dataclass(frozen=True)
class Member:
    """A site that takes part; all files are read and checked.

    Attributes:
        superlink: host and port of the server.
        home: folder of working files: what the two processes tell, and ``status.json``, which has all of it.
        status: further file for the same; None: no further file.
    """

    site: SiteConfig
    link: Service
    worker: Service
    superlink: str
    home: Path
    status: Path | None

    def work(self, env: dict[str, str], tries: int) -> NoReturn:
        """Keep both processes alive.

        Raises:
            LaunchError: a process has died too often.
        """
        with ProcessGroup(None) as group:
            while True:
                for service in (self.link, self.worker):
                    service.look_after(group, env, tries)
                state = self.state()
                self.link.proven |= state["link"] == "up"
                self.worker.proven |= "state" in state["worker"]
                trim(self.link.log)
                for file in filter(None, (self.home / WHOLE, self.status)):
                    _write(file, state)
                time.sleep(POLL_SECONDS)

    def state(self) -> dict[str, Any]:
        """The status file's content (``client.watch.status``)."""
        link, worker = read_object(self.home / LINK), read_object(self.home / WORKER)
        up = link.get("state") == UP and _connected(self.link.started, self.superlink)
        down = link.get("state") if link.get("state") in (REFUSED, WAITING) else LOST
        return {
            "time": time.time(),
            "site": self.site.name,
            "device": self.site.device,
            "superlink": self.superlink,
            "link": UP if up else down,
            "link_since": link.get("since"),
            "link_reason": link.get("reason"),
            "link_deaths": self.link.deaths,
            "worker": worker if self.worker.started is not None else {"state": "being started again"},
            "worker_deaths": self.worker.deaths,
            "work": read_object(self.home / WORK),
        }


def trim(file: Path, most: int = _MOST_LOG) -> None:
    """Empty a log that has grown too long, once its content is in ``<file>.1``; its writers append, and go on."""
    try:
        if file.exists() and file.stat().st_size > most:
            shutil.copyfile(file, file.with_name(f"{file.name}.1"))
            os.truncate(file, 0)
    except OSError as error:  # e.g. a full disk: the site works on
        log.warning("%s cannot be shortened (%s)", file, error.strerror)


def _connected(link: Started | None, superlink: str) -> bool:
    """Whether the link has an open connection to the server's port, or its proxy's."""
    host, port = split(superlink)
    if (proxy := proxy_for(host)) is not None:
        port = proxy.port
    try:
        connections = psutil.Process(link.process.pid).net_connections("tcp") if link is not None else []
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    return any(c.status == psutil.CONN_ESTABLISHED and c.raddr and c.raddr.port == port for c in connections)


def _write(file: Path, state: dict[str, Any]) -> None:
    try:
        write_atomically(file, json.dumps(state) + "\n", durable=False)
    except OSError as error:  # e.g. a full disk: the site works on; readers see by the time that the file is old
        log.warning("the status file cannot be written (%s)", error.strerror)


def plan(options: argparse.Namespace, socket: Path) -> tuple[Member, dict[str, str]]:
    """Read and check every file before anything is started; returns the site and its processes' environment.

    Args:
        options: the command line.
        socket: the socket that the two processes share, in a folder that no other account may enter.

    Raises:
        FedSpanError: names the file and what is wrong with it.
    """
    file: Path = options.site.resolve()
    site = load(file, SiteConfig)
    if not resolve(site.data.path, file).exists():
        raise DataError(f"{file}: shard {resolve(site.data.path, file)} does not exist")
    if (begun_by := owner(ledger := site.ledger_file(file))) not in (None, site.name):
        raise LedgerError(f"{file}: `ledger` {ledger} is that of {begun_by}; each site needs its own")
    if options.agree is not None:
        from client.connect.agree import agree, proposed

        log.info("%s", agree(file, proposed(file, options.agree)))
    agreements = read_agreements(agreements_of(site, file))
    if not agreements:
        raise ConfigError(
            f"{file}: {site.name} has agreed to no federation; fedspan site agree FEDERATION.yaml --site {file.name}"
        )
    for federation, agreed in agreements.items():
        site.check_model_folder(file, federation)
        if agreed.federation.secure_aggregation is not None and options.auth_supernode_private_key is None:
            raise ConfigError(
                f"{file}: `secure_aggregation` of {federation} signs with the site's key; give "
                "--auth-supernode-private-key FILE"
            )
    home = (options.home or home_of(site, file)).resolve()
    try:
        make_private(home)
    except OSError as error:
        raise ConfigError(
            f"--home {home} cannot be made ({error.strerror}); give a folder that may be written"
        ) from None
    for name in (LINK, WORKER):  # they tell about an earlier time
        (home / name).unlink(missing_ok=True)
    flowers = home / "flower.log"
    link = ["--poll", f"{options.poll:g}", "--connect-deadline", f"{options.connect_deadline:g}"]
    link += ["--isolation", "process", "--status", str(home / LINK), "--log", str(flowers)]
    link += ["--insecure"] if options.insecure else ["--root-certificates", str(options.root_certificates)]
    told = {}
    if options.auth_supernode_private_key is not None:
        told["identity"] = options.auth_supernode_private_key.resolve()  # which signs a masked sum's keys
        link += ["--auth-supernode-private-key", str(options.auth_supernode_private_key)]
    work = ["--site", str(file), "--idle", f"{options.idle:g}", "--status", str(home / WORKER)]
    work += ["--progress", str(home / WORK), "--log", str(flowers)]
    member = Member(
        site,
        Service("supernode", supernode(file, options.superlink, socket, *link, told=told), flowers),
        Service("worker", worker(f"unix:{socket}", *work), flowers),
        options.superlink,
        home,
        options.status,
    )
    models = [site.model] if site.model is not None else [one.model for one in agreements.values()]
    return member, environment(home, hub=any(model.hub is not None for model in models))


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("site", type=Path, metavar="SITE.yaml", help="the site file")
    parser.add_argument(
        "--superlink", type=address, required=True, metavar="HOST:PORT", help="the server's address for sites"
    )
    link_arguments(parser, poll=1.0)
    seconds = number(float, 0.0, unit="seconds")
    parser.add_argument(
        "--agree", type=Path, metavar="FEDERATION.yaml", help="agree to this federation first, without being asked"
    )
    parser.add_argument("--home", type=Path, metavar="DIR", help="working files (default: .NAME beside SITE.yaml)")
    parser.add_argument("--status", type=Path, metavar="FILE", help="where to write the state as JSON, twice a second")
    parser.add_argument(
        "--idle", type=seconds, default=900.0, metavar="SECONDS", help="until the device is released (default: 900)"
    )
    add_tries(parser, 10, "deaths in a row before it gives up")


def _run(options: argparse.Namespace) -> int:
    if options.insecure == (options.root_certificates is not None):
        raise ConfigError("give --root-certificates, or --insecure")
    for file in filter(None, (options.root_certificates, options.auth_supernode_private_key)):
        if not file.is_file():
            raise ConfigError(f"{file} does not exist")
    if options.status is not None and not options.status.parent.is_dir():
        raise ConfigError(f"--status: folder {options.status.parent} does not exist")
    start_log("join")
    keep_private()
    with socket_folder() as folder:
        member, env = plan(options, folder / "runtime")
        for signal_ in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signal_, _end)
        try:
            member.work(env, options.tries)
        except Ended as end:
            log.info("ended by %s", end)
            return 0


def _end(signal_: int, frame: FrameType | None) -> NoReturn:
    raise Ended(signal.Signals(signal_).name)


JOIN = Command(
    _arguments,
    _run,
    example="site-a.yaml --superlink fl.example.org:9092 --root-certificates ca.crt "
    "--auth-supernode-private-key site-a.key",
    then="fedspan ledger summary FILE, when a run has ended",
    notes="It takes part in one run after the other, until it is ended with Ctrl-C or SIGTERM.",
)
