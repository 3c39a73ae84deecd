"""The two processes of a site: the SuperNode, and the worker beside it."""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def supernode(site: Path, superlink: str, socket: Path, *options: str, agreements: Path | None = None) -> list[str]:
    """How a site's link to the server is started.

    Args:
        site: the site file.
        superlink: where the server is: host and port, or ``unix:`` and the path of a socket.
        socket: of the Runtime API, in a folder that no other account may enter.
        options: more of ``fedspan site supernode``.
        agreements: file of what the site has agreed to; None: where the site file says.
    """
    config = {"site": site} | ({} if agreements is None else {"agreements": agreements})
    told = " ".join(f"{key}={json.dumps(str(path))}" for key, path in config.items())
    where = ["--socket", str(socket), "--node-config", told]
    return [*_program("supernode.py"), "--grpc-rere", "--superlink", superlink, *where, *options]


def worker(runtime_api: str, *options: str) -> list[str]:
    """How the worker is started beside a SuperNode.

    Args:
        runtime_api: of the SuperNode: ``unix:`` and the path of its socket, or host and port.
        options: more of ``fedspan site worker``.
    """
    return [*_program("worker.py"), "--runtime-api", runtime_api, *options]


def _program(file: str) -> list[str]:
    return [sys.executable, "-P", str(FOLDER / file)]
