"""A SuperLink of our own: how it is started, and the environment of a run's processes."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from common.config.federation import FederationConfig
from common.system import flower

#: For the SuperLink and the ServerApp, its child: freed tensors go back to the system instead of into glibc's arenas,
#: which would keep one for every thread that pulls replies.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}


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
        port: of its control interface, on the loopback interface.
        fleet: host and port for SuperNodes.
        tls: None for a federation on one machine.
        registry: the register of sites; only SuperNodes with a key in it may connect. None: all may.
    """

    port: int
    fleet: str
    tls: Tls | None = None
    registry: Path | None = None

    def command(self, home: Path) -> list[str]:
        """How it is started; its database is in ``home``."""
        command = [flower.program("flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--fleet-api-address", self.fleet, "--disable-runtime-dependency-installation"]
        command += ["--database", str(home / "superlink.sqlite")]
        if self.tls is None:
            command += ["--insecure"]
        else:
            command += ["--ssl-ca-certfile", str(self.tls.ca), "--ssl-certfile", str(self.tls.certificate)]
            command += ["--ssl-keyfile", str(self.tls.key)]
        return [*command, "--enable-supernode-auth"] if self.registry is not None else command

    def connection(self) -> str:
        """Flower's configuration file with this SuperLink as ``local``."""
        trust = "insecure = true" if self.tls is None else f"root-certificates = {json.dumps(str(self.tls.ca))}"
        link = f'[superlink.local]\naddress = "127.0.0.1:{self.port}"\n{trust}\n'
        return f'[superlink]\ndefault = "local"\n\n{link}'


def environment(home: Path, federation: FederationConfig, share: int = 1) -> dict[str, str]:
    """Environment of a run's processes; no hub for a local model.

    Args:
        home: Flower's folder.
        federation: the federation file.
        share: how many sites share this machine's cores.
    """
    threads = max(1, (os.cpu_count() or 1) // share)
    defaults = {"OMP_NUM_THREADS": str(threads), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
    return flower.environment(home, hub=federation.model.path is None, **defaults)
