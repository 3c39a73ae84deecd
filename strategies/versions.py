"""The server's record of how the global state came about, from which each client is sent what it lacks."""

from torch import Tensor

from common.digest import tensors_digest
from common.factors import num_bytes
from common.versions import Step
from strategies.rule import Outcome

Tensors = dict[str, Tensor]


class Versions:
    """The latest state, its name, and the last steps that led to it.

    Steps are kept only as long as all of them together are smaller than the state, which is when it pays to send them;
    so they never take more memory than one state.

    Args:
        state: the first state.

    Attributes:
        first: name of the first version, which whoever has the base model holds.
        latest: name of the latest.
        state: the latest state.
    """

    def __init__(self, state: Tensors) -> None:
        self.state = state
        self.first = self.latest = tensors_digest(state)
        self._steps: list[tuple[str, Step]] = []  # (the version that it leads from, step)

    def advance(self, outcome: Outcome) -> None:
        """Take a round's result as the latest version."""
        self.state = outcome.state
        if outcome.step is None:
            self.latest, self._steps = tensors_digest(outcome.state), []
            return
        self._steps.append((self.latest, outcome.step))
        self.latest = outcome.step.next(self.latest)
        while sum(step.num_bytes for _, step in self._steps) >= num_bytes(self.state.values()):
            del self._steps[0]

    def since(self, version: str) -> list[Step] | None:
        """The steps from ``version`` to the latest; None when they are not known, or larger than the state."""
        if version == self.latest:
            return []
        for position, (start, _) in enumerate(self._steps):
            if start == version:
                return [step for _, step in self._steps[position:]]
        return None
