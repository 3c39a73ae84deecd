"""Records of one round for the run folder: events as they happen, metrics when the round closes."""

import time
from collections.abc import Mapping

from common.config.section import SERVER
from common.metrics import SCORES
from common.protocol import wire
from common.protocol.messages import TrainReply
from common.text import SENTENCE, one_line
from server.loop.inflight import Sent
from server.run.folder import RunFolder
from strategies.rule import Update


class RoundRecorder:
    """Collects the records of the current round.

    Args:
        number: the round's number.
        folder: the run folder.

    Attributes:
        admitted: the sites whose updates were admitted, with the seconds that each took.
        problems: the reason by site, for sites that failed, were rejected or did not answer.
        kinds: the kind of the error by site, for the same sites.
        elsewhere: seconds that the server did not spend on aggregation: waiting for replies, evaluating.
        sent: bytes of tensors sent to each node.
    """

    def __init__(self, number: int, folder: RunFolder) -> None:
        self.number = number
        self.started = time.monotonic()
        self.admitted: dict[str, float] = {}
        self.problems: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self.elsewhere = 0.0
        self._folder = folder
        self._records: dict[str, tuple[float, dict[str, object]]] = {}  # site -> (when it was done, metrics record)
        self.sent: dict[int, int] = {}
        self._bytes_up = self._exchanged_down = 0

    def asked(self, node_id: int, num_bytes: int) -> None:
        """Note that the round's work is sent to a node, with ``num_bytes`` of tensors."""
        self.sent[node_id] = self.sent.get(node_id, 0) + num_bytes

    def exchanged(self, down: int, up: int) -> None:
        """Note bytes of the short messages that go with a masked sum."""
        self._exchanged_down += down
        self._bytes_up += up

    def begin_anew(self, reason: str) -> None:
        """Note that the round begins anew, with none of the replies so far; what they cost still counts."""
        self.admitted.clear()
        self.problems.clear()
        self.kinds.clear()
        self._records.clear()
        self._folder.event("round_begun_anew", round=self.number, client=SERVER, reason=one_line(reason, SENTENCE))

    def problem(
        self, site: str, event: str, reason: str, kind: str, *, took_part: bool = False, **more: object
    ) -> None:
        """Note that a site failed, was rejected or did not answer.

        Args:
            site: the site.
            event: the event to note.
            reason: a sentence.
            kind: the kind of the error.
            took_part: whether the site's update counts nevertheless.
            more: further fields of the event.
        """
        reason = one_line(reason, SENTENCE)
        self.problems[site], self.kinds[site] = reason, kind
        if not took_part:
            self.admitted.pop(site, None)
            self._records.pop(site, None)
        self._folder.event(event, round=self.number, client=site, reason=reason, kind=kind, **more)

    def update(self, sent: Sent, reply: TrainReply, update: Update, heaviest: float, down: int | None = None) -> None:
        """Note an admitted update.

        Args:
            sent: the request.
            reply: the reply.
            update: the update in it.
            heaviest: the largest weight that counts, in rows.
            down: bytes of tensors in the request, if it was sent in an earlier round.
        """
        spent, up = time.time() - sent.at, wire.num_bytes(reply.arrays)
        self._bytes_up += up
        trained = {**reply.training, "num_examples": update.num_examples}
        if update.num_examples > heaviest:
            trained["weight"] = heaviest
        if trained.get("seconds"):
            trained["tokens_per_second"] = trained.get("tokens", 0.0) / trained.pop("seconds")
        record = {
            "round": self.number,
            "client": update.client,
            "phase": "train",
            "train": trained,
            "bytes": {"down": self.sent[sent.node_id] if down is None else down, "up": up},
            "seconds": _possible(_transport(sent, reply) | dict(reply.seconds), spent),
        }
        age = {"age": update.age} if update.age else {}  # it started in an earlier round
        record |= age
        self._records[update.client] = (time.monotonic(), record)
        self.admitted[update.client] = round(spent, 3)
        loss = reply.training.get("loss")
        told = {"round": self.number, "client": update.client, "loss": loss, "seconds": round(spent, 3)}
        self._folder.event("reply", **told, **age)

    def close(self, diagnostics: dict[str, float]) -> None:
        """Write the metrics records; each site's waiting time is known now that the round is over."""
        end = time.monotonic()
        for done, record in self._records.values():
            record["seconds"]["wait"] = end - done  # type: ignore[index]
            self._folder.metrics(record)
            rounding = record["train"].get("wire_error")  # type: ignore[attr-defined]
            if rounding is not None:
                diagnostics = {**diagnostics, f"wire-error/{record['client']}": rounding}
        self._folder.metrics(
            {
                "round": self.number,
                "client": SERVER,
                "phase": "aggregate",
                "diagnostics": diagnostics,
                "seconds": {"aggregate": end - self.started - self.elsewhere},
            }
        )
        self._folder.event(
            "round_finished",
            round=self.number,
            seconds=round(end - self.started, 3),
            bytes_down=sum(self.sent.values()) + self._exchanged_down,
            bytes_up=self._bytes_up,
        )


def record_evaluation(
    folder: RunFolder,
    version: int,
    client: str,
    metrics: Mapping[str, float],
    seconds: float | None = None,
    age: int = 0,
) -> None:
    """Write down the metrics of ``client`` for the state after round ``version``; without metrics write nothing.

    Args:
        folder: the run folder.
        version: the round.
        client: the site's name, or "server".
        metrics: the metrics by name.
        seconds: the evaluation's duration.
        age: number of rounds that were finished since; the score of such a late one decides nothing.
    """
    if not metrics:
        return
    record: dict[str, object] = {"round": version, "client": client, "phase": "evaluate", "evaluate": dict(metrics)}
    if age:
        record["age"] = age
    if seconds is not None:
        record["seconds"] = {"evaluate": seconds}
    folder.metrics(record)
    told = {name: metrics[name] for name, score in SCORES.items() if score.headline and name in metrics}
    folder.event("evaluated", round=version, client=client, scores=told)


def _transport(sent: Sent, reply: TrainReply) -> dict[str, float]:
    """Seconds from the SuperLink to the site's code and back, polling and process start included.

    The difference of two machines' clocks, so only as exact as the clocks agree.
    """
    now = time.time()
    started, finished = reply.clock.get("started", sent.at), reply.clock.get("finished", now)
    return {"download": started - sent.at, "upload": now - finished}


def _possible(seconds: Mapping[str, float], spent: float) -> dict[str, float]:
    """A site's reported seconds, each limited to the seconds that the server has waited for the reply."""
    return {name: min(max(0.0, value), spent) for name, value in seconds.items()}
