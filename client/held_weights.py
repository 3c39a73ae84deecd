"""The federation's trained weights as a site holds them: which version, and how it came about."""

from collections.abc import Callable

from common.errors import StaleStateError
from common.protocol.digest import tensors_digest
from common.protocol.factors import Exchange, num_bytes
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
        steps: what leads from ``first`` to ``version``; None when that is not known, or larger than the weights.
    """

    def __init__(self, base: Tensors, exchange: Callable[[int], Exchange]) -> None:
        self.tensors = base
        self.first = self.version = tensors_digest(base)
        self.steps: list[Step] | None = []
        self._exchange = exchange

    def follow(self, steps: list[Step], since: str, version: str) -> None:
        """Take steps that lead from ``since`` to ``version``; nothing happens when that is held already.

        Raises:
            StaleStateError: another version than ``since`` is held, or the steps lead elsewhere.
            WireError: a step does not fit the weights.
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
        tensors = self.tensors
        for step in steps:
            tensors = step.apply(tensors, self._exchange(step.server_round))
        self.tensors, self.version = tensors, version
        if self.steps is not None:
            self.steps = self.steps + steps
            if sum(step.num_bytes for step in self.steps) >= num_bytes(tensors.values()):
                self.steps = None

    def replace(self, tensors: Tensors, version: str) -> None:
        """Take weights that came whole."""
        self.tensors, self.version = {name: tensor.float() for name, tensor in tensors.items()}, version
        self.steps = [] if version == self.first else None
