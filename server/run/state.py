"""A run's state, rounds and sites, read from the run's folder for the operator; nothing is written."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import RunFolderError
from server.run import records
from server.run.ages import ages
from server.run.events import Event, event_kind
from server.run.folder import in_use
from server.run.quarantine import Quarantine
from server.run.read import Run, read_all
from server.run.run_progress import RunProgress, connections_of, last_index
from server.run.supervisor_lock import Supervisor, is_supervised, supervisor_of

STATES = ("starting", "running", "completed", "failed", "interrupted", "dead")


@dataclass(frozen=True)
class FinishedRound:
    """A finished round.

    Attributes:
        seconds: duration of the round.
        bytes_down: bytes sent to the sites.
        bytes_up: bytes received from the sites, rejected updates included.
        sites: the sites whose updates were admitted.
        asked: number of sites that were sent work.
        scores: scores of the state after the round, on the server's own set; empty: not evaluated.
    """

    round: int
    seconds: float
    bytes_down: int
    bytes_up: int
    sites: int
    asked: int
    scores: dict[str, float | None]


@dataclass
class SiteState:
    """A site's part in a run.

    Attributes:
        connection: "up", "down", "refused" (at the hello), or "unknown" when no server is at work.
        doing: the site's activity in the current round; ``since``: Unix time of its beginning.
        work: the round that the site was given work in last.
        reason: the reason of a refusal or failure that stands.
        usual: seconds from request to answer in the site's last round.
        loss: training loss of the site's last round.
        last_seen: Unix time of the site's last message or connection; Flower notices a lost connection after about a
            minute.
        version: version of FedSpan at the site.
        rounds: number of rounds in which the site has trained.
        refusals: number of the site's updates rejected, or replaced by an error, in a row.
        left_out: the reason why the site is in quarantine.
        seconds: duration of the site's last training.
    """

    site: str
    connection: str
    doing: str = ""
    since: float | None = None
    work: int | None = None
    reason: str | None = None
    usual: float | None = None
    loss: float | None = None
    last_seen: float | None = None
    version: str = ""
    device: str = ""
    rows: int | None = None
    held_out: int | None = None
    rounds: int = 0
    refusals: int = 0
    left_out: str | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float | None = None


@dataclass
class RunState:
    """A run.

    Attributes:
        state: one of ``STATES``; "dead": no process works on the run, and none has written a reason.
        reason: the reason of a failure or an interruption.
        round: the last round that was begun; ``rounds``: number of rounds of the whole run.
        started: Unix time of the start; ``seconds``: from there to now, or to the end, with all pauses.
        worked: seconds of it in which a server was at work, one number for every start of a server.
        eta: estimated seconds to the end.
        flower_run: the run's id in Flower's own commands.
        to_go_on: the command that resumes a run that stopped before its end.
        bytes_down: bytes sent to all sites in finished rounds; ``bytes_up``: bytes received.
        loss: loss of the last evaluated state, on the server's own set.
        ages: number of updates by age, in rounds; empty where rounds wait for their sites.
        problems: refusals and failures of sites, in order.
    """

    name: str
    state: str
    reason: str | None = None
    strategy: str = ""
    round: int = 0
    rounds: int = 0
    started: float | None = None
    seconds: float | None = None
    worked: list[float] = field(default_factory=list)
    eta: float | None = None
    last_event: float | None = None
    flower_run: str | None = None
    to_go_on: str | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    loss: float | None = None
    ages: dict[int, int] = field(default_factory=dict)
    finished_rounds: list[FinishedRound] = field(default_factory=list)
    sites: list[SiteState] = field(default_factory=list)
    problems: list[records.Problem] = field(default_factory=list)


def read_state(run_dir: Path, now: float | None = None) -> RunState:
    """Read a run's folder.

    Raises:
        RunFolderError: there is no run, or a file of it cannot be read; names it.
    """
    return state_of(read_all(run_dir), now)


def state_of(run: Run, now: float | None = None) -> RunState:
    """The state of a run whose folder was read.

    Args:
        run: the folder's content.
        now: Unix time up to which a run under way is counted; None: the present.

    Raises:
        RunFolderError: there is no run, or who supervises it cannot be read.
    """
    now = time.time() if now is None else now
    supervisor = supervisor_of(run.path)
    if not run.info and supervisor is None:
        raise RunFolderError(f"{run.path} holds no run")
    state, reason = _state(run.path, run.info, supervisor)
    alive = state in ("starting", "running")
    events, settings = run.events, run.config
    progress = RunProgress()
    for event in events[last_index(events, "resumed") :]:
        progress.take(event)
    last = events[-1]["time"] if events else None
    started = run.info.get("started")
    end = now if alive else run.info.get("finished") or last
    closed = [event for event in events if event["event"] == "round_finished"]
    return RunState(
        name=run.name,
        state=state,
        reason=reason,
        strategy=str(settings.get("strategy", {}).get("name", "")),
        round=max(progress.round, progress.finished_rounds),
        rounds=int(settings.get("rounds", 0)),
        started=started,
        seconds=end - started if started and end else None,
        worked=_worked(events, started, end) if started and end else [],
        eta=progress.eta(now) if alive else None,
        last_event=last,
        flower_run=str(run.info["flower_run"]) if "flower_run" in run.info else None,
        to_go_on=supervisor.to_go_on() if supervisor and run.info and not alive and state != "completed" else None,
        bytes_down=sum(event["bytes_down"] for event in closed),
        bytes_up=sum(event["bytes_up"] for event in closed),
        loss=next(reversed(records.curve(run.metrics, "loss").get(records.SERVER, {}).values()), None),
        ages=ages(run.metrics) if run.buffered else {},
        finished_rounds=_rounds(events, run.metrics),
        sites=_sites(run, progress if alive else None),
        problems=records.problems(events),
    )


def runs(folder: Path) -> list[Path]:
    """The folders of all runs in ``folder``, by name."""
    return sorted({file.parent for name in ("run.json", "supervisor.json") for file in folder.glob(f"*/{name}")})


def _state(run_dir: Path, run: dict[str, Any], supervisor: Supervisor | None) -> tuple[str, str | None]:
    """A run's state (one of ``STATES``), and the reason if the run has stopped."""
    status = str(run.get("status", ""))
    if status == "completed":
        return status, None
    if in_use(run_dir):
        return "running", None
    if is_supervised(run_dir):
        return "starting", None
    if status in ("failed", "interrupted"):
        return status, str(run.get("reason"))
    if supervisor is not None and supervisor.outcome is not None:
        return supervisor.outcome, supervisor.reason
    return "dead", "its processes ended without a word"


