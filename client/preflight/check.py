"""Whether a site is ready to join: ``fedspan site check SITE.yaml [--federation FEDERATION.yaml] ...``.

One line per check: ok, warning, FAIL or skipped, the finding, and the remedy. No line holds content of the shard. A
check is a function from a ``CheckContext`` to a ``Finding``; a ``FedSpanError`` from a check is a failure. To add a
check, write the function and list it in ``all_checks`` (decision 015).
"""

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from client.preflight.finding import Finding, Skip
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.site import SiteConfig
from common.errors import ConfigError, FedSpanError
from common.system.command import Command, address, number

if TYPE_CHECKING:
    from client.preflight.context import CheckContext


class Check(NamedTuple):
    """A check: its function, and the remedy for errors that bring no remedy of their own."""

    look: "Callable[[CheckContext], Finding]"
    mend: str


def all_checks() -> dict[str, Check]:
    """All checks in order; imported in the function, because they import PyTorch."""
    from client.preflight import (
        certificates,
        link,
        machine,
        model,
        shard,
        traffic,
        trust_and_ledger as promises,
    )

    in_data = "correct the shard, or `data` in the site file"
    in_model = "fetch the model folder again, or correct `model` in the site file; the operator says which model it is"
    at_link = "ask the operator for address and certificate, and your network for a way out to that port"
    return {
        "device": Check(machine.device, "correct `device`, `devices` or `precision` in the site file, or the driver"),
        "disk": Check(machine.disk, ""),
        "shard": Check(shard.rows, in_data),
        "duplicates": Check(shard.duplicates, in_data),
        "held out": Check(shard.held_out, "lower `data.held_out` in the site file"),
        "model files": Check(model.files, in_model),
        "model family": Check(model.family, in_model),
        "digests": Check(model.digests, in_model),
        "selection": Check(model.selection, "ask the operator to correct `strategy`, or correct `max_rank` here"),
        "row lengths": Check(shard.lengths, in_data),
        "memory": Check(machine.training_memory, "correct the federation file with the operator"),
        "kept model": Check(model.kept, "correct `keep` in the site file"),
        "trust": Check(promises.trust, "correct `trust` in the site file"),
        "agreement": Check(promises.agreement, "correct `agreements` in the site file, or agree anew"),
        "ledger": Check(promises.ledger, "find out who changed it; the site sends nothing until it is whole"),
        "masked sums": Check(promises.peers, "give the site's private key"),
        "noise": Check(promises.noise, "correct the federation file with the operator"),
        "limits": Check(promises.limits, "change `policy` or `privacy` in the site file, or do not take part"),
        "root certificate": Check(certificates.root, ""),
        "private key": Check(certificates.private_key, ""),
        "server": Check(link.server, at_link),
        "clock": Check(link.clock, at_link),
        "register": Check(link.registered, at_link),
        "upload": Check(link.upload, at_link),
        "traffic": Check(traffic.traffic, ""),
        "training": Check(traffic.training, "a longer --deadline, less memory for others, or a lower `max_batch_size`"),
    }


def findings(checks: dict[str, Check], subject: "CheckContext") -> Iterator[tuple[str, Finding]]:
    """Run all checks. A failure is reported once; checks that need the failed part are skipped."""
    told: set[str] = set()
    for name, check in checks.items():
        try:
            finding = check.look(subject)
        except Skip as reason:
            finding = Finding("skipped", str(reason))
        except FedSpanError as error:
            again = str(error) in told
            finding = Finding("skipped", "see above") if again else Finding("FAIL", str(error), check.mend)
            told.add(str(error))
        except Exception as error:  # noqa: BLE001 - its text might quote a row
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
            finding = Finding("FAIL", where, f"{check.mend}; if that does not help, report this as a fault of FedSpan")
        yield name, Finding(finding.level, _printable(finding.found), _printable(finding.mend))


