"""Masked sums without a network: a server and sites that hand bytes to each other."""

from collections.abc import Collection
from functools import cache

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from common.masking import primitives
from common.masking.fixed_point import Words
from common.masking.parts import SumId, shown
from common.masking.server import ServerSum
from common.masking.site import SiteSum

ABOUT = b"the state of this round"


@cache
def identity(number: int) -> ec.EllipticCurvePrivateKey:
    """A site's registered key."""
    del number
    return ec.generate_private_key(ec.SECP384R1())


def peers(count: int) -> dict[str, str]:
    """Names by fingerprint, as a site has them in its agreement."""
    return {shown(primitives.id_of(identity(k).public_key())): f"site-{k}" for k in range(count)}


class Together:
    """A server with its sites, until somebody drops out or lies."""

    def __init__(self, count: int, threshold: int, words: int, sum_id: SumId | None = None, least: int = 0) -> None:
        self.sum_id = sum_id or SumId(run=1, server_round=3, attempt=0, threshold=threshold)
        self.server = ServerSum(self.sum_id)
        self.server.expect(words)
        self.sites = [SiteSum(self.sum_id, identity(k), peers(count), least) for k in range(count)]
        self.ids = [self.server.add_keys(f"site-{k}", site.advert) for k, site in enumerate(self.sites)]

    def share(self, lost: Collection[int] = ()) -> None:
        for number, site in enumerate(self.sites):
            if number not in lost:
                self.server.add_shares(self.ids[number], site.share(self.server.listing.raw))

    def mask(self, vectors: list[Words], lost: Collection[int] = (), about: bytes = ABOUT) -> list[Words]:
        """Of all that have shared; returns what left."""
        masked = []
        for number, site in enumerate(self.sites):
            if self.ids[number] in self.server.sharers and number not in lost:
                site.receive(self.server.shares_for(self.ids[number]))
                masked.append(site.mask(vectors[number].copy(), about))
                self.server.add_vector(self.ids[number], masked[-1].copy())
        return masked

    def sign(self, lost: Collection[int] = ()) -> None:
        for number, site in enumerate(self.sites):
            if self.ids[number] in self.server.alive and number not in lost:
                self.server.add_signature(self.ids[number], site.sign(self.server.survivors))

    def unmask(self, lost: Collection[int] = ()) -> Words:
        for number, site in enumerate(self.sites):
            if self.ids[number] in self.server.signers() and number not in lost:
                self.server.add_unmasking(self.ids[number], site.unmask(self.server.signatures))
        return self.server.total(ABOUT)


def uniform(seed: int, count: int, words: int) -> list[Words]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 2**32, words, dtype=np.uint32) for _ in range(count)]
