"""FlexLoRA: the server averages the products B A and factors the average again, for clients of different rank.

Source: arXiv 2402.11505. Per layer, dW = sum_k p_k s_k B_k A_k with every client's own scaling s_k. The state holds
factors of the best approximation of dW of rank R; a client of rank r <= R receives the best approximation of rank r, in
the client's scaling. dW is never formed (``common.linalg.lowrank``, decision 004).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from common.config.strategy import FlexLoRAConfig
from common.errors import AggregationError
from common.linalg.lowrank import Term, TruncatedSVD, truncated_svd
from common.model.adapters import scaling
from strategies.combine.stale import added
from strategies.combine.weighted_mean import Drift, WeightedMean, applied, layer_group
from strategies.lora_names import LORA_A, LORA_B, pairs
from strategies.rule import RoundResult, Rule, Setup, Tensors, Update

ROUNDING = 1e-9  # a change whose squared norm is below this share of the products' squared norms counts as zero


class FlexLoRARule(Rule):
    """Averages the products s_k B_k A_k; a trained classification head is averaged entry by entry.

    Adds diagnostics per layer group: ``truncation-loss`` (share of the energy of dW that rank R leaves out),
    ``numerical-rank`` and ``stable-rank`` of dW (the largest of the group). ``client-norm`` and ``client-cosine`` are
    computed from the clients' changes of the product, s_k B_k A_k - s B A.
    """

    section: ClassVar = FlexLoRAConfig

    def __init__(
        self,
        lora_alpha: float | None = None,
        *,
        rslora: bool = False,
        max_rank: int | None = None,
    ) -> None:
        """Make the rule.

        Args:
            lora_alpha: LoRA alpha of the state, and of clients that report none. None: the state holds B A = dW, and
                clients must report an alpha unless all have the state's rank.
            rslora: scaling lora_alpha / sqrt(rank) instead of lora_alpha / rank.
            max_rank: the largest rank of a client; None: the layers' smaller sides. If a client's rank is larger than
                the state's, the state's rank grows.
        """
        self.lora_alpha = lora_alpha
        self.max_rank = max_rank
        self._rslora = rslora

    @classmethod
    def from_section(cls, config: FlexLoRAConfig, setup: Setup) -> Self:
        """See ``Rule.from_section``."""
        del setup
        return cls(config.lora_alpha, rslora=config.rslora, max_rank=config.rank)

    def state_for(self, state: Mapping[str, Tensor], rank: int | None, lora_alpha: float | None) -> Tensors:
        """The state's best approximation of rank ``rank``, in the scaling that a client of this rank and alpha uses."""
        fitted = dict(state)
        for a, b in pairs(state):
            whole = state[a].shape[0]
            own = min(rank or whole, whole)
            ratio = self._scaling(self.lora_alpha, whole) / self._scaling(lora_alpha or self.lora_alpha, own)
            if own == whole and ratio == 1.0:
                continue
            left, right = state[b][:, :own], state[a][:own]
            fitted[a], fitted[b] = right.clone(), (left.float() * ratio).to(left.dtype)
        return fitted

    def aggregate(self, server_round: int, state: Mapping[str, Tensor], updates: Iterator[Update]) -> RoundResult:
        """See ``Rule.aggregate``."""
        del server_round
        layers = pairs(state)
        rest = {name: t for name, t in state.items() if not name.endswith((LORA_A, LORA_B))}
        mean, drift = WeightedMean(rest), Drift(rest)
        kept: list[Update] = []
        for update in updates:
            kept.append(update)
            mean.fold({name: update.tensors[name] for name in rest}, update.num_examples)
            drift.fold({name: update.tensors[name] for name in rest})
        result = {**state, **applied(mean.means(), rest)}
        groups: dict[str, _Group] = {}
        for a, b in layers:
            terms = self._terms(kept, state, a, b)
            rank = max([len(state[a]), *(len(update.tensors[a]) for update in kept if not update.age)])
            svd = truncated_svd(terms, rank, a.removesuffix(LORA_A))
            result[a], result[b] = split(svd, state[a], self._scaling(self.lora_alpha, rank))
            groups.setdefault(layer_group(a), _Group()).add(svd)
        found = drift.diagnostics()
        for name, group in groups.items():
            found |= {f"{key}/{name}": value for key, value in group.diagnostics().items()}
        return RoundResult(result, found)

    def carried_over(
        self, update: Update, start: Mapping[str, Tensor], state: Mapping[str, Tensor], share: float
    ) -> Update:
        """See ``Rule.carried_over``. The change is one of the product, which has a meaning beside any factors.

        The update's new factors, of three times the rank, have the product s B A + share (s_k B_k A_k - s B_0 A_0):
        [share s_k B_k, -share s B_0, s B] and [A_k; A_0; A], with B divided by the scaling of their rank.
        """
        rest = {name: t for name, t in update.tensors.items() if not name.endswith((LORA_A, LORA_B))}
        tensors, alpha = added(rest, start, state, share), update.lora_alpha or self.lora_alpha
        for a, b in pairs(state):
            own, before, now = update.tensors, start, state
            parts = [
                (own[b].float() * (share * self._scaling(alpha, len(own[a]))), own[a]),
                (before[b].float() * (-share * self._scaling(self.lora_alpha, len(before[a]))), before[a]),
                (now[b].float() * self._scaling(self.lora_alpha, len(now[a])), now[a]),
            ]
            tensors[a] = torch.cat([right.float() for _, right in parts])
            tensors[b] = torch.cat([left for left, _ in parts], 1) / self._scaling(alpha, len(tensors[a]))
        return replace(update, tensors=tensors, lora_alpha=alpha)

    def _terms(self, updates: list[Update], state: Mapping[str, Tensor], a: str, b: str) -> list[Term]:
        """One term per client; the last term is the state, with weight 0. The scaling is multiplied into B."""
        total = sum(update.num_examples for update in updates)
        terms = []
        for update in updates:
            own, alpha = update.tensors[a], update.lora_alpha or self.lora_alpha
            if alpha is None and own.shape != state[a].shape:
                raise AggregationError(
                    f"{update.client}: {a} has rank {len(own)}, the state {len(state[a])}; where ranks differ, the "
                    "metric lora-alpha, or the strategy's lora_alpha, is needed"
                )
            weight = update.num_examples / total
            terms.append(Term(weight, update.tensors[b].float() * self._scaling(alpha, len(own)), own))
        return [*terms, Term(0.0, state[b].float() * self._scaling(self.lora_alpha, len(state[a])), state[a])]

    def _scaling(self, lora_alpha: float | None, rank: int) -> float:
        if lora_alpha is None:
            return 1.0
        return scaling(lora_alpha, rank, rslora=self._rslora)


