"""The best round: its score, its state on disk, and whether to stop early.

The state after round r is evaluated while round r + 1 is trained (decision 002), so it is judged when that round
closes. The state of the best round is a folder beside the checkpoints, and outlives them.
"""

import math
from collections.abc import Iterable, Mapping

from common.config.federation import FederationConfig
from common.config.outcome import BestConfig
from common.config.section import SERVER
from common.errors import ConfigError
from common.metrics import ANSWERS, SCORES
from common.protocol.messages import Hello
from server.loop import checkpoint
from server.run.folder import RunFolder, read_lines
from strategies.rule import Tensors

Told = tuple[int | None, str | None]  # the best round, and a model's card for a site that keeps all


class BestRound:
    """Judges round after round.

    Args:
        config: the federation file.
        folder: the run folder.

    Attributes:
        metric: name of the score that decides.
        round: the best round so far; None: none is judged.
        score: its score.
    """

    def __init__(self, config: FederationConfig, folder: RunFolder) -> None:
        self.metric = config.best.metric or config.deciding_scores()[0]
        self.round: int | None = None
        self.score = math.nan
        self._config, self._folder = config.best, folder
        self._measured = config.deciding_scores()
        self._here = config.evaluation.server is not None
        self._worse = 0  # judged rounds in a row that were not better

    def go_on(self) -> None:
        """Judge the rounds of a resumed run once more, from its records."""
        for record in read_lines(self._folder.path / "metrics.jsonl"):
            if record["phase"] == "evaluate" and not record.get("age"):  # a late score has decided nothing
                self._folder.evaluations.setdefault(record["round"], {})[record["client"]] = record["evaluate"]
        for number in sorted(self._folder.evaluations):
            self._take(number)

    def check_measured(self, hellos: Iterable[Hello]) -> None:
        """Refuse a run whose file asks for a best round that nobody can judge.

        Raises:
            ConfigError: neither the server nor a site measures anything.
        """
        if self._config == BestConfig() or self._here or any(hello.held_out_rows for hello in hellos):
            return
        raise ConfigError(
            f"`best` goes by {self.metric}, but nobody measures it: no site tells scores of held-out rows, and there "
            f"is no `evaluation.server`, which would measure {', '.join(self._measured)}"
        )

    def judge(self, number: int, state: Tensors, version: str | None) -> None:
        """Judge a round by its evaluation; if it is the best one, note that and keep its state.

        Args:
            number: the round.
            state: the state after it.
            version: the state's version; None under a strategy without versions.

        Raises:
            FederationError: the state cannot be written.
        """
        if self._take(number):
            self._folder.event("best_round", round=number, metric=self.metric, score=self.score)
            self._folder.model_info({"best": {"round": number, "metric": self.metric, "score": self.score}})
            checkpoint.keep_best(self._folder.path, number, state, version)

    def state(self) -> tuple[Tensors, str | None]:
        """The best round's state, and its version.

        Raises:
            FederationError: it cannot be read.
        """
        assert self.round is not None  # noqa: S101 - the caller has asked
        return checkpoint.best_state(self._folder.path, self.round)

    def saved(self) -> None:
        """Remove the states of rounds that were the best one, after a checkpoint that knows it."""
        checkpoint.drop_best(self._folder.path, self.round)

    @property
    def reason_to_stop(self) -> str | None:
        """Why the run is to stop early; None: it goes on."""
        if self._config.patience is None or self._worse < self._config.patience:
            return None
        title, times = SCORES[self.metric].in_text, "1 evaluation" if self._worse == 1 else f"{self._worse} evaluations"
        return f"{title} is not better than after round {self.round} ({self.score:.4g}) for {times}"

    def _take(self, number: int) -> bool:
        """Judge a round; returns whether it is the best one so far. The base model, round 0, is none."""
        scores = self._folder.evaluations.pop(number, {})
        score = decisive(scores, self.metric, here=self._here) if number else None
        if score is None:
            return False
        sign = -1.0 if SCORES[self.metric].lower_is_better else 1.0
        if self.round is not None and not sign * (score - self.score) > self._config.min_change:
            self._worse += 1
            return False
        self.round, self.score, self._worse = number, score, 0
        return True


def decisive(scores: Mapping[str, Mapping[str, float | None]], metric: str, *, here: bool) -> float | None:
    """A round's score: the server's, or the sites' mean, weighted by the rows that each has scored; None: not measured.

    Args:
        scores: the metrics of an evaluation, by site or "server".
        metric: name of the score.
        here: whether the server's score counts.
    """
    if here:
        value = scores.get(SERVER, {}).get(metric)
        return value if value is not None and math.isfinite(value) else None
    rows = "generated" if SCORES[metric].of == ANSWERS else "examples"
    told = [(one.get(metric), one.get(rows) or 0.0) for who, one in scores.items() if who != SERVER]
    pairs = [(value, count) for value, count in told if value is not None and count > 0]
    total = math.fsum(count for _, count in pairs)
    mean = math.fsum(value * count for value, count in pairs) / total if total else math.nan
    return mean if math.isfinite(mean) else None
