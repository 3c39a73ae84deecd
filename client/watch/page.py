"""A site's own page: ``fedspan site watch SITE.yaml``. Reads the site's files; asks nobody and tells nobody."""

import argparse
import time
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from client.privacy.agreement import Agreement, agreements_of, read_agreements
from client.privacy.budget import Totals
from client.privacy.ledger import Entry, Ledger
from client.privacy.ledger_summary import Story
from client.watch.asked import asked
from client.watch.chart import chart
from client.watch.limits import limits
from client.watch.status import WHOLE, home_of, read_status, takes_part
from common.config.load import load
from common.config.site import MARK, SiteConfig
from common.errors import ConfigError, FedSpanError, LedgerError
from common.metrics import SCORES
from common.system.command import Command
from common.system.files import read_object
from common.web.serve import add_page_options, serve
from common.web.template import Page, Section, fill

_HERE = Path(__file__).parent
_DOING = {"loading": "loads model and rows", "training": "trains", "evaluating": "scores the model on held-out rows"}


class SitePage:
    """A site's page, made anew of its files whenever it is called.

    Args:
        file: the site file, absolute.
        status: the status file that ``fedspan site join`` writes.
    """

    def __init__(self, file: Path, status: Path) -> None:
        self._file, self._status = file, status
        self._book: _Book | None = None

    def __call__(self) -> Page:
        """The page as of now.

        Raises:
            ConfigError: the site file or the file of agreements is wrong.
        """
        site = load(self._file, SiteConfig)
        agreements = read_agreements(agreements_of(site, self._file))
        told = _told(self._status)
        work = told.get("work") or {}
        refused, work = work.get("refused"), work if "federation" in work else {}
        known = agreements.get(str(work.get("federation")))
        sections = [
            Section("now", "Now", "Now", _now(told, work, refused, agreed=bool(agreements))),
            Section("losses", "Losses", "Losses here", _losses(work)),
            *self._counted(site, agreements),
            Section("agreed", "Agreed", "What is asked, and was agreed", _agreed(site, agreements)),
            Section("model", "Model", "The federation's model", _model(site, self._file, list(agreements))),
        ]
        state, tone = _state(told)
        where = f" {work.get('round') or len(work.get('trained') or [])}/{work['rounds']}" if work else ""
        head = fill(_HERE / "head.html", name=site.name, state=state, tone=tone, why=_why(told), known=known)
        return Page(f"{site.name}: {state}{where}", head, sections)

    def _counted(self, site: SiteConfig, agreements: dict[str, Agreement]) -> list[Section]:
        """The sections about the ledger: what has left, and what is used of the limits."""
        path = site.ledger_file(self._file)
        if self._book is None or self._book.ledger.path != path:
            self._book = _Book(path)
        damage = self._book.read()
        if damage is not None:
            self._book = None
        book = self._book or _Book(path)
        try:
            shown = list(limits(site, agreements, book.totals))
        except ConfigError as error:
            shown, damage = [], damage or str(error)
        left = fill(_HERE / "left.html", story=book.story, lines=book.ledger.lines, damage=damage)
        used = fill(_HERE / "limits.html", limits=shown, damage=damage)
        return [Section("left", "Has left", "What has left", left), Section("limits", "Limits", "Limits", used)]


class _Book:
    """A ledger as it is read: what was new since the last time is added."""

    def __init__(self, path: Path) -> None:
        self.story, self.totals = Story(), Totals()
        self.ledger = Ledger(path, self._take)

    def read(self) -> str | None:
        """Read the new lines; the reason when that is not possible. There may be no ledger yet."""
        if not self.ledger.path.exists() and not self.ledger.lines:
            return None
        try:
            with self.ledger.opened(write=False):
                return None
        except LedgerError as error:
            return str(error)

    def _take(self, entry: Entry) -> None:
        self.story.add(entry)
        self.totals.add(entry)


def _told(status: Path) -> dict[str, Any]:
    """The status; empty when the site has never joined."""
    return read_status(status) if status.exists() else {}


def _state(told: dict[str, Any]) -> tuple[str, str]:
    """The site's state in a word or two, and its tone."""
    if not told:
        return "not joined yet", "warn"
    if not takes_part(told):
        return "does not take part", "warn"
    link = str(told.get("link"))
    return {"up": ("connected", "good"), "refused": ("refused", "bad")}.get(link, (f"link {link}", "bad"))


def _why(told: dict[str, Any]) -> str:
    """Why the site is not connected."""
    up = not told or not takes_part(told) or told.get("link") == "up"
    return "" if up else str(told.get("link_reason") or "no server has answered yet")