def _worked(events: list[Event], started: float, end: float) -> list[float]:
    """Seconds of every server's work: from its start to its last event, to ``end`` for the last one."""
    again = [index for index, event in enumerate(events) if event["event"] == "resumed" and index]
    begins = [started, *(events[index]["time"] for index in again)]
    ends = [*(events[index - 1]["time"] for index in again), end]
    return [max(until - since, 0.0) for since, until in zip(begins, ends, strict=True)]


def _rounds(events: list[Event], metrics: list[records.Record]) -> list[FinishedRound]:
    """The finished rounds; for a round that was repeated after a crash, the last repetition."""
    scores = records.evaluations(metrics).get(records.SERVER, {})
    asked: dict[int, set[str]] = {}
    came: dict[int, set[str]] = {}
    found: dict[int, FinishedRound] = {}
    for event in events:
        number = event.get("round", 0)
        if event["event"] == "round_started":
            asked[number], came[number] = set(event["clients"]), set()
        elif event["event"] == "reply":
            came[number].add(event["client"])
        elif event["event"] == "round_finished":
            down, up = event["bytes_down"], event["bytes_up"]
            counts = len(came[number]), len(asked[number] | came[number])  # a slow site was asked in an earlier round
            found[number] = FinishedRound(number, event["seconds"], down, up, *counts, scores.get(number, {}))
    return [found[number] for number in sorted(found)]


def _sites(run: Run, progress: RunProgress | None) -> list[SiteState]:
    events = run.events
    known = {event["client"] for event in events if event_kind(event).link}
    outcomes = {site.who: site for site in records.sites(events, records.rounds_begun(events), buffered=run.buffered)}
    costs = {cost.who: cost for cost in records.costs(run.metrics)}
    trained = {record["client"]: record for record in records.trainings(run.metrics)}
    quarantine = _quarantine(run.path, events, run.config)
    joined = {e["client"]: e for e in events if e["event"] == "client_joined"}
    replies = {e["client"]: e for e in events if e["event"] == "reply"}
    seen = {e["client"]: e["time"] for e in events if "client" in e and event_kind(e).seen}
    connections = connections_of(events)
    found = []
    for name in records.order(outcomes.keys() | known):
        site = SiteState(name, connections.get(name, "down") if progress is not None else "unknown")
        site.last_seen = seen.get(name)
        site.version, site.device = (str(joined.get(name, {}).get(key, "")) for key in ("version", "device"))
        site.refusals, site.left_out = quarantine.counts.get(name, 0), quarantine.excluded().get(name)
        if name in outcomes:
            site.rows, site.held_out = outcomes[name].rows, outcomes[name].held_out
            site.rounds = sum(outcome == "trained" for outcome in outcomes[name].rounds.values())
        if name in costs:
            site.bytes_down, site.bytes_up = int(costs[name].down), int(costs[name].up)
            site.seconds = trained[name].get("seconds", {}).get("train")
        if name in replies:
            site.usual, site.loss = replies[name]["seconds"], replies[name]["loss"]
        if progress is not None and name in progress.sites:
            now = progress.sites[name]
            site.doing, site.since, site.work, site.reason = now.state, now.since, now.round, now.reason
        found.append(site)
    return found


def _quarantine(run_dir: Path, events: list[Event], settings: dict[str, Any]) -> Quarantine:
    """Rejections in a row, counted like the server: from the last resumption on."""
    quarantine = Quarantine(run_dir, int(settings.get("admission", {}).get("max_refusals", sys.maxsize)))
    after: dict[int, dict[str, int]] = {}
    good: set[str] = set()
    for event in events:
        kind, name = event["event"], event.get("client", "")
        if kind == "round_started":
            good = set()
        elif kind == "reply":
            good.add(name)
        elif kind == "update_refused" or (kind == "client_failed" and event.get("counted")):
            good.discard(name)
            quarantine.note(name, refused=True)
        elif kind == "client_readmitted":
            quarantine.counts.pop(name, None)
        elif kind == "round_finished":
            for admitted in good:
                quarantine.note(admitted, refused=False)
            after[event["round"]] = dict(quarantine.counts)
        elif kind == "resumed":
            quarantine.counts = dict(after.get(event["round"], {}))
    return quarantine
