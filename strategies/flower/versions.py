"""The server's record of how the global state came about, from which each client is sent what it lacks."""

from collections.abc import Iterable

from common.protocol.digest import tensors_digest
from common.protocol.factors import num_bytes
from common.protocol.tensors import Tensors
from common.protocol.versions import Step
from strategies.rule import Outcome


class Versions:
    """The latest state, its name, and the last steps that led to it.

    Steps are kept only as long as all of them together are smaller than the state, which is when it pays to send them;
    so they never take more memory than one state.

    Args:
        state: the latest state; the first one, when nothing else is given.
        first: name of the first version, which whoever has the base model holds.
        latest: name of the latest.
        steps: the last steps that led to it, each with the version that it leads from.
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

    def advance(self, outcome: Outcome) -> None:
        """Take a round's result as the latest version."""
        self.state = outcome.state
        if outcome.step is None:
            self.latest, self.steps = tensors_digest(outcome.state), []
            return
        self.steps.append((self.latest, outcome.step))
        self.latest = outcome.step.next(self.latest)
        while sum(step.num_bytes for _, step in self.steps) >= num_bytes(self.state.values()):
            del self.steps[0]

    def since(self, version: str) -> list[Step] | None:
        """The steps from ``version`` to the latest; None when they are not known, or larger than the state."""
        if version == self.latest:
            return []
        for position, (start, _) in enumerate(self.steps):
            if start == version:
                return [step for _, step in self.steps[position:]]
        return None
