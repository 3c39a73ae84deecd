"""``fedspan server start``: a server that stands, whether a run goes on or not, so that sites can come at any time.

It holds the address, the register of sites and the SuperLink with its database, and starts the SuperLink again when it
dies. Runs are handed to it with ``fedspan serve FEDERATION.yaml --server DIR``, one after the other or several at a
time; each has a supervisor of its own.
"""

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from common.errors import ConfigError, LaunchError
from common.system.command import Command, add_tries, start_log
from common.system.keys import may_be_in_git, refuse_git
from server.operate.serve import add_link_options, tls_of
from server.run.supervisor_lock import Interrupted

if TYPE_CHECKING:
    from server.superlink.process import OwnSuperLink

_POLL_SECONDS = 0.5
_SETTLED = 300.0  # seconds after which an earlier death does not count any more


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--home", type=Path, default=Path("server"), metavar="DIR", help="the server's folder (default: server)"
    )
    add_link_options(parser)
    may_be_in_git(parser)
    add_tries(parser, 10, "deaths of the SuperLink in a row before it gives up")


def _run(options: argparse.Namespace) -> int:
    from common.system.files import hold, keep_private, make_private
    from server.superlink.process import LOCK

    tls = tls_of(options)
    start_log("server")
    home: Path = options.home.resolve()
    refuse_git(home, options)  # in a checkout the default would be the folder of this code
    keep_private()
    try:
        make_private(home)
        lock = hold(home / LOCK)
    except OSError as error:
        raise ConfigError(f"--home {home} cannot be written ({error.strerror})") from None
    if lock is None:
        raise ConfigError(f"--home {home}: a server stands there already; end it, or give another folder")
    for signal_ in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_, _interrupt)
    from server.operate.progress import teller
    from server.superlink.process import STANDING, OwnSuperLink, sockets

    say = teller(partial(print, file=sys.stderr), home.name, logging.INFO)
    try:
        with sockets(home / "flwr") as folder:
            registry = None if options.registry is None else options.registry.resolve()
            _stand(
                home, OwnSuperLink(folder / "superlink", options.fleet_api_address, tls, registry), say, options.tries
            )
    except Interrupted as end:
        say(f"ended by {end}")
        return 0
    finally:
        (home / STANDING).unlink(missing_ok=True)
        os.close(lock)


def _stand(home: Path, superlink: "OwnSuperLink", say: Callable[[str], None], tries: int) -> NoReturn:
    """Keep the SuperLink alive, and its nodes to the register.

    Raises:
        LaunchError: it has died too often.
        ConfigError: the register is wrong when the server starts.
    """
    from common.system.files import write_atomically
    from common.system.processes import ProcessGroup
    from server.superlink import nodes
    from server.superlink.process import STANDING, environment, launch, start

    env, deaths, since = environment(home / "flwr", None), 0, time.monotonic()
    follower = nodes.following(superlink, home, say)
    with ProcessGroup(home / "logs") as group:
        started = start(superlink, group, env)  # a fault ends the server now; later it is a death to be counted
        if follower is not None:
            follower.begin()
        write_atomically(home / STANDING, json.dumps(asdict(superlink), default=str) + "\n", 0o600)
        say(f"stands at {superlink.fleet}; hand it a run with: fedspan serve FEDERATION.yaml --server {home}")
        while True:
            time.sleep(_POLL_SECONDS)
            if started.process.poll() is not None:
                deaths = 1 if time.monotonic() - since > _SETTLED else deaths + 1
                if deaths > tries:
                    raise LaunchError(f"the SuperLink died {deaths} times in a row; see {started.log}")
                say(f"the SuperLink died and is started again ({deaths} of {tries})")
                group.forget(started)  # and the servers of its runs, whose supervisors submit them again
                started, since = launch(superlink, group, env), time.monotonic()
            if follower is not None:
                follower.look()


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(signal.Signals(number).name)


START = Command(
    _arguments,
    _run,
    example="--registry sites.json --fleet-api-address 0.0.0.0:9092 --ssl-ca-certfile pki/ca.crt "
    "--ssl-certfile pki/server.pem --ssl-keyfile pki/server.key",
    then="fedspan serve FEDERATION.yaml --server server",
    notes="Sites may check, join and wait at any time. It stands until it is ended with Ctrl-C or SIGTERM; runs that\n"
    "go on then are interrupted, and go on with --resume when it stands again.",
)
