"""Versions of the trained weights, and the steps from one version to the next (decision 005).

The name of the first version is the digest of its tensors; every machine with the base model holds the first version.
The name of a later version is a hash of the previous version's name and of the step's digest, so two machines that hold
a version of the same name have applied the same steps, in the same order, to the same start.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from common.protocol.digest import tensors_digest
from common.protocol.factors import Exchange, Factors, Shape, num_bytes, pack, unpack


@dataclass(frozen=True)
class Step:
    """The change from one version of the state to the next.

    Attributes:
        server_round: the round that made the step.
        tensors: the step in the form to send (``common.protocol.factors.pack``).

    Example:
        >>> import torch
        >>> state = {"w": torch.zeros(4, 3)}
        >>> mean = {"w": Factors(1.0, [(torch.ones(4, 1), torch.ones(1, 3))])}  # the clients' mean change, rank 1
        >>> step = Step.of(1, mean, state, Exchange())
        >>> sorted(step.tensors)
        ['w/decay', 'w/left', 'w/right']
        >>> torch.equal(step.apply(state, Exchange())["w"], torch.ones(4, 3))
        True
    """

    server_round: int
    tensors: dict[str, Tensor]

    @classmethod
    def of(
        cls, server_round: int, means: Mapping[str, Tensor | Factors], state: Mapping[str, Tensor], exchange: Exchange
    ) -> "Step":
        """Make the step from ``state`` to ``means``, which holds dense tensors and changes in factors."""
        tensors: dict[str, Tensor] = {}
        for name, value in means.items():
            tensors |= pack(name, value, state[name], exchange) if isinstance(value, Factors) else {name: value}
        return cls(server_round, tensors)

    @property
    def num_bytes(self) -> int:
        """Size of the step's tensors, in bytes."""
        return num_bytes(self.tensors.values())

    def next(self, version: str) -> str:
        """The name of the version after this step, when ``version`` names the version before."""
        return hashlib.sha256(f"{version} {self.server_round} {tensors_digest(self.tensors)}".encode()).hexdigest()

    def changes(self, shapes: Mapping[str, Shape], exchange: Exchange) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """The step's dense tensors, and its changes in factors, for weights of these shapes.

        Where sites share a basis, a step that updates of several rounds have made brings their bases.

        Raises:
            WireError: the step's factors do not match the shapes.
        """
        return unpack(self.tensors, shapes, exchange, any_basis=True)

    def apply(self, state: Mapping[str, Tensor], exchange: Exchange) -> dict[str, Tensor]:
        """The next state, in the dtypes of ``state``.

        Raises:
            WireError: the step's factors do not match the state's shapes.
        """
        whole, factors = self.changes({name: tuple(tensor.shape) for name, tensor in state.items()}, exchange)
        whole = {name: tensor.to(state[name].dtype) if name in state else tensor for name, tensor in whole.items()}
        made = {name: change.apply(state[name]).to(state[name].dtype) for name, change in factors.items()}
        return {**state, **whole, **made}
