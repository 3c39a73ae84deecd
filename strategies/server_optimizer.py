"""Server optimizers: the averaged change of a round serves as a gradient (arXiv 2003.00295, algorithms 1 and 2).

With D = average - state, in float32, for every tensor that the round trained:

- FedAvgM (arXiv 1909.06335): M <- momentum M + D, state <- state + learning_rate M;
- FedAdam: M <- beta1 M + (1 - beta1) D, V <- beta2 V + (1 - beta2) D^2, from M = 0 and V = tau^2,
  state <- state + learning_rate M / (sqrt(V) + tau), without bias correction, as in the paper.

Tensors that are frozen in a round (RoLoRA's other factor) keep their moments. A server optimizer makes a low-rank
average dense, so under FedFTG the server sends dense weights in every round. The moments take one (FedAvgM) or two
(FedAdam) float32 copies of the state.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from common.config.aggregation import FedAvgMConfig, ServerOptimizerConfig
from strategies.rule import RoundResult, Tensors


class ServerOptimizer:
    """The server's optimizer: FedAvgM or FedAdam.

    Args:
        config: the federation file's server_optimizer section.

    Attributes:
        moments: the optimizer's state: "first" and "second" moments, each float32 by tensor name; in every checkpoint.
    """

    def __init__(self, config: ServerOptimizerConfig) -> None:
        self._config = config
        self.moments: dict[str, Tensors] = {}

    def step(self, active: Iterable[str], state: Mapping[str, Tensor], outcome: RoundResult) -> RoundResult:
        """Apply one optimizer step to the averaged change.

        Args:
            active: names of the tensors that the round trained.
            state: the state that the clients started from.
            outcome: the round's result by aggregation alone.

        Returns:
            The result whose state the optimizer stepped to, with the same diagnostics and without a ``Step``.
        """
        after = dict(outcome.state)
        for name in active:
            start = state[name].to(torch.float32)
            moved = self._moved(name, outcome.state[name].to(torch.float32) - start)
            after[name] = (start + moved).to(state[name].dtype)
        return RoundResult(after, outcome.diagnostics)

    def _moved(self, name: str, change: Tensor) -> Tensor:
        config = self._config
        firsts = self.moments.setdefault("first", {})
        first = firsts.get(name, torch.zeros_like(change))
        if isinstance(config, FedAvgMConfig):
            firsts[name] = first = first * config.momentum + change
            return first * config.learning_rate
        seconds = self.moments.setdefault("second", {})
        second = seconds.get(name, torch.full_like(change, config.tau**2))
        firsts[name] = first = torch.lerp(change, first, config.beta1)
        seconds[name] = second = torch.lerp(change.square(), second, config.beta2)
        return first / (second.sqrt() + config.tau) * config.learning_rate
