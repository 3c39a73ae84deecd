"""The two processes of a site: the SuperNode, and the worker beside it."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def supernode(
    site: Path, superlink: str, socket: Path, *options: str, told: Mapping[str, Path] | None = None
) -> list[str]:
    """The command that starts a site's link to the server.

    Args:
        site: the site file.
        superlink: the server's address: host and port, or ``unix:`` and the path of a socket.
        socket: the Runtime API's socket, in a folder that no other account may enter.
        options: further options of ``fedspan site supernode``.
        told: further files that the app is told of, by their keys in the node config (``client.app``).
    """
    config = {"site": site, **(told or {})}
    written = " ".join(f"{key}={json.dumps(str(path))}" for key, path in config.items())
    where = ["--socket", str(socket), "--node-config", written]
    return [*_program("supernode.py"), "--grpc-rere", "--superlink", superlink, *where, *options]


def worker(runtime_api: str, *options: str) -> list[str]:
    """The command that starts the worker beside a SuperNode.

    Args:
        runtime_api: address of the SuperNode's Runtime API: ``unix:`` and the path of a socket, or host and port.
        options: further options of ``fedspan site worker``.
    """
    return [*_program("worker.py"), "--runtime-api", runtime_api, *options]


def _program(file: str) -> list[str]:
    return [sys.executable, "-P", str(FOLDER / file)]
