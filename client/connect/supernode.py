"""``fedspan site supernode``: ``flower-supernode`` that tries its link first (``client.superlink.link``).

``fedspan site join`` and ``fedspan run`` start this file by its path.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from common.errors import ConfigError
from common.system.command import Command, address_or_socket, number, program, set_aside, start_log

CONNECT_DEADLINE = 120.0  # seconds; Flower takes 60 to notice that an earlier SuperNode with the same key is gone


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--superlink", type=address_or_socket, metavar="HOST:PORT", help="the server's, for sites")
    link_arguments(parser, poll=3.0)
    parser.add_argument(
        "--socket",
        type=Path,
        metavar="PATH",
        help="socket of its Runtime API; in a folder that no other account may enter",
    )
    parser.add_argument("--status", type=Path, metavar="FILE", help="where to write how the link is, as JSON")
    parser.add_argument("--log", type=Path, metavar="FILE", help="for Flower's lines (default: among this program's)")
    parser.add_argument("--node-config", metavar="'site=\"FILE\"'", help="names the site file")
    parser.add_argument(
        "--isolation",
        default="subprocess",
        metavar="KIND",
        help="process: beside `fedspan site worker`; subprocess: a process for every message (default)",
    )


def link_arguments(parser: argparse.ArgumentParser, *, poll: float) -> None:
    """Add the options of a site's link to its server, for every command that starts a link.

    Args:
        parser: the command's parser.
        poll: default of the seconds between two polls for messages.
    """
    parser.add_argument("--root-certificates", type=Path, metavar="FILE", help="the CA that signed the server's")
    parser.add_argument("--insecure", action="store_true", help="no TLS; only for a federation on one machine")
    parser.add_argument("--auth-supernode-private-key", type=Path, metavar="FILE", help="this site's private key")
    parser.add_argument(
        "--poll",
        type=number(float, 0.05, 60.0, "seconds"),
        default=poll,
        metavar="SECONDS",
        help=f"between two questions for messages (default: {poll:g})",
    )
    parser.add_argument(
        "--connect-deadline",
        type=number(float, 0.0, unit="seconds"),
        default=CONNECT_DEADLINE,
        metavar="SECONDS",
        help=f"longest wait for a server that does not answer, or not yet (default: {CONNECT_DEADLINE:g})",
    )


def _run(options: argparse.Namespace) -> NoReturn:
    start_log("supernode")
    if options.socket is None:
        raise ConfigError("give --socket PATH, in a folder that no other account may enter")
    if options.superlink is None or options.insecure == (options.root_certificates is not None):
        raise ConfigError(
            "give --superlink HOST:PORT, and --root-certificates FILE (the operator's ca.crt) or --insecure"
        )
    if options.log is not None:
        set_aside(options.log)
    from client.superlink import link  # imports Flower

    link.run(options)


SUPERNODE = Command(
    _arguments,
    _run,
    example="--superlink fl.example.org:9092 --root-certificates ca.crt --auth-supernode-private-key site-a.key "
    "--isolation process --socket /run/fedspan/site-a --node-config 'site=\"/etc/fedspan/site-a.yaml\"'",
    then="fedspan site worker --runtime-api unix:/run/fedspan/site-a --site /etc/fedspan/site-a.yaml",
    notes="For Flower's own way of starting things; `fedspan site join` starts this and the worker.\n"
    "All other options of flower-supernode can be given, too.",
    passes_on=True,
)

if __name__ == "__main__":
    sys.exit(program("supernode", "the link of a site", SUPERNODE))
