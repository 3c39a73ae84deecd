"""How far a run has come, and what its sites do, built up from its events as they happen."""

from dataclasses import dataclass, field

from server.run.events import Event, held_out_scores

_STATES = {
    "client_joined": "joined",
    "client_refused": "refused",
    "client_failed": "failed",
    "update_refused": "update refused",
    "client_excluded": "left out",
    "client_readmitted": "joined",
    "client_disconnected": "not connected",
    "client_connected": "connected",
}


@dataclass
class SiteProgress:
    """What a site does, and its last numbers."""

    state: str = "joining"
    loss: float | None = None
    scores: dict[str, float | None] = field(default_factory=dict)  # on held-out rows; None: not finite


@dataclass
class RunProgress:
    """What is known of a run, built up from its events."""

    rounds: int = 0
    round: int = 0
    finished_rounds: int = 0
    started: float = 0.0
    first_round: float = 0.0
    rounds_seen: int = 0  # finished since the start or the resumption
    bytes_down: int = 0
    bytes_up: int = 0
    sites: dict[str, SiteProgress] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Take in one event; unknown kinds change nothing."""
        kind, client = event["event"], event.get("client", "")
        if kind == "started":
            self.rounds, self.started = event["rounds"], event["time"]
        elif kind == "round_started":
            self.round = event["round"]
            self.first_round = self.first_round or event["time"]
            for name in event["clients"]:
                self.sites.setdefault(name, SiteProgress()).state = "training"
        elif kind in ("round_finished", "resumed"):
            self.finished_rounds = event["round"]
            self.rounds_seen += kind == "round_finished"
            self.bytes_down += event.get("bytes_down", 0)
            self.bytes_up += event.get("bytes_up", 0)
        elif kind == "evaluated":
            site = self.sites.setdefault(client, SiteProgress("evaluating"))
            site.scores = {score.name: value for score, value in held_out_scores(event)}
        elif kind == "reply":
            site = self.sites.setdefault(client, SiteProgress())
            site.state, site.loss = "waiting", event.get("loss")
        elif kind in _STATES:
            self.sites.setdefault(client, SiteProgress()).state = _STATES[kind]
        elif kind == "finished":
            for site in self.sites.values():
                site.state = "done"

    def eta(self, now: float) -> float | None:
        """Seconds to the end, from the rounds that are finished; None before the first."""
        if not self.rounds_seen:
            return None
        return (now - self.first_round) / self.rounds_seen * (self.rounds - self.finished_rounds)