def _now(told: dict[str, Any], work: dict[str, Any], refused: str | None, *, agreed: bool) -> Markup:
    here = bool(told) and takes_part(told)
    doing = work.get("doing") if here else None
    step, steps = work.get("step"), work.get("steps")
    since = time.time() - work["since"] if doing else None
    rest = since / step * (steps - step) if since and step and steps else None
    trained = max((line["round"] for line in work.get("trained") or []), default=0)
    return fill(
        _HERE / "now.html",
        told=told,
        here=here,
        work=work,
        refused=refused if here else None,
        doing=_DOING.get(str(doing), ""),
        since=since,
        rest=rest,
        trained=trained,
        next=_next(told, work, trained, here=here, agreed=agreed),
    )


def _next(told: dict[str, Any], work: dict[str, Any], trained: int, *, here: bool, agreed: bool) -> str:
    """The next thing that happens, or that people have to do."""
    if not agreed:
        return "Agree to a federation: fedspan site agree FEDERATION.yaml --site SITE.yaml"
    if not here:
        return "Take part: fedspan site join"
    if told.get("link") != "up":
        return "The link is tried again by itself."
    if not work:
        return "The server asks this site to take part, once its run begins."
    rounds = work["rounds"]
    if work.get("ended") and not work.get("doing"):
        model = f", its model is in {work['model']}" if work.get("model") else ""
        return f"The run has ended after round {work['ended']} of {rounds}{model}. The next one begins by itself."
    if work.get("doing") == "training":
        return f"The update of round {work['round']} leaves, if the limits below allow it."
    if work.get("doing"):
        return "The answer leaves, if the limits below allow it."
    if trained >= rounds:
        return "All rounds are trained here; the run ends when the server has the updates of all sites."
    return f"The server asks for round {trained + 1} of {rounds}, when the other sites have answered."


def _losses(work: dict[str, Any]) -> Markup:
    trained = {line["round"]: line for line in work.get("trained") or []}
    scored = {line["after"]: line["scores"] for line in work.get("scored") or []}
    losses = {number: line["loss"] for number, line in trained.items() if line.get("loss") is not None}
    held_out = {after: scores["loss"] for after, scores in scored.items() if "loss" in scores}
    lines = {"training loss": losses, "loss on held-out rows": held_out}
    shown = {name: line for name, line in lines.items() if line}
    ends = "; ".join(f"{name} {line[min(line)]:.3f} to {line[max(line)]:.3f}" for name, line in shown.items())
    return fill(
        _HERE / "losses.html",
        drawn=chart(shown, int(work.get("rounds") or 0), f"Losses by round. {ends}."),
        rounds=sorted(trained.keys() | scored.keys()),
        trained=trained,
        scored=scored,
        scores=[s for name, s in SCORES.items() if any(name in line for line in scored.values())],
        federation=work.get("federation"),
    )


def _agreed(site: SiteConfig, agreements: dict[str, Agreement]) -> Markup:
    shown = []
    for name, agreement in agreements.items():
        try:
            words = list(asked(site, agreement))
        except FedSpanError as error:
            words = [("", str(error))]
        settings = yaml.safe_dump(agreement.settings, sort_keys=False, allow_unicode=True)
        shown.append((name, agreement, words, settings))
    return fill(_HERE / "agreed.html", agreements=shown)


def _model(site: SiteConfig, file: Path, names: list[str]) -> Markup:
    """The folder of the kept models, and those that are there."""
    kept, folders = [], [folder for name in names if (folder := site.model_folder(file, name)) is not None]
    for folder in folders:
        try:
            models = read_object(folder / MARK)["models"]
            kept += [(folder / name, model["round"], model["files"]) for name, model in sorted(models.items())]
        except (KeyError, TypeError, AttributeError):  # there is none yet, or an earlier version's
            continue
    return fill(_HERE / "model.html", keep=site.keep, folders=folders, kept=kept)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("site", type=Path, metavar="SITE.yaml", help="the site file")
    parser.add_argument("--home", type=Path, metavar="DIR", help="as given to `fedspan site join`")
    parser.add_argument(
        "--status", type=Path, metavar="FILE", help="as given to `fedspan site join`, in place of --home"
    )
    add_page_options(parser)


def _run(options: argparse.Namespace) -> None:
    file = options.site.resolve()
    site = load(file, SiteConfig)
    status = options.status or (options.home or home_of(site, file)) / WHOLE
    serve(SitePage(file, status), options.port, browser=options.open)


WATCH = Command(
    _arguments,
    _run,
    example="site-a.yaml",
    then="the address that it prints, in a browser on this machine",
    notes="Works while `fedspan site join` runs, and between runs. From another machine: ssh -L 8080:127.0.0.1:PORT,\n"
    "and the same address with 8080.",
)
