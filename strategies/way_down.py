"""A way down that does not grow with the number of sites: what a round does not send waits at the server.

With own bases the mean of N updates has up to N r J directions, and so has what goes down. With ``downlink_rank`` q the
server's state S is the published state T, which all sites hold and train from, plus E, which waits. With D the mean
change of a round's updates, all relative to T:

    S' = S + D  =  T + E + D
    T' = c T + Q,   where Q is about the best rank-q part of X = E + D - (c - 1) T
    E' = X - Q,     so T' + E' = S': nothing is lost, whatever Q is (error feedback, arXiv 1901.09847)

c is one number, which costs nothing to send: the mean of the sites' weight decay, or, where the mean came dense, the
change's share along T. Q is what receivers make of the sent factors: what rounding on the wire loses waits, too. When X
has no more than q columns, or rank-q factors are no smaller than the weight, all of X is sent, as without the option.
The last round sends all: the finished model is S.

E is kept in factors while these are smaller than the weight, then dense: at most one float32 copy of the state.
Tensors that are not projected (a head) are sent whole.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from common.linalg.lowrank import Term, truncated_svd
from common.linalg.range_finder import leading_basis
from common.linalg.remembered import square_norm
from common.linalg.subspace import generator_for, projects_right
from common.model.families import in_head
from common.protocol.factors import Exchange, Factors, Shape, pack, rounding_error, unpack
from common.protocol.tensors import Tensors
from common.protocol.versions import Step
from strategies.combine.weighted_mean import Changed, change_square, layer_group
from strategies.rule import Averaging, RoundResult, Rule, Update
from strategies.server_optimizer import ServerOptimizer

_LEFT, _RIGHT = "/left", "/right"  # ends of the names under which factors wait
_Pair = tuple[Tensor, Tensor]  # left (m, R) and right (R, n)


class WayDown:
    """Publishes the state in steps of bounded rank.

    Args:
        rank: q; "auto": for each weight, the most directions in an update of the round; all when an update came dense.
        waiting: E, from a checkpoint.

    Attributes:
        waiting: E by the weights' names: ``name`` (m, n), or ``name/left`` (m, R) and ``name/right`` (R, n); in every
            checkpoint.
    """

    def __init__(self, rank: int | Literal["auto"], waiting: Mapping[str, Tensor] | None = None) -> None:
        self._rank = rank
        self._widest: dict[str, float] = {}  # most directions in an update, by weight
        self._last: tuple[Step, Exchange] | None = None
        self.waiting: Tensors = dict(waiting or {})

    def aggregate(
        self,
        rule: Rule,
        optimizer: ServerOptimizer | None,
        server_round: int,
        state: Mapping[str, Tensor],
        updates: Iterator[Update],
    ) -> RoundResult:
        """A round's result: the mean, through the server optimizer if there is one, and published by ``step``."""
        assert isinstance(rule, Averaging)  # noqa: S101 - no other rule has a ``downlink_rank``
        updates, exchange = self.watch(updates), rule.exchange(server_round)
        if optimizer is None:
            return self.step(server_round, state, *rule.average(server_round, state, updates), exchange)
        active = rule.active(server_round, state)
        moved = optimizer.step(active, state, rule.aggregate(server_round, state, updates))
        return self.step(server_round, state, {n: moved.state[n] for n in active}, moved.diagnostics, exchange)

    def watch(self, updates: Iterator[Update]) -> Iterator[Update]:
        """The round's updates; their directions are counted on the way."""
        self._widest = {}
        for update in updates:
            sizes = {name: sum(len(right) for _, right in one.terms) for name, one in update.factors.items()}
            for name, size in (dict.fromkeys(update.tensors, math.inf) | sizes).items():
                self._widest[name] = max(1, size, self._widest.get(name, 1))
            yield update
            del update  # decision 008: else it lives on while the next is read

    def step(
        self,
        server_round: int,
        state: Mapping[str, Tensor],
        means: Changed,
        diagnostics: dict[str, float],
        exchange: Exchange,
    ) -> RoundResult:
        """Make the next published state of the round's mean; what is left of it waits.

        Args:
            server_round: the round.
            state: T, which the sites started from.
            means: the mean, or the server optimizer's result, by name: dense tensors, or changes in factors.
            diagnostics: the round's diagnostics; ``waiting/<layer group>``, the norm of what waits relative to the
                round's change (weight decay aside), and ``wire-error/mean`` are added.
            exchange: the form in which factors are sent.
        """
        tensors: Tensors = {}
        factored: dict[str, Factors] = {}
        moved: dict[str, float] = {}  # squared norms, by layer group
        waits: dict[str, float] = {}
        for name, mean in means.items():
            sent, factors = self._publish(server_round, name, mean, state[name], exchange)
            tensors |= sent
            if factors is not None:
                factored[name] = factors
            if self._most(name, state[name]) is not None:
                group, change = layer_group(name), replace(mean, decay=1.0) if isinstance(mean, Factors) else mean
                moved[group] = moved.get(group, 0.0) + change_square(change, state[name])
                waits[group] = waits.get(group, 0.0) + _square(self._waits(name), state[name])
        told = {f"waiting/{group}": math.sqrt(waits[group] / moved[group]) for group in moved if moved[group] > 0}
        if exchange.precision != "float32" and factored:
            shapes = {name: tuple(state[name].shape) for name in factored}
            told["wire-error/mean"] = rounding_error(factored, shapes, exchange)
        step = Step(server_round, tensors)
        self._last = step, exchange
        return RoundResult(step.apply(state, exchange), {**diagnostics, **told}, step)

    def settle(self, before: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> RoundResult:
        """Make the last round's step anew, to S: afterwards nothing waits.

        Args:
            before: the state that the last round started from.
            state: T, the state that ``step`` has made of it.
        """
        assert self._last is not None  # noqa: S101 - the caller has called ``step``
        step, exchange = self._last
        shapes = {name: tuple(tensor.shape) for name, tensor in before.items()}
        tensors, factored = unpack(step.tensors, shapes, exchange)
        for name, change in factored.items():
            kept = self._waits(name)
            if isinstance(kept, Tensor):
                tensors[name] = state[name] + kept
            else:
                terms = change.terms if kept is None else [*change.terms, kept]
                tensors |= pack(name, Factors(change.decay, terms), before[name], exchange)
        self.waiting, settled = {}, Step(step.server_round, tensors)
        return RoundResult(settled.apply(before, exchange), {}, settled)

    def _publish(
        self, server_round: int, name: str, mean: Tensor | Factors, start: Tensor, exchange: Exchange
    ) -> tuple[Tensors, Factors | None]:
        """The tensors to send for a weight, and the factors that they are made of; the rest is put to what waits."""
        kept, most = self._waits(name), self._most(name, start)
        if kept is None and (most is None or (isinstance(mean, Factors) and _width(mean) <= most)):
            sent = Step.of(server_round, {name: mean}, {name: start}, exchange).tensors
            return sent, mean if isinstance(mean, Factors) else None
        for key in (name, name + _LEFT, name + _RIGHT):
            self.waiting.pop(key, None)
        decay, x = _known(mean, kept, start)
        if isinstance(x, Tensor) and most is None:
            return {name: start * decay + x}, None
        if not isinstance(x, Tensor) and (most is None or len(x[1]) <= most):
            whole = Factors(decay, [x])
            return pack(name, whole, start, exchange), whole
        assert most is not None  # noqa: S101 - as asked above
        leading = Factors(decay, [_leading(x, most, generator_for("way down", server_round, name), name)])
        sent = pack(name, leading, start, exchange)
        (read,) = unpack(sent, {name: tuple(start.shape)}, exchange)[1].values()
        self.waiting |= _rest(name, x, read.terms[0])
        return sent, leading

    def _most(self, name: str, start: Tensor) -> int | None:
        """Most directions that are sent of a weight (m, n); None: all, since factors would not be smaller."""
        most = self._widest[name] if self._rank == "auto" else self._rank
        if start.ndim != 2 or in_head(name) or not _smaller(most, tuple(start.shape)):
            return None
        return int(most)

    def _waits(self, name: str) -> Tensor | _Pair | None:
        """The part of a weight that waits."""
        if name + _LEFT in self.waiting:
            return self.waiting[name + _LEFT], self.waiting[name + _RIGHT]
        return self.waiting.get(name)


def _smaller(columns: float, shape: Shape) -> bool:
    """Whether factors with so many columns are smaller than a weight."""
    return columns * sum(shape) < math.prod(shape)


def _width(factors: Factors) -> int:
    return sum(len(right) for _, right in factors.terms)


def _known(mean: Tensor | Factors, kept: Tensor | _Pair | None, start: Tensor) -> tuple[float, Tensor | _Pair]:
    """c, and X = E + D - (c - 1) T: factors while they are smaller than the weight."""
    pairs = [kept] if isinstance(kept, tuple) else []
    if isinstance(mean, Factors):
        stacked = Factors(1.0, [*pairs, *mean.terms])
        if not isinstance(kept, Tensor) and _smaller(_width(stacked), tuple(start.shape)):
            return mean.decay, stacked.stacked(tuple(start.shape))
        decay, x = mean.decay, torch.zeros_like(start) if not isinstance(kept, Tensor) else kept.clone()
        return decay, x.addmm_(*stacked.stacked(tuple(start.shape)))
    x, square = mean.to(torch.float32) - start, square_norm(start)
    along = float(torch.linalg.vecdot(x, start).sum(dtype=torch.float64)) / square if square > 0 else 0.0
    x.sub_(start, alpha=along)
    if kept is not None:
        x = x.add_(kept) if isinstance(kept, Tensor) else x.addmm_(*kept)
    return 1.0 + along, x


def _leading(x: Tensor | _Pair, rank: int, generator: torch.Generator, name: str) -> _Pair:
    """About the best approximation of X of this rank: its projection on the leading singular vectors."""
    if isinstance(x, Tensor):
        basis = leading_basis(x, rank, None, generator)
        return (x @ basis.T, basis) if projects_right(x.shape) else (basis, basis.T @ x)
    left, right = x
    found = truncated_svd([Term(1.0, left, right)], rank, name)
    if len(left) >= right.shape[1]:
        return left @ (right @ found.vt.T), found.vt
    return found.u, (found.u.T @ left) @ right


def _rest(name: str, x: Tensor | _Pair, sent: _Pair) -> Tensors:
    """X without the sent factors, as it waits."""
    if isinstance(x, Tensor):
        return {name: x.addmm_(*sent, alpha=-1)}
    left, right = torch.cat([x[0], -sent[0]], 1), torch.cat([x[1], sent[1]])
    if _smaller(len(right), (len(left), right.shape[1])):
        return {name + _LEFT: left, name + _RIGHT: right}
    return {name: left @ right}


def _square(kept: Tensor | _Pair | None, start: Tensor) -> float:
    """Squared norm of what waits of a weight."""
    if kept is None:
        return 0.0
    return square_norm(kept) if isinstance(kept, Tensor) else Factors(1.0, [kept]).square(start)
