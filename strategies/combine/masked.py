"""The numbers of an update that masked sums add: their order, their bounds, and the way back to a mean update.

A vector holds changes, not weights: W_k - W of a dense tensor; the projected change R_k and, with weight decay, c_k - 1
of a weight under a shared basis. Every number has a bound that honest training cannot exceed, the same at all sites, to
which a site clips (``common.masking.fixed_point``). Tensors have the names that they have in an update without masks
(``common.protocol.factors``), and four bytes a number.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.config.federation import FederationConfig
from common.errors import WireError
from common.masking.fixed_point import WORD_BYTES, Words, decode
from common.masking.noise import Numbers, check_hidden, encode_hidden
from common.protocol.factors import Exchange, Factors, common_part, in_factors, parts_of
from common.protocol.tensors import Tensors
from strategies.admission.bounds import DEVIATIONS, by_entry, largest_change, largest_entry, largest_projected


@dataclass(frozen=True)
class _Piece:
    """Numbers of a vector that have one bound: a tensor as it travels; ``part`` is of a weight's factors."""

    name: str
    part: str
    shape: tuple[int, ...]
    bound: float

    @property
    def key(self) -> str:
        return self.name + self.part

    @property
    def words(self) -> int:
        return math.prod(self.shape)

    @property
    def open(self) -> bool:
        """Whether the numbers depend on settings alone, and on no row: the decay."""
        return self.part != "" and not self.shape


