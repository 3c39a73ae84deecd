"""What happens in one round, on its way to the run folder."""

import time
from collections.abc import Mapping

from common.config.section import SERVER
from common.metrics import SCORES
from common.protocol import wire
from common.protocol.messages import TrainReply
from server.loop.inflight import Sent
from server.run.folder import RunFolder
from strategies.rule import Update


class RoundRecorder:
    """Notes of the round under way.

    Args:
        number: of the round.
        folder: where they are written to.

    Attributes:
        admitted: the sites whose updates count, with the seconds each took.
        problems: the reason by site of those that failed, were refused or stayed away.
        kinds: of their errors, by site.
        elsewhere: seconds that the server did not spend on combining: waiting for replies, evaluating.
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
        self._sent: dict[int, int] = {}  # node id -> bytes
        self._bytes_up = 0

    def asked(self, node_id: int, num_bytes: int) -> None:
        """The round's work goes out to a node, in so many bytes of tensors."""
        self._sent[node_id] = self._sent.get(node_id, 0) + num_bytes

    def problem(self, site: str, event: str, reason: str, kind: str) -> None:
        """A site failed, was refused or stayed away; ``kind`` is that of its error."""
        self.problems[site], self.kinds[site] = reason, kind
        self.admitted.pop(site, None)
        self._records.pop(site, None)
        self._folder.event(event, round=self.number, client=site, reason=reason, kind=kind)

    def update(self, sent: Sent, reply: TrainReply, update: Update) -> None:
        """An update came in."""
        up = wire.num_bytes(reply.arrays)
        self._bytes_up += up
        trained = {**reply.training, "num_examples": update.num_examples}
        if trained.get("seconds"):
            trained["tokens_per_second"] = trained.get("tokens", 0.0) / trained.pop("seconds")
        record = {
            "round": self.number,
            "client": update.client,
            "phase": "train",
            "train": trained,
            "bytes": {"down": self._sent[sent.node_id], "up": up},
            "seconds": _transport(sent, reply) | dict(reply.seconds),
        }
        self._records[update.client] = (time.monotonic(), record)
        self.admitted[update.client] = spent = round(time.time() - sent.at, 3)
        loss = reply.training.get("loss")
        self._folder.event("reply", round=self.number, client=update.client, loss=loss, seconds=spent)

    def close(self, diagnostics: dict[str, float]) -> None:
        """Write the records, now that it is known how long each site waited for the others."""
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
            bytes_down=sum(self._sent.values()),
            bytes_up=self._bytes_up,
        )


def record_evaluation(
    folder: RunFolder, version: int, client: str, metrics: Mapping[str, float], seconds: float | None = None
) -> None:
    """Write down what ``client`` measured of the state after round ``version``; nothing when it measured nothing."""
    if not metrics:
        return
    record: dict[str, object] = {"round": version, "client": client, "phase": "evaluate", "evaluate": dict(metrics)}
    if seconds is not None:
        record["seconds"] = {"evaluate": seconds}
    folder.metrics(record)
    told = {name: metrics[name] for name, score in SCORES.items() if score.headline and name in metrics}
    folder.event("evaluated", round=version, client=client, scores=told)


def _transport(sent: Sent, reply: TrainReply) -> dict[str, float]:
    """Seconds from the SuperLink to the site's code and back, polling and process start included.

    Taken from both machines' clocks, so only as good as these agree; never below zero.
    """
    now = time.time()
    started, finished = reply.clock.get("started", sent.at), reply.clock.get("finished", now)
    return {"download": max(0.0, started - sent.at), "upload": max(0.0, now - finished)}
