"""Which version of the trained weights somebody holds, and the steps that lead from one version to the next.

The first version is named by the digest of its tensors: whoever has the base model holds it. Every later one is named
by the version before it and by the digest of the step that was taken, so two machines that name the same version have
applied the same steps to the same start, in the same order.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from common.protocol.digest import tensors_digest
from common.protocol.factors import Exchange, Factors, num_bytes, pack, unpack


@dataclass(frozen=True)
class Step:
    """What makes a version of the one before.

    Attributes:
        server_round: the round that made it.
        tensors: in the form that travels (``common.protocol.factors.pack``).
    """

    server_round: int
    tensors: dict[str, Tensor]

    @classmethod
    def of(
        cls, server_round: int, means: Mapping[str, Tensor | Factors], state: Mapping[str, Tensor], exchange: Exchange
    ) -> "Step":
        """The step that takes ``state`` to ``means``: whole tensors, or changes in factors."""
        tensors: dict[str, Tensor] = {}
        for name, value in means.items():
            tensors |= pack(name, value, state[name], exchange) if isinstance(value, Factors) else {name: value}
        return cls(server_round, tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire."""
        return num_bytes(self.tensors.values())

    def next(self, version: str) -> str:
        """The name of the version that this step makes of ``version``."""
        return hashlib.sha256(f"{version} {self.server_round} {tensors_digest(self.tensors)}".encode()).hexdigest()

    def apply(self, state: Mapping[str, Tensor], exchange: Exchange) -> dict[str, Tensor]:
        """The next state.

        Raises:
            WireError: the step does not fit the state.
        """
        whole, factors = unpack(self.tensors, {name: tuple(tensor.shape) for name, tensor in state.items()}, exchange)
        whole = {name: tensor.to(state[name].dtype) if name in state else tensor for name, tensor in whole.items()}
        made = {name: change.apply(state[name]).to(state[name].dtype) for name, change in factors.items()}
        return {**state, **whole, **made}