class Vector:
    """The form of one round's vectors, the same at the server and at every site.

    Args:
        federation: the federation's settings.
        base: the state at the start of the round, by name.
        active: names of the tensors that the round trains.
        exchange: the round's form of factors.
        rows: the most training rows of a site in the round.
    """

    def __init__(
        self,
        federation: FederationConfig,
        base: Mapping[str, Tensor],
        active: Iterable[str],
        exchange: Exchange,
        rows: int,
    ) -> None:
        self._base, self._exchange, self._federation, self._rows = base, exchange, federation, rows
        self._noise = federation.shared_noise
        self._pieces = [piece for name in sorted(active) for piece in self._pieces_of(name)]
        self.words = sum(piece.words for piece in self._pieces)

    def encode(
        self, tensors: Mapping[str, Tensor], weight: float, clients: int, clip: float | None = None
    ) -> tuple[Words, int]:
        """Encode an update, with the noise that every site adds to its part of the sum.

        Args:
            tensors: the update as it would be sent without masks, by name.
            weight: the site's weight, from 0 to 1.
            clients: number of sites whose vectors may be added.
            clip: see ``common.masking.noise.encode_hidden``.

        Returns:
            The vector, and how many of its numbers were clipped to their bounds.
        """
        changes = [partial(self._change, piece, tensors) for piece in self._pieces]
        return encode_hidden(self._numbers(changes), weight, clients, self._noise, clip)

    def check(self, clients: int, clip: float | None) -> None:
        """Raise a PolicyError when ``encode`` would, whatever the update is."""
        check_hidden(self._numbers([_nothing] * len(self._pieces)), clients, self._noise, clip)

    def _numbers(self, values: Iterable[Callable[[], npt.NDArray[np.floating]]]) -> list[Numbers]:
        return [
            Numbers(piece.bound, piece.words, given, piece.open)
            for piece, given in zip(self._pieces, values, strict=True)
        ]

    def split(self, vector: Words) -> Tensors:
        """A vector as tensors of int32, by name, to be sent."""
        found, at = {}, 0
        for piece in self._pieces:
            numbers = vector[at : at + piece.words].view(np.int32).reshape(piece.shape)
            found[piece.key], at = torch.from_numpy(numbers), at + piece.words
        return found

    def join(self, tensors: Mapping[str, Tensor]) -> Words:
        """The inverse of ``split``.

        Raises:
            WireError: a tensor is missing, was not to come, or has another form.
        """
        wanted = {piece.key: piece for piece in self._pieces}
        for what, names in (
            ("is missing", wanted.keys() - tensors.keys()),
            ("was not to come", tensors.keys() - wanted),
        ):
            if names:
                raise WireError(f"masked numbers of {min(names)!r:.200}: the tensor {what}")
        for key, piece in wanted.items():
            found = tensors[key]
            if found.dtype != torch.int32 or tuple(found.shape) != piece.shape:
                raise WireError(f"{key}: {found.dtype} {tuple(found.shape)} came; allowed: int32 {piece.shape}")
        return np.concatenate([tensors[key].numpy().reshape(-1).view(np.uint32) for key in wanted])

    @property
    def most(self) -> dict[str, int]:
        """Bytes of every tensor, by name."""
        return {piece.key: WORD_BYTES * piece.words for piece in self._pieces}

    def mean(self, total: Words, weights: float, clients: int) -> tuple[Tensors, dict[str, Factors]]:
        """The mean update of a sum: dense tensors, and changes in factors, by name.

        Args:
            total: the sum of the sites' vectors.
            weights: the sum of their weights.
            clients: see ``encode``.
        """
        found, at = {}, 0
        for piece in self._pieces:
            noise = 0.0 if piece.open else self._noise
            numbers = decode(total[at : at + piece.words], piece.bound, weights, clients, noise)
            found[piece.key], at = torch.from_numpy(numbers.reshape(piece.shape)), at + piece.words
        dense, factors = {}, {}
        for piece in self._pieces:
            start = self._base[piece.name]
            if not piece.part:
                dense[piece.name] = (start.double() + found[piece.name]).to(start.dtype)
            elif piece.part == parts_of(start.shape)[0]:
                factors[piece.name] = self._factors(piece.name, found)
        return dense, factors

    def _factors(self, name: str, found: Mapping[str, Tensor]) -> Factors:
        """A weight's mean change from the mean of the projected changes."""
        assert self._exchange.basis is not None  # noqa: S101 - else there are no pieces of factors
        shape = tuple(self._base[name].shape)
        sent, decay = parts_of(shape)
        basis, numbers = self._exchange.basis(name, shape), found[name + sent].float()
        pair = (basis, numbers) if common_part(shape) == "/left" else (numbers, basis)
        shrunk = float(found[name + decay]) if name + decay in found else 0.0
        return Factors(1.0 + shrunk, [pair], common=True)

    def _change(self, piece: _Piece, tensors: Mapping[str, Tensor]) -> npt.NDArray[np.floating]:
        """The numbers of a piece, flat."""
        value = tensors[piece.key].detach().cpu()
        if not piece.part:
            value = value.double() - self._base[piece.name].cpu().double()
        elif piece.open:
            value = value.double() - 1.0
        elif not value.numel():  # a weight without a gradient has no term
            value = torch.zeros(piece.shape)
        found: npt.NDArray[np.floating] = value.reshape(-1).numpy()
        return found

    def _pieces_of(self, name: str) -> list[_Piece]:
        training, strategy, base = self._federation.training, self._federation.strategy, self._base[name]
        noise, shape = DEVIATIONS * self._federation.admission.max_noise, tuple(base.shape)
        if not strategy.projects(name) or not in_factors(shape, self._exchange):
            if by_entry(name, training, strategy):
                bound = largest_entry(name, base, self._rows, training, strategy)
            else:
                bound = largest_change(name, base, self._rows, training, strategy)
            return [_Piece(name, "", shape, bound + noise)]
        sent, decay = parts_of(shape)
        assert self._exchange.basis is not None  # noqa: S101 - ``in_factors`` has looked
        rank, bound = self._exchange.basis.rank, largest_projected(self._rows, training, strategy)
        projected = (shape[0], rank) if sent == "/left" else (rank, shape[1])
        pieces = [_Piece(name, sent, projected, bound + noise)]
        if shrunk := training.steps(self._rows) * training.learning_rate * training.weight_decay:
            pieces.append(_Piece(name, decay, (), shrunk))
        return pieces


def agreed_text(settings: str, version: str, active: Iterable[str], rows: int, heaviest: int) -> bytes:
    """All that the members of a sum must have been told alike, for their masks to cancel; see ``SiteSum.mask``.

    Args:
        settings: digest of the federation's settings.
        version: name of the version that was trained, or digest of its tensors.
        active: names of the trained tensors.
        rows: the most rows of a site, from which bounds follow.
        heaviest: the rows that weigh 1.
    """
    told = "\n".join([settings, version, str(rows), str(heaviest), *sorted(active)])
    return hashlib.sha256(told.encode()).digest()


#: Largest noise in a mean, in units of `secure_aggregation.noise`. It is more than 1 only where weights differ much.
MOST_NOISE = 10.0


def _nothing() -> npt.NDArray[np.floating]:
    return np.zeros(0)


def weight_of(rows: int, heaviest: int) -> float:
    """A site's weight in the sum."""
    return min(rows, heaviest) / heaviest