def _printable(text: str) -> str:
    """The text without control characters: names in a certificate come from others and could command the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


_COLOURS = {"ok": "green", "warning": "yellow", "FAIL": "bold red", "skipped": "dim"}


def _show(console: Console, name: str, finding: Finding) -> None:
    mend = f" -> {finding.mend}" if finding.mend else ""
    if not console.is_terminal:
        console.out(f"{finding.level:<8} {name:<16} {finding.found}{mend}", highlight=False)
        return
    line = Table.grid(padding=(0, 1))
    for width in (7, 16, None):
        line.add_column(width=width)
    text = Text(finding.found).append(mend, style="bold")
    line.add_row(Text(finding.level, style=_COLOURS[finding.level]), Text(name), text)
    console.print(line)


def check(subject: "CheckContext", *, as_json: bool) -> int:
    """Run all checks, print the findings, and return the exit code."""
    console = Console()
    found: list[tuple[str, Finding]] = []
    checks = all_checks()
    if as_json:
        found = list(findings(checks, subject))
    else:
        for name, finding in findings(checks, subject):
            _show(console, name, finding)
            found.append((name, finding))
    count = {level: sum(finding.level == level for _, finding in found) for level in ("FAIL", "warning")}
    if as_json:
        lines = [{"check": name, "level": f.level, "found": f.found, "mend": f.mend} for name, f in found]
        sys.stdout.write(json.dumps({"site": subject.site.name, "ready": not count["FAIL"], "checks": lines}) + "\n")
    else:
        ready = "not ready to join" if count["FAIL"] else "ready to join"
        console.out(
            f"{subject.site.name} is {ready}: {count['FAIL']} failed, {count['warning']} warning(s)", highlight=False
        )
    return 1 if count["FAIL"] else 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("site", type=Path, metavar="SITE.yaml", help="the site file")
    parser.add_argument("--federation", type=Path, metavar="FILE", help="the operator's federation file")
    parser.add_argument("--superlink", type=address, metavar="HOST:PORT", help="the server's address")
    parser.add_argument("--root-certificates", type=Path, metavar="FILE", help="who vouches for the server (ca.crt)")
    parser.add_argument("--auth-supernode-private-key", type=Path, metavar="FILE", help="the site's private key")
    seconds, mbit = number(float, 0.1, 86400.0, "seconds"), number(float, 0.001, unit="Mbit/s")
    parser.add_argument(
        "--deadline", type=seconds, default=60.0, metavar="SECONDS", help="longest wait (default: %(default)s)"
    )
    parser.add_argument("--mbit", type=mbit, metavar="MBIT/S", help="speed of the line, instead of the measured one")
    parser.add_argument("--measure", action="store_true", help="make some training steps")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")


def _run(options: argparse.Namespace) -> int:
    if options.superlink is not None and options.root_certificates is None:
        raise ConfigError("--superlink needs --root-certificates")
    if options.measure and options.federation is None:
        raise ConfigError("--measure needs --federation")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    logging.getLogger().setLevel(logging.ERROR)  # hide the libraries' log: findings have lines of their own
    logging.getLogger("common.data.images").setLevel(logging.WARNING)  # names the files that cannot be read
    site = load(options.site, SiteConfig)
    federation = None
    if options.federation is not None:
        federation = resolved(load(options.federation, FederationConfig), options.federation)
    from client.preflight.context import CheckContext  # imports PyTorch

    subject = CheckContext(
        site,
        options.site,
        federation,
        options.federation,
        options.superlink,
        options.root_certificates,
        options.auth_supernode_private_key,
        options.deadline,
        options.mbit,
        options.measure,
    )
    return check(subject, as_json=options.json)


CHECK = Command(
    _arguments,
    _run,
    example="site-a.yaml --federation FEDERATION.yaml --superlink fl.example.org:9092 --root-certificates ca.crt",
    then="fedspan site join site-a.yaml --superlink fl.example.org:9092 --root-certificates ca.crt ...",
    notes="One line for each check: ok, warning, FAIL or skipped, and what mends it. Exit code 1: something failed.",
)