def split(svd: TruncatedSVD, before: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A = V^T (rank, in), B = U S / s (out, rank); where dW has a smaller rank, B is zero and A orthonormal.

    For dW = 0 the result keeps the A from ``before`` (rank, in): if A and B were both zero, neither would get a
    gradient.
    """
    rank, used = len(svd.s), int((svd.s > 0).sum())
    u, s, vt = svd.u[:, :used], svd.s[:used, None], svd.vt[:used]
    new_a = vt if used else before.to(vt.dtype)
    if len(new_a) < rank:
        more = torch.randn(rank, before.shape[1], generator=torch.Generator().manual_seed(0)).to(vt.dtype)
        spare, _ = torch.linalg.qr(torch.cat([vt, before.to(vt.dtype), more]).T)
        new_a = torch.cat([new_a, spare.T[len(new_a) : rank]])
    new_b = torch.cat([u * (s / scaling).T, u.new_zeros(len(u), rank - used)], dim=1)
    return new_a.to(before.dtype), new_b.to(before.dtype)


class _Group:
    """Running sums over the layers of one block, for the diagnostics."""

    def __init__(self) -> None:
        self._lost = self._energy = self._stable_rank = 0.0
        self._numerical_ranks: list[int | None] = []
        self._inner = torch.zeros(())  # (K, K) inner products of the clients' changes
        self._size = 0.0  # sum over layers of the products' largest squared norm: the scale of rounding in ``_inner``

    def add(self, svd: TruncatedSVD) -> None:
        """Add one layer; the last row and column of ``svd.inner`` belong to the state."""
        self._lost += svd.lost(len(svd.s))
        self._energy += svd.energy
        self._stable_rank = max(self._stable_rank, svd.stable_rank)
        self._numerical_ranks.append(svd.numerical_rank)
        change = svd.inner - svd.inner[-1] - svd.inner[:, -1:] + svd.inner[-1, -1]
        self._inner = self._inner + change[:-1, :-1]
        self._size += float(svd.inner.diagonal().max())

    def diagnostics(self) -> dict[str, float]:
        """The group's numbers by name."""
        squares = self._inner.diagonal().clamp_min(0.0)
        result = {"client-norm": float(squares.sqrt().mean()), "stable-rank": self._stable_rank}
        if self._energy > 0:
            result["truncation-loss"] = self._lost / self._energy
        if None not in self._numerical_ranks:
            result["numerical-rank"] = float(max(rank for rank in self._numerical_ranks if rank is not None))
        moved = squares > ROUNDING * self._size
        count = int(moved.sum())
        if count > 1:
            cosines = self._inner[moved][:, moved] / torch.outer(squares[moved].sqrt(), squares[moved].sqrt())
            result["client-cosine"] = float(cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))
        return result
