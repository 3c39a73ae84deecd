"""Flower's programs on a Unix socket in place of a port of the loopback interface.

    FEDSPAN_SOCKET=PATH python -P common/system/flower_socket.py PROGRAM [its options]

Every account of a machine can call a port of the loopback interface, or listen on it first. A socket lies in a folder
that only one account may enter, so the kernel lets no other account call Flower's Control API and Runtime APIs, or
answer in their place (decision 025). No secret can leak: the token of a task, which Flower passes on a command line,
opens nothing by itself.

Flower 1.39 has no option for this. So this file replaces three modules that Flower imports: `uvicorn` where Flower
serves, `httpx` where it calls, `subprocess` where it starts further programs, which then run through this file, too.

This file imports nothing of FedSpan: it runs flwr-serverapp and flwr-clientapp, which load the code of a bundle.
"""

import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import httpx

SOCKET = "FEDSPAN_SOCKET"  # environment variable: the socket of the HTTP API that a program serves, or calls
_STARTS = {  # where Flower starts further programs
    "flower-superlink": "flwr.superlink.cli.flower_superlink",
    "flower-supernode": "flwr.supernode.start_client_internal",
    "flower-superexec": "flwr.supercore.superexec.executor.subprocess_executor",
}
_SERVES = {
    "flower-superlink": "flwr.superlink.cli.flower_superlink",
    "flower-supernode": "flwr.supernode.cli.flower_supernode",
}


class _Module:
    """A module as one file of Flower's sees it."""

    def __init__(self, module: Any) -> None:  # noqa: ANN401 - a module
        self._module = module

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._module, name)


class _Calls(_Module):
    """The httpx module: clients call the socket, whatever host and port their address names."""

    def Client(self, *, verify: Any, timeout: float, follow_redirects: bool) -> httpx.Client:  # noqa: N802, ANN401
        """As httpx's. A client with a transport of its own heeds no proxy."""
        transport = httpx.HTTPTransport(verify=verify, uds=os.environ[SOCKET])
        return httpx.Client(transport=transport, timeout=timeout, follow_redirects=follow_redirects)


class _Serves(_Module):
    """The uvicorn module: servers listen on the socket."""

    def run(self, *, host: str, port: int, **options: Any) -> None:  # noqa: ANN401 - as uvicorn's
        """As uvicorn's."""
        self._module.run(uds=os.environ[SOCKET], **options)

    def Config(self, *, host: str, port: int, **options: Any) -> object:  # noqa: N802, ANN401 - as uvicorn's
        """As uvicorn's."""
        return self._module.Config(uds=os.environ[SOCKET], **options)


class _Starts(_Module):
    """The subprocess module: Flower's programs come through this file."""

    def Popen(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:  # noqa: N802, ANN401
        """As Python's."""
        through = [sys.executable, "-P", str(Path(__file__).resolve()), *command]
        return subprocess.Popen(through, **options)  # noqa: S603 - Flower's own


def serve(program: str, socket: Path) -> None:
    """Let ``flower-superlink`` or ``flower-supernode``, which this process is about to run, serve on a socket."""
    os.environ[SOCKET] = str(socket)
    _exchange(_SERVES[program], "uvicorn", _Serves)
    _exchange(_STARTS[program], "subprocess", _Starts)


def call(client: Any, socket: Path, *, verify: Any = False, timeout: float = 30.0) -> None:  # noqa: ANN401
    """Let a client of Flower's, which was made for an address, call a socket."""
    client.close()
    client._client = httpx.Client(transport=httpx.HTTPTransport(verify=verify, uds=str(socket)), timeout=timeout)


def _exchange(place: str, name: str, stand_in: type[_Module]) -> None:
    module = import_module(place)
    setattr(module, name, stand_in(getattr(module, name)))


def main() -> None:
    """Run one of Flower's programs, with its own command line."""
    del sys.argv[0]
    program = sys.argv[0]
    (entry,) = (e for e in entry_points(group="console_scripts", name=program) if e.value.startswith("flwr."))
    _exchange("flwr.supercore.protobuf.client", "httpx", _Calls)
    if program in _STARTS:
        _exchange(_STARTS[program], "subprocess", _Starts)
    entry.load()()


if __name__ == "__main__":
    main()
