"""``fedspan flower NAME ...``: Flower's command line on the SuperLink of a run under way."""

import argparse
import subprocess
import sys
from pathlib import Path

from common.errors import ConfigError
from common.system.command import Command


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs (default: runs)"
    )
    parser.add_argument("name", metavar="NAME", help="name of the run")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="...", help="arguments for `flwr`; the SuperLink is called local"
    )


def _run(options: argparse.Namespace) -> int:
    from common.system import flower, flower_socket
    from server.superlink.process import NOTE

    home = (options.runs / options.name / "flwr").resolve()
    if not (home / NOTE).is_file():
        raise ConfigError(f"{options.runs / options.name}: no SuperLink of this run's own is running")
    socket = (home / NOTE).read_text(encoding="utf-8").strip()
    env = {**flower.environment(home, hub=False), flower_socket.SOCKET: socket}
    command = [sys.executable, "-P", flower_socket.__file__, "flwr", *options.command]
    return subprocess.run(command, env=env, check=False).returncode  # noqa: S603 - as it was typed


FLOWER = Command(
    _arguments,
    _run,
    example="NAME list local",
    then="fedspan flower NAME log ID local, or stop ID local",
    notes="No other account of this machine reaches that SuperLink, so Flower's own `flwr` does not find the way.",
    passes_on=True,
)
