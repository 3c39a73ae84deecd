"""How a site is, in words: ``fedspan site status SITE.yaml``, from the files that ``fedspan site join`` keeps.

The folder of a site's working files holds, each as one JSON object: ``link.json`` (``client.watch.link_state``),
``worker.json`` (``client.connect.worker_supervisor``), ``work.json`` (``client.progress``), and ``status.json``, which
has all of these and: time, site, device, superlink, link ("up", "lost", "waiting" or "refused"), link_since,
link_reason, link_deaths, worker_deaths. It is written twice a second while the site takes part.
"""

import argparse
import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from common.config.load import load
from common.config.site import SiteConfig
from common.errors import ConfigError
from common.system.command import FAILED, Command
from common.text import clock, one_line

LINK, WORKER, WORK, WHOLE = "link.json", "worker.json", "work.json", "status.json"
MAX_AGE = 10.0  # seconds after which a status is out of date


def home_of(site: SiteConfig, site_file: Path) -> Path:
    """The folder of a site's working files, unless ``fedspan site join --home`` names another."""
    return site_file.parent / f".{site.name}"


def read_status(file: Path) -> dict[str, Any]:
    """The content of a site's status file.

    Raises:
        ConfigError: there is none, because the site has never taken part, or it cannot be read.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{file.parent} has no {file.name}: this site has not joined yet (fedspan site join)"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({type(error).__name__})") from None
    if not isinstance(found, dict) or not isinstance(found.get("time"), (int, float)):
        raise ConfigError(f"{file} is not what `fedspan site join` writes")
    return found


def takes_part(told: dict[str, Any]) -> bool:
    """Whether ``fedspan site join`` is at work now, by the time in a status."""
    return time.time() - float(told["time"]) <= MAX_AGE


def in_words(told: dict[str, Any]) -> Iterator[str]:
    """A status as lines for people: the link, what the site is doing, its losses."""
    if takes_part(told):
        since = _moment(told.get("link_since"))
        words = {"up": f"connected to {told.get('superlink')} since {since}"}
        reason = one_line(str(told.get("link_reason") or "no server has answered yet"))
        yield f"{told.get('site')}: " + words.get(str(told.get("link")), f"{told.get('link')} since {since}: {reason}")
        worker = told.get("worker") or {}
        if worker.get("state") not in ("idle", "working"):
            yield f"worker: {worker.get('state', 'being started')}"
    else:
        yield f"{told.get('site')}: does not take part; fedspan site join was last seen {_moment(told['time'])}"
    work = told.get("work") or {}
    if "federation" in work:
        yield _work(work, now=takes_part(told))
        if work.get("model"):
            yield f"the model is in {work['model']}"
        yield from _results(work)
    elif takes_part(told):
        yield "not asked yet"


def _work(work: dict[str, Any], *, now: bool) -> str:
    """The federation, the round, and what the site does for it now."""
    trained = work.get("trained") or []
    number = work.get("round") or work.get("ended") or (trained[-1]["round"] if trained else 0)
    where = f"{work['federation']} ({work.get('strategy')}), round {number} of {work.get('rounds')}"
    if not now or work.get("doing") is None:
        waits = "the run has ended" if work.get("ended") else "waits to be asked" if now else "as it was then"
        return f"{where}; {waits}"
    steps = f", step {work['step']} of {work['steps']}" if work.get("steps") else ""
    return f"{where}; {work['doing']} for {clock(time.time() - work['since'])}{steps}"


def _results(work: dict[str, Any]) -> Iterator[str]:
    losses = [f"{line['loss']:.3f}" for line in work.get("trained") or [] if line.get("loss") is not None]
    if losses:
        yield f"training loss by round: {' '.join(losses)}"
    scored = [(line["after"], line["scores"]["loss"]) for line in work.get("scored") or [] if "loss" in line["scores"]]
    if scored:
        told = ", ".join(f"{loss:.3f} after round {after}" for after, loss in scored)
        yield f"loss of the federation's model here: {told}"
    if work.get("refused"):
        yield f"last refused: {one_line(str(work['refused']))}"


def _moment(seconds: float | None) -> str:
    return "–" if seconds is None else datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("site", type=Path, metavar="SITE.yaml", help="the site file")
    parser.add_argument("--home", type=Path, metavar="DIR", help="as given to `fedspan site join`")
    parser.add_argument("--json", action="store_true", help="the status file itself")


def _run(options: argparse.Namespace) -> int:
    file = options.site.resolve()
    told = read_status((options.home or home_of(load(file, SiteConfig), file)) / WHOLE)
    for line in [json.dumps(told)] if options.json else in_words(told):
        print(line)  # noqa: T201
    return 0 if takes_part(told) and told.get("link") == "up" else FAILED


STATUS = Command(
    _arguments,
    _run,
    example="site-a.yaml",
    then="fedspan site join, when it does not take part; its log says more",
    notes="Exit code 0 when the site takes part and its server lets it in, otherwise 1.",
)
