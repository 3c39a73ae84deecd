"""The federation's trained weights as a site holds them: which version, and how it came about."""

from collections.abc import Callable

from client.reach import Reach
from common.errors import StaleStateError, WireError
from common.protocol.digest import tensors_digest
from common.protocol.factors import Exchange, most_bytes, num_bytes, unpack
from common.protocol.tensors import Tensors
from common.protocol.versions import Step


class Weights:
    """Trained base weights in float32 on the CPU, and the steps by which they came from the base model.

    Args:
        base: the base model's, by name.
        exchange: how factors travel, by round.

    Attributes:
        tensors: the weights of ``version``.
        version: its name (see ``common.protocol.versions``).
        first: name of the base model's.
        after: the number of the round that ``version`` is the result of, 0 of the base model.
        most: bytes by name that the tensors of a step may have.
        steps: what leads from ``first`` to ``version``; None when that is not known, or larger than the weights.
    """

    def __init__(self, base: Tensors, exchange: Callable[[int], Exchange]) -> None:
        self.tensors = base
        self.first = self.version = tensors_digest(base)
        self.after = 0
        self.most = most_bytes(base)
        self._like = {name: tensor.to("meta") for name, tensor in base.items()}  # shapes and types alone
        self.steps: list[Step] | None = []
        self._exchange = exchange

    def follow(self, steps: list[Step], since: str, version: str, reach: Reach | None = None) -> None:
        """Take steps that lead from ``since`` to ``version``; nothing happens when that is held already.

        Args:
            steps: one for each round that made a version.
            since: where they lead from.
            version: where they lead to.
            reach: how far each of them may go; None: anywhere.

        Raises:
            StaleStateError: another version than ``since`` is held, or the steps lead elsewhere.
            WireError: a step does not fit the weights, or goes further than a round can.
        """
        if self.version == version:
            return
        reached = since
        for step in steps:
            reached = step.next(reached)
        if self.version != since or reached != version:
            raise StaleStateError(
                f"this site holds version {self.version[:16]} of the weights; the steps lead from {since[:16]} to "
                f"{reached[:16]}, {version[:16]} was meant; send the weights in full"
            )
        tensors, after = self.tensors, self.after
        for step in steps:
            if reach is not None:
                self._check(step, tensors, after, reach)
            tensors, after = step.apply(tensors, self._exchange(step.server_round)), step.server_round
        self.tensors, self.version, self.after = tensors, version, after
        if self.steps is not None:
            self.steps = self.steps + steps
            if sum(step.num_bytes for step in self.steps) >= num_bytes(tensors.values()):
                self.steps = None

    def _check(self, step: Step, tensors: Tensors, after: int, reach: Reach) -> None:
        if not after < step.server_round <= reach.federation.rounds:
            allowed = f"{after + 1} to {reach.federation.rounds}"
            raise WireError(f"a step of round {step.server_round}; allowed: {allowed}")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        whole, factors = unpack(step.tensors, shapes, self._exchange(step.server_round))
        reach.check_like(whole, self._like)
        reach.check({**whole, **factors}, tensors, 1, after == 0)

    def replace(self, tensors: Tensors, version: str, after: int = 0) -> None:
        """Take weights that came whole, the result of round ``after``."""
        self.tensors, self.version = {name: tensor.float() for name, tensor in tensors.items()}, version
        self.after = after
        self.steps = [] if version == self.first else None
