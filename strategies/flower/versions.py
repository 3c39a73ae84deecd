"""The server's record of the global state's versions, and of the steps between them that clients are sent."""

from collections.abc import Iterable

from common.protocol.digest import tensors_digest
from common.protocol.factors import num_bytes
from common.protocol.tensors import Tensors
from common.protocol.versions import Step
from strategies.rule import RoundResult


class Versions:
    """The latest state, its version's name, and the last steps that led to the latest state.

    Steps are kept only while all kept steps together are smaller than the state: beyond that, sending the state costs
    less (decision 005). So steps never take more memory than one state. With masked sums all are kept, because a site
    cannot check weights that come whole (decision 033).

    Args:
        state: the latest state; without the other arguments, the first state.
        first: name of the first version, which every client with the base model holds.
        latest: name of the latest version.
        steps: the last steps that led to the latest state, as pairs (name of the version that a step starts from,
            step).

    Attributes:
        keep_all: whether steps are kept however large they are.
    """

    def __init__(
        self,
        state: Tensors,
        first: str | None = None,
        latest: str | None = None,
        steps: Iterable[tuple[str, Step]] = (),
    ) -> None:
        self.state = state
        self.first = first or tensors_digest(state)
        self.latest = latest or self.first
        self.steps = list(steps)
        self._before = self.latest  # the version before the latest
        self.keep_all = False

    def advance(self, outcome: RoundResult) -> None:
        """Make a round's result the latest version."""
        self._before = self.latest
        self.state = outcome.state
        if outcome.step is None:
            self.latest, self.steps = tensors_digest(outcome.state), []
            return
        self.steps.append((self.latest, outcome.step))
        self.latest = outcome.step.next(self.latest)
        while not self.keep_all and sum(step.num_bytes for _, step in self.steps) >= num_bytes(self.state.values()):
            del self.steps[0]

    def amend(self, outcome: RoundResult) -> None:
        """Put a result in the place of the last round's, which nobody was sent yet."""
        self.latest = self._before
        if self.steps and self.steps[-1][0] == self._before:
            del self.steps[-1]
        self.advance(outcome)

    def since(self, version: str) -> list[Step] | None:
        """The steps from ``version`` to the latest; None when the steps from there are not kept."""
        if version == self.latest:
            return []
        for position, (start, _) in enumerate(self.steps):
            if start == version:
                return [step for _, step in self.steps[position:]]
        return None
