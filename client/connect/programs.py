"""The two processes of a site: the SuperNode, and the worker beside it."""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LOOPBACK = "127.0.0.1"


def supernode(site: Path, superlink: str, port: int, *options: str) -> list[str]:
    """How a site's link to the server is started.

    Args:
        site: the site file.
        superlink: host and port of the server.
        port: of the Runtime API, on the loopback interface.
        options: more of ``fedspan site supernode``.
    """
    where = ["--host", LOOPBACK, "--port", str(port), "--node-config", f"site={json.dumps(str(site))}"]
    return [*_program("supernode.py"), "--grpc-rere", "--superlink", superlink, *where, *options]


def worker(port: int, *options: str) -> list[str]:
    """How the worker is started beside the SuperNode whose Runtime API is at ``port``."""
    return [*_program("worker.py"), "--runtime-api", f"{LOOPBACK}:{port}", *options]


def _program(file: str) -> list[str]:
    return [sys.executable, "-P", str(FOLDER / file)]
