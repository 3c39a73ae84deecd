"""Server optimizers: the averaged change of a round is taken for a gradient (arXiv 2003.00295, algorithms 1 and 2).

With D = average - state, in float32, for every tensor that the round trained:

- FedAvgM (arXiv 1909.06335): M <- momentum M + D, state <- state + learning_rate M;
- FedAdam: M <- beta1 M + (1 - beta1) D, V <- beta2 V + (1 - beta2) D^2, from M = 0 and V = tau^2,
  state <- state + learning_rate M / (sqrt(V) + tau), without correction of the bias, as in the paper.

Tensors that rest in a round (RoLoRA's other factor) keep their moments. A server optimizer makes a low-rank average
dense, so FedFTG's weights go down whole, in every round. It costs one (FedAvgM) or two float32 copies of the state.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from common.config.aggregation import FedAvgMConfig, ServerOptimizerConfig
from strategies.rule import Outcome, Tensors


class ServerOptimizer:
    """The step that the server takes in each round.

    Args:
        config: which, and its settings.

    Attributes:
        moments: all that it remembers, the first and the second in float32 by name; part of a checkpoint.
    """

    def __init__(self, config: ServerOptimizerConfig) -> None:
        self._config = config
        self.moments: dict[str, Tensors] = {}

    def step(self, active: Iterable[str], state: Mapping[str, Tensor], outcome: Outcome) -> Outcome:
        """The outcome of a round with this optimizer's step in place of the averaged change.

        Args:
            active: names of the tensors that the round trained.
            state: that the clients started from.
            outcome: of plain averaging.
        """
        after = dict(outcome.state)
        for name in active:
            start = state[name].to(torch.float32)
            moved = self._moved(name, outcome.state[name].to(torch.float32) - start)
            after[name] = (start + moved).to(state[name].dtype)
        return Outcome(after, outcome.diagnostics)

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
