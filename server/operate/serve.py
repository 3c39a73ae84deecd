"""``fedspan serve FEDERATION.yaml``: run a federation whose sites are elsewhere (``server.operate.supervise``).

The SuperLink is started for the run and ends with it, or is one that stands (``server.operate.standing``).
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ConfigError
from common.system.command import Command, add_tries, address, number, start_log

if TYPE_CHECKING:
    from server.superlink.process import OwnSuperLink, Tls


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The arguments that every way to run a federation has."""
    parser.add_argument("federation", type=Path, metavar="FEDERATION.yaml", help="the federation file")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs (default: runs)"
    )
    parser.add_argument("--name", help="name of this run's folder (default: the federation's name)")
    parser.add_argument("--resume", action="store_true", help="resume the run of this name after its last checkpoint")
    port = number(int, 1, 65535)
    parser.add_argument("--metrics-port", type=port, metavar="PORT", help="serve Prometheus's metrics there")
    parser.add_argument("--metrics-address", default="127.0.0.1", metavar="HOST", help="where (default: 127.0.0.1)")
    add_tries(parser, 3, "restarts in a row without a finished round")


def add_link_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of everything that starts a SuperLink for sites elsewhere."""
    parser.add_argument(
        "--fleet-api-address",
        type=address,
        default="127.0.0.1:9092",
        metavar="HOST:PORT",
        help="for sites (default: %(default)s)",
    )
    parser.add_argument("--ssl-ca-certfile", type=Path, metavar="FILE", help="ca.crt of `fedspan keys ca`")
    parser.add_argument("--ssl-certfile", type=Path, metavar="FILE", help="server.pem of `fedspan keys server`")
    parser.add_argument("--ssl-keyfile", type=Path, metavar="FILE", help="server.key of `fedspan keys server`")
    parser.add_argument("--insecure", action="store_true", help="no TLS; only for a federation on one machine")
    parser.add_argument("--registry", type=Path, metavar="FILE", help="only sites in this register may connect")


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument(
        "--resume-if-begun", action="store_true", help="for service managers: start the run, resume it, or end well"
    )
    add_link_options(parser)
    parser.add_argument(
        "--signature", type=Path, action="append", default=[], metavar="FILE", help="vouches for the code; also several"
    )
    parser.add_argument(
        "--server", type=Path, metavar="DIR", help="use the standing server of this folder (`fedspan server start`)"
    )
    parser.add_argument("--superlink", metavar="NAME", help="use the running SuperLink of this name in Flower's config")


def tls_of(options: argparse.Namespace) -> "Tls | None":
    """The files of a SuperLink with TLS; None without.

    Raises:
        ConfigError: the options do not fit each other, a file does not exist, or the port is taken.
    """
    from common.system.processes import listens
    from server.superlink import registry
    from server.superlink.process import Tls

    files = (options.ssl_ca_certfile, options.ssl_certfile, options.ssl_keyfile)
    if options.insecure == all(files):
        raise ConfigError("give --ssl-ca-certfile, --ssl-certfile and --ssl-keyfile, or --insecure")
    if options.registry is not None and not all(files):
        raise ConfigError("--registry needs TLS: give --ssl-ca-certfile, --ssl-certfile and --ssl-keyfile")
    for file in filter(None, files):
        if not file.is_file():
            raise ConfigError(f"{file} does not exist")
    port = int(options.fleet_api_address.rpartition(":")[2])
    if listens(port):
        raise ConfigError(f"port {port} is in use; give another with --fleet-api-address")
    if options.registry is not None:
        registry.read(options.registry)
    return Tls(*(file.resolve() for file in files)) if all(files) else None


def _elsewhere(options: argparse.Namespace) -> "OwnSuperLink | str | None":
    """A SuperLink that runs already; None: one is to be started.

    Raises:
        ConfigError: options are given that have nothing to be said to; the server's folder names none that runs.
    """
    from server.superlink.process import standing

    if options.server is None and options.superlink is None:
        return None
    own = (options.ssl_ca_certfile, options.ssl_certfile, options.ssl_keyfile, options.registry, options.insecure)
    if any(own) or (options.server is not None and options.superlink is not None):
        raise ConfigError("--server and --superlink use a SuperLink that runs already; leave its own options out")
    return str(options.superlink) if options.server is None else standing(options.server)


def _run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from common.config.federation import FederationConfig, check_source, resolved
    from common.config.load import load
    from common.system.processes import ProcessGroup
    from server.operate.progress import teller
    from server.operate.supervise import Supervised, draw_report, follow, make_folder, run_until_done
    from server.run import from_supervisor
    from server.run.folder import check_resumable, read_lines, read_run, refuse_existing
    from server.superlink import signatures
    from server.superlink.bundle import ROOT
    from server.superlink.process import OwnSuperLink, environment, sockets
    from server.tracking.trackers import check_trackers

    running = _elsewhere(options)
    tls = tls_of(options) if running is None else None
    start_log("supervisor")
    signed = signatures.read_signatures(options.signature, ROOT)
    source = options.federation.resolve()
    federation = resolved(load(source, FederationConfig), source)
    check_source(federation, source)
    check_trackers(federation, environment=running is None)
    run_dir: Path = (options.runs / (options.name or federation.name)).resolve()
    begun = read_run(run_dir) if options.resume_if_begun else {}
    if begun.get("status") == "completed":
        if not (run_dir / "report.html").exists():  # its supervisor died before it came to that
            draw_report(run_dir, teller(partial(print, file=sys.stderr), run_dir.name))
        print(f"{run_dir}: the run has ended well, nothing is left to do")  # noqa: T201
        return 0
    resume = options.resume or bool(begun)
    check_resumable(run_dir, federation) if resume else refuse_existing(run_dir)
    make_folder(run_dir)

    def work() -> None:
        console, seen = Console(), len(read_lines(run_dir / "events.jsonl"))
        home, tell = run_dir / "flwr", teller(console.print, run_dir.name)
        env = environment(home, federation)
        from_supervisor.keep_signatures(run_dir, signed)
        with sockets(home) as folder, ProcessGroup(run_dir / "logs") as group:
            own = OwnSuperLink(folder / "superlink", options.fleet_api_address, tls, options.registry)
            superlink, stands = running or own, options.server is not None
            run = Supervised(federation, run_dir, group, superlink, env, tell, tries=options.tries, standing=stands)
            run.start_superlink()
            run.submit(resume=resume)
            follow(run, run_dir, console, seen, lambda: None)

    return run_until_done(run_dir, options, work)


SERVE = Command(
    _arguments,
    _run,
    example="FEDERATION.yaml --registry sites.json --signature bundle.sig --fleet-api-address 0.0.0.0:9092 "
    "--ssl-ca-certfile pki/ca.crt --ssl-certfile pki/server.pem --ssl-keyfile pki/server.key",
    then="fedspan status NAME --watch 5",
    notes="Started again after a crash of this machine, with --resume, it goes on after the last finished round.",
)
