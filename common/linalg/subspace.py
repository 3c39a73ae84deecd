"""A subspace that all sites share for a round: every machine draws the same basis from the same seed.

With a common basis P the sites' changes P R_k add up to P sum_k p_k R_k: only R is sent, either way, and the average
keeps the rank of one site's change, for any number of sites (decision 006). The method is related to the random
projections of APOLLO (arXiv 2412.05270) and FLoRA (arXiv 2402.03293).
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def projects_right(shape: tuple[int, ...] | torch.Size) -> bool:
    """Whether GaLore projects a weight of this shape from the right, R = G P^T (m, r); else R = P^T G (r, n)."""
    return shape[0] >= shape[1]


def generator_for(*key: object) -> torch.Generator:
    """A generator on the CPU that depends on ``key`` alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class SharedBasis:
    """The bases of one round, by weight: Gaussian columns, orthonormalised by a thin QR in float32 on the CPU.

    Args:
        seed: the federation's seed.
        server_round: the round; every round has new bases.
        rank: r, the number of directions in each basis.
    """

    def __init__(self, seed: int, server_round: int, rank: int) -> None:
        self.rank = rank
        self._key = (seed, server_round)
        self._made: dict[tuple[str | int, ...], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """P for the weight ``name`` of shape (m, n): (r, n) when projected from the right, else (m, r)."""
        key = (name, *shape)
        if key not in self._made:
            side = min(shape[0], shape[1])
            drawn = torch.randn(side, self.rank, generator=generator_for(*self._key, name))
            columns = torch.linalg.qr(drawn).Q
            self._made[key] = columns.T.contiguous() if projects_right(shape) else columns
        return self._made[key]


@lru_cache(maxsize=2)
def shared_basis(seed: int, server_round: int, rank: int) -> SharedBasis:
    """The bases of a round; each basis is drawn once per process."""
    return SharedBasis(seed, server_round, rank)
