"""The federation's trained weights at a site: the weights, their version, and the steps that led to it."""

from collections.abc import Callable

from client.reach import Reach
from common.errors import StaleStateError, WireError
from common.protocol.digest import tensors_digest
from common.protocol.factors import Exchange, most_bytes, num_bytes
from common.protocol.tensors import Tensors
from common.protocol.versions import Step


class Weights:
    """Trained base weights in float32 on the CPU, and the steps from the base model to them (decision 005).

    Args:
        base: the base model's weights by name.
        exchange: gives the form of a round's factors.

    Attributes:
        tensors: the weights of ``version``.
        version: name of the held version (see ``common.protocol.versions``).
        first: name of the base model's version.
        after: the round that made ``version``; 0 for the base model.
        proven: the name tells what is held: by steps from ``first``, or because it is the digest of weights that were
            sent whole. Else the server's word is believed.
        most: most bytes of each tensor in a step, by name.
        steps: the steps from ``first`` to ``version``; None when they are unknown, or larger than the weights.
    """

    def __init__(self, base: Tensors, exchange: Callable[[int], Exchange]) -> None:
        self.tensors = base
        self.first = self.version = tensors_digest(base)
        self.after, self.proven = 0, True
        self.most = most_bytes(base)
        self._like = {name: tensor.to("meta") for name, tensor in base.items()}  # shapes and types alone
        self.steps: list[Step] | None = []
        self._exchange = exchange

    def follow(self, steps: list[Step], since: str, version: str, reach: Reach | None = None) -> None:
        """Apply steps that lead from ``since`` to ``version``; does nothing when ``version`` is held already.

        Args:
            steps: one step for each round that made a version.
            since: name of the version before the first step.
            version: name of the version after the last step.
            reach: computes the bound on each step; None: no bound.

        Raises:
            StaleStateError: the held version is not ``since``, or the steps do not lead to ``version``.
            WireError: a step does not match the weights' shapes, or is larger than a round's training can make.
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
        whole, factors = step.changes(shapes, self._exchange(step.server_round))
        reach.check_like(whole, self._like)
        reach.check({**whole, **factors}, tensors, reach.rounds(step.server_round - 1, step.server_round), after == 0)

    def replace(self, tensors: Tensors, version: str, after: int = 0) -> None:
        """Replace the weights by dense ones, the result of round ``after``."""
        self.tensors, self.version = {name: tensor.float() for name, tensor in tensors.items()}, version
        self.after, self.proven = after, version == tensors_digest(tensors)
        self.steps = [] if version == self.first else None
