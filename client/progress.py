"""The work of a site as its own people see it: lines of its log, and a small file for its status and its page.

Nothing of this leaves the site. The file is JSON: run, federation, strategy, rounds, doing ("loading", "training",
"evaluating", "exchanging" or "writing the model"; null: nothing), round of it, since (Unix time), step and steps of the
training that goes on, trained (a list of round, loss, seconds), scored (a list of scores and after, the number of
rounds behind the model), refused (the reason of the last refusal; null: none since), ended (the last round of a run
that has ended; null: it goes on), model (folder of the model that it left here) and time. During training it is written
once a second.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config.federation import FederationConfig
from common.metrics import SCORES
from common.system.files import read_object, write_atomically
from common.text import size

PROGRESS = "FEDSPAN_PROGRESS"  # environment variable: path of the file; without it none is written
_DOING = {"hello": "loading", "train": "training", "evaluate": "evaluating", "exchange": "exchanging"}
_DOING["deliver"] = "writing the model"
_PAUSE = 1.0  # seconds between two writes for steps
log = logging.getLogger("site")


class Progress:
    """A site's present work and the results of its rounds so far.

    Args:
        file: where to write; None: nowhere.

    Attributes:
        known: run, site, round and event of the message, for a log in JSON.
    """

    def __init__(self, file: Path | None) -> None:
        self._file, self._written = file, 0.0
        self.known: Mapping[str, object] = {}
        self._words: list[str] = []  # for the log's line about this message
        kept = {} if file is None else read_object(file)
        self._now: dict[str, Any] = kept if _is_ours(kept) else {}

    @classmethod
    def of_process(cls) -> "Progress":
        """The progress of this process's site, in the file that the environment names."""
        file = os.environ.get(PROGRESS)
        return cls(Path(file) if file else None)

    def begin(
        self, run: int, federation: FederationConfig, message: str, number: int | None, identity: str | None = None
    ) -> None:
        """Note the work that begins: a "hello", "train", "evaluate" or "deliver" message.

        Args:
            run: Flower's number of the run.
            federation: the run's settings.
            message: the kind of message.
            number: the round; None: the message is of no round.
            identity: which run it is, also when it was resumed under another number; None: not told.
        """
        name, strategy, rounds = federation.name, federation.strategy.name, federation.rounds
        known = self._now.get("identity")
        if self._now.get("federation") != name or (identity is not None and known not in (None, identity)):
            self._now = {"federation": name, "trained": [], "scored": []}
        if message == "train" or self._now.get("run") != str(run):
            self._now |= {"ended": None, "model": None}
        if self._now.get("run") != str(run):
            self._now |= {
                "run": str(run),
                "identity": identity,
                "strategy": strategy,
                "rounds": rounds,
                "refused": None,
            }
            count = f"{rounds} round" if rounds == 1 else f"{rounds} rounds"
            log.info("%s asks this site to take part: %s, %s", name, strategy, count, extra=self.known)
        self._words.clear()
        number = None if message == "deliver" else number  # the model's may be an earlier one
        self._write(doing=_DOING[message], round=number, since=time.time(), step=None, steps=None)

    def ready(self, rows: int, held_out: int, devices: str) -> None:
        """Note that rows and model are read, and on which devices this site works."""
        self._now["devices"] = devices
        self.say(f"ready: {rows} training rows, {held_out} held out, {devices}")

    def step(self, done: int, steps: int) -> None:
        """Note that so many of a round's optimizer steps are done."""
        self._now |= {"step": done, "steps": steps}
        if time.monotonic() - self._written >= _PAUSE:
            self._write()

    def say(self, words: str) -> None:
        """Add to the log's line about this message."""
        self._words.append(words)

    def trained(self, numbers: Mapping[str, float]) -> None:
        """Note a round's training, by its numbers (``common.protocol.messages.TRAINING``); they may have no loss."""
        number, loss, seconds = self._now["round"], numbers.get("loss"), numbers.get("seconds")
        earlier = [line for line in self._now["trained"] if line["round"] < number]
        self._now["trained"] = [*earlier, {"round": number, "loss": loss, "seconds": seconds}]
        if loss is not None and seconds is not None:
            self.say(f"{numbers['steps']:.0f} steps in {seconds:.0f} s, training loss {loss:.3f}")

    def scored(self, after: int, scores: Mapping[str, float]) -> None:
        """Note this site's scores of the model after so many rounds."""
        earlier = [line for line in self._now["scored"] if line["after"] < after]
        self._now["scored"] = [*earlier, {"after": after, "scores": dict(scores)}]
        known = [(SCORES[name], value) for name, value in scores.items() if name in SCORES]
        told = ", ".join(f"{score.in_text} {value:.3f}" for score, value in known if score.headline)
        self.say(f"the model after round {after} has here: {told}")

    def ended(self, number: int, model: Path | None = None, why_not: str | None = None) -> None:
        """Note that the run has ended, and where its model is, or why it is not here.

        Args:
            number: the last round, or that of the model, which may be an earlier one.
            model: the model's folder.
            why_not: the reason why it is not written.
        """
        last = max([number, *(line["round"] for line in self._now["trained"])])
        self._now |= {"ended": last, "model": model and str(model)}
        left = "" if model is None else f"; the model after round {number} is in {model}"
        left += f"; the model is not written: {why_not}" if why_not else ""
        self.say(f"the run has ended after round {last} of {self._now['rounds']}{left}")

    def end(self, sent_bytes: int) -> None:
        """Note that the message is answered with so many bytes of tensors, and log what was done."""
        if sent_bytes:
            self.say(f"{size(sent_bytes)} leave")
        log.info("%s%s", self._where(), "; ".join(self._words), extra=self.known)
        self._rest(refused=None)

    def refuse(self, reason: str, event: str = "refused", unexpected: Exception | None = None) -> None:
        """Note that the message is answered with an error, or "not yet" when it is asked again, and log the reason."""
        level = logging.WARNING if unexpected is None else logging.ERROR
        log.log(level, "%s%s: %s", self._where(), event, reason, exc_info=unexpected, extra=self.known)
        self._rest(refused=reason)

    def _rest(self, *, refused: str | None) -> None:
        self._write(doing=None, round=None, since=time.time(), step=None, steps=None, refused=refused)

    def _where(self) -> str:
        number = self._now.get("round")
        return "" if number is None else f"round {number} of {self._now['rounds']}: "

    def _write(self, **changed: object) -> None:
        self._now |= {**changed, "time": time.time()}
        self._written = time.monotonic()
        if self._file is None:
            return
        try:
            write_atomically(self._file, json.dumps(self._now) + "\n", durable=False)
        except OSError as error:  # e.g. a full disk: the site works on, and readers see the old time
            log.warning("%s cannot be written (%s)", self._file, error.strerror)
            self._file = None


def _is_ours(kept: Mapping[str, Any]) -> bool:
    """Whether a file has the form of this version's, so that what it has is added to."""
    lists = kept.get("trained"), kept.get("scored")
    lines = [line for one in lists if isinstance(one, list) for line in one]
    whole = all(isinstance(one, list) for one in lists) and all(isinstance(line, dict) for line in lines)
    return whole and all(isinstance(line.get("round", line.get("after")), int) for line in lines) and "rounds" in kept
