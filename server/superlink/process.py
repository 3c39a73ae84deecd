"""A SuperLink started here: its command line, its files, and the environment of a run's processes."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.config.federation import FederationConfig
from common.errors import ConfigError, LaunchError
from common.system import flower
from common.system.files import is_held
from common.system.processes import ProcessGroup, Started, last_lines, listens, socket_folder

DATABASE = "superlink.sqlite"
NOTE = "socket"  # file in Flower's folder that holds the path of the SuperLink's socket
#: For the SuperLink and the ServerApp, its child (decision 008): glibc would keep freed tensors in one arena per thread
#: that pulls replies, and memory would grow with the number of clients. With these settings it returns them.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
STANDING, LOCK = "server.json", ".server"  # the record of a standing server; the lock that it holds while it lives
START_SECONDS = 90.0  # longest wait for a new SuperLink to listen


@dataclass(frozen=True)
class Tls:
    """Files of a SuperLink that speaks TLS; its certificate must be good for 127.0.0.1 as well."""

    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class OwnSuperLink:
    """A SuperLink that is started here, and started again when it dies.

    Attributes:
        socket: path of the socket for Control API and Runtime API, in a folder that no other account may enter.
        fleet: address for SuperNodes: host and port, or ``unix:`` and the path of a socket.
        tls: files for TLS; None for a federation on one machine.
        registry: the register of sites; only SuperNodes with a key in it may connect. None: all may.
    """

    socket: Path
    fleet: str
    tls: Tls | None = None
    registry: Path | None = None

    def command(self, home: Path) -> list[str]:
        """The command that starts the SuperLink; its database is in ``home``."""
        program = str(Path(__file__).resolve().with_name("program.py"))
        command = [sys.executable, "-P", program, "--socket", str(self.socket)]
        command += ["--fleet-api-address", self.fleet, "--disable-runtime-dependency-installation"]
        command += ["--database", str(home / DATABASE)]
        if self.tls is None:
            command += ["--insecure"]
        else:
            command += ["--ssl-ca-certfile", str(self.tls.ca), "--ssl-certfile", str(self.tls.certificate)]
            command += ["--ssl-keyfile", str(self.tls.key)]
        return [*command, "--enable-supernode-auth"] if self.registry is not None else command

    def listens(self) -> bool:
        """Whether callers and SuperNodes can connect."""
        kind, _, where = self.fleet.rpartition(":")
        return listens(self.socket) and listens(Path(where) if kind == "unix" else int(where))

    def note(self, home: Path) -> None:
        """Write the socket's path into Flower's folder, where `fedspan flower` reads it."""
        trust = "insecure = true" if self.tls is None else f"root-certificates = {json.dumps(str(self.tls.ca))}"
        link = f'[superlink.local]\naddress = "127.0.0.1:1"\n{trust}\n'
        (home / "config.toml").write_text(f'[superlink]\ndefault = "local"\n\n{link}', encoding="utf-8")
        (home / NOTE).write_text(f"{self.socket}\n", encoding="utf-8")


def standing(folder: Path) -> OwnSuperLink:
    """The SuperLink of the server that stands in a folder.

    Raises:
        ConfigError: none does.
    """
    folder = folder.resolve()
    if not is_held(folder / LOCK):
        raise ConfigError(f"--server {folder}: no server stands there; fedspan server start --home {folder} ...")
    try:
        told = json.loads((folder / STANDING).read_bytes())
        tls = None if told["tls"] is None else Tls(*(Path(told["tls"][key]) for key in ("ca", "certificate", "key")))
        registry = None if told["registry"] is None else Path(told["registry"])
        return OwnSuperLink(Path(told["socket"]), told["fleet"], tls, registry)
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"--server {folder}: its server is only just starting; try again in a moment") from None


def start(superlink: OwnSuperLink, group: ProcessGroup, env: Mapping[str, str]) -> Started:
    """Start a SuperLink and wait until it listens.

    Args:
        superlink: to start.
        group: where.
        env: its environment; FLWR_HOME is the folder of its database.

    Raises:
        LaunchError: it ended, as it does when its port is taken, or did not listen in time.
    """
    started = launch(superlink, group, env)
    wait_for(superlink, started)
    return started


def launch(superlink: OwnSuperLink, group: ProcessGroup, env: Mapping[str, str]) -> Started:
    """Start a SuperLink without a look at what becomes of it; see ``start``."""
    home = Path(env["FLWR_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    superlink.note(home)
    return group.start("superlink", superlink.command(home), {**MALLOC, **env})


def wait_for(superlink: OwnSuperLink, started: Started | None = None) -> None:
    """Wait until a SuperLink listens.

    Args:
        superlink: the SuperLink that must listen.
        started: its process; None: it is looked after elsewhere.

    Raises:
        LaunchError: it ended, or did not listen in time.
    """
    deadline = time.monotonic() + START_SECONDS
    while not superlink.listens():
        if started is not None and started.process.poll() is not None:
            raise LaunchError(f"the SuperLink did not start; {started.log} ends: {last_lines(started.log)}")
        if time.monotonic() > deadline:
            log = "" if started is None else f"; see {started.log}"
            raise LaunchError(f"the SuperLink did not listen within {START_SECONDS:g} seconds{log}")
        time.sleep(0.1)


@contextlib.contextmanager
def sockets(home: Path) -> Iterator[Path]:
    """A folder for the sockets of a SuperLink with its files in ``home``; it must have ended before this does.

    Raises:
        LaunchError: the folder's path would be too long.
    """
    with socket_folder() as folder:
        try:
            yield folder
        finally:
            (home / NOTE).unlink(missing_ok=True)


def environment(home: Path, federation: FederationConfig | None, share: int = 1) -> dict[str, str]:
    """Environment of a run's processes; no hub for a local model.

    Args:
        home: Flower's folder.
        federation: the federation file; None: any.
        share: number of sites that share this machine's cores.
    """
    threads = max(1, (os.cpu_count() or 1) // share)
    defaults = {"OMP_NUM_THREADS": str(threads), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
    return flower.environment(home, hub=federation is None or federation.model.path is None, **defaults)
