"""The progress of a run and the activity of its sites, computed from the run's events as they happen."""

from dataclasses import dataclass, field

from server.run.events import Event, event_kind, held_out_scores, named_in


@dataclass
class SiteProgress:
    """A site's activity, and its last numbers: training loss, and scores on held-out rows (None: not finite).

    Attributes:
        since: Unix time of the activity's beginning; None: before the first event of it.
        round: the round that the site was given work in last.
        reason: the reason, when the activity is a refusal or failure.
    """

    state: str = "joining"
    since: float | None = None
    round: int | None = None
    reason: str | None = None
    loss: float | None = None
    scores: dict[str, float | None] = field(default_factory=dict)


@dataclass
class RunProgress:
    """A run's progress; times are Unix seconds.

    Attributes:
        started: time when the server started; ``first_round``: time when the server's first round began.
        rounds_seen: number of rounds finished since ``first_round``.
        sites: sites by name; the server is listed once it has evaluated.
    """

    rounds: int = 0
    round: int = 0
    finished_rounds: int = 0
    started: float = 0.0
    first_round: float = 0.0
    rounds_seen: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    sites: dict[str, SiteProgress] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Update the progress with one event."""
        named, state = named_in(event), event_kind(event).state
        for name in named:
            self.sites.setdefault(name, SiteProgress())
        for site in [self.sites[name] for name in named or self.sites] if state else []:
            site.state, site.since, site.reason = state, event["time"], event.get("reason")
            site.round = event["round"] if event_kind(event).outcome == "asked" else site.round
        match event["event"]:
            case "started":
                self.rounds, self.started = event["rounds"], event["time"]
            case "round_started":
                self.round = event["round"]
                self.first_round = self.first_round or event["time"]
            case "reply":
                self.sites[event["client"]].loss = event["loss"]
            case "evaluated":
                self.sites[event["client"]].scores = {s.name: value for s, value in held_out_scores(event)}
            case "round_finished":
                self.finished_rounds = event["round"]
                self.rounds_seen += 1
                self.bytes_down += event["bytes_down"]
                self.bytes_up += event["bytes_up"]
            case "resumed":
                self.finished_rounds = event["round"]

    def eta(self, now: float) -> float | None:
        """Estimate of the seconds to the end, from the finished rounds; None before the first round has finished."""
        if not self.rounds_seen:
            return None
        return (now - self.first_round) / self.rounds_seen * (self.rounds - self.finished_rounds)


def last_index(events: list[Event], kind: str) -> int:
    """Index of the last event of a kind; 0 when there is none."""
    return max((i for i, event in enumerate(events) if event["event"] == kind), default=0)


def connections_of(events: list[Event]) -> dict[str, str]:
    """The state of each site's connection since the server's last start, by site."""
    found: dict[str, str] = {}
    for event in events[last_index(events, "started") :]:
        link, name = event_kind(event).link, event.get("client", "")
        if link and not (
            link == "refused" and found.get(name) == "up"
        ):  # "up" and then "refused": a second node under the site's name
            found[name] = link
    return found
