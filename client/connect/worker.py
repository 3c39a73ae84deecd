"""``fedspan site worker``: a site's long-lived worker (``client.connect.worker_supervisor``).

``fedspan site join`` and ``fedspan run`` start this file by its path.
"""

import argparse
import sys
from pathlib import Path

from common.errors import ConfigError
from common.system.command import Command, address_or_socket, number, program, start_log
from common.system.files import keep_private


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runtime-api",
        type=address_or_socket,
        required=True,
        metavar="unix:PATH",
        help="the SuperNode's; or HOST:PORT of Flower's own, which every account of this machine can reach",
    )
    parser.add_argument("--site", type=Path, metavar="SITE.yaml", help="the site file; says whose code may run here")
    parser.add_argument(
        "--idle",
        type=number(float, 0.0, unit="seconds"),
        default=900.0,
        metavar="SECONDS",
        help="idle time after which the device is released (default: 900)",
    )
    parser.add_argument(
        "--poll",
        type=number(float, 0.01, unit="seconds"),
        default=0.3,
        metavar="SECONDS",
        help="between two questions for work (default: 0.3)",
    )
    parser.add_argument("--status", type=Path, metavar="FILE", help="where to write the worker's status, as JSON")
    parser.add_argument("--progress", type=Path, metavar="FILE", help="where to write what the site does, as JSON")
    parser.add_argument("--log", type=Path, metavar="FILE", help="for lines of libraries (default: among its own)")


def _run(options: argparse.Namespace) -> None:
    if options.status is not None and not options.status.parent.is_dir():
        raise ConfigError(f"--status: folder {options.status.parent} does not exist")
    start_log("worker")
    keep_private()
    from client.connect.worker_process import RuntimeApi
    from client.connect.worker_supervisor import Options, run  # imports Flower

    api = RuntimeApi(options.runtime_api)
    run(Options(api, options.idle, options.poll, options.status, options.site, options.progress, options.log))


WORKER = Command(
    _arguments,
    _run,
    example="--runtime-api unix:/run/fedspan/site-a --site /etc/fedspan/site-a.yaml",
    then="fedspan ledger summary FILE, when a run has ended",
    notes="For Flower's own way of starting things, beside `fedspan site supernode --isolation process`;\n"
    "`fedspan site join` starts both.",
)

if __name__ == "__main__":
    sys.exit(program("worker", "the worker of a site", WORKER))
