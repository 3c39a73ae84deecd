"""The round loop of ``cohort.mode`` buffered: every connected site trains all the time (decision 040)."""

from server.buffered.earlier import EarlierStates
from server.buffered.round import GROUP, BufferedRound
from server.loop.checkpoint import Checkpoint
from server.loop.round import Round
from server.loop.rounds import RoundLoop
from strategies.rule import Tensors

_EARLIER = "earlier"  # folder in the run's folder


class BufferedLoop(RoundLoop):
    """Runs a federation whose slow sites go on while the others begin the next round; see ``RoundLoop``."""

    def run(self, state: Tensors, resumed: Checkpoint | None = None) -> Tensors:
        """See ``RoundLoop.run``. Work that is open after the last round is given up: its sites get the model."""
        self._sent: dict[int, int] = {}
        self._earlier = EarlierStates(self._folder.path / _EARLIER)
        try:
            final = super().run(state, resumed)
            self._in_flight.forget(GROUP)
        finally:  # each is as large as a checkpoint, and a resumed run needs none
            self._earlier.clear()
        return final

    def _round(self, number: int, state: Tensors, *, evaluate: bool, deadline: float) -> Round:
        shared = self._sent, self._earlier
        return BufferedRound(self._parts, number, state, *shared, evaluate=evaluate, deadline=deadline)

    def _cohort(self, number: int) -> list[int]:
        """The sites that have no work."""
        return self._idle(super()._cohort(number))

    def _to_evaluate(self) -> list[int]:
        """The sites that have no work: the others would answer after their training."""
        return self._idle(super()._to_evaluate())

    def _idle(self, nodes: list[int]) -> list[int]:
        """Those nodes whose sites have no work, under whatever node."""
        client = self._strategy.client
        busy = {client(node_id).name for node_id in self._in_flight.waiting(GROUP)}
        return [node_id for node_id in nodes if client(node_id).name not in busy]
