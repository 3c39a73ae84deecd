"""The messages of a masked sum: records of a fixed size, one after the other; and the texts that keys are bound to.

A member is known by its id, the SHA-256 of its identity key; members are numbered from 1 in the order of their ids.
"""

import base64
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from common.errors import WireError
from common.masking import primitives
from common.masking.primitives import ID_BYTES, IDENTITY_BYTES, PUBLIC_BYTES, SEALED_BYTES, SEED_BYTES, SIGNATURE_BYTES

ALIVE, DROPPED = b"\x01", b"\x00"
ADVERT_BYTES = IDENTITY_BYTES + 2 * PUBLIC_BYTES + SIGNATURE_BYTES
#: Most members of a sum; so many keys fit a message many times over.
MOST_MEMBERS = 10_000


@dataclass(frozen=True)
class SumId:
    """Which sum: everything that is signed, and every key, is bound to it.

    Attributes:
        run: Flower's number of the run.
        server_round: the round, from 1.
        attempt: how often the round was begun before; every attempt has fresh keys.
        threshold: T, how many members must be left for the sum to be unmasked.
    """

    run: int
    server_round: int
    attempt: int
    threshold: int

    def text(self, purpose: str, *parts: bytes) -> bytes:
        """The text of this sum for one purpose; every part is written with its length."""
        head = f"FedSpan masked sum, version 1, {purpose}; run {self.run}, round {self.server_round}, "
        head += f"attempt {self.attempt}, threshold {self.threshold}\n"
        return head.encode() + b"".join(len(part).to_bytes(8) + part for part in parts)

    def __str__(self) -> str:
        return f"round {self.server_round}"


@dataclass(frozen=True)
class Advert:
    """The keys of one member for one sum, signed with its identity key.

    Attributes:
        identity: the member's identity key, compressed.
        mask_key: public X25519 key from which pairwise masks are made; its seed is shared among the members.
        seal_key: public X25519 key to which shares are sealed; its seed never leaves the member.
    """

    identity: bytes
    mask_key: bytes
    seal_key: bytes
    signature: bytes = field(repr=False)

    @classmethod
    def read(cls, raw: bytes) -> Self:
        """Read a record.

        Raises:
            WireError: it is none.
        """
        (one,) = cut(raw, (IDENTITY_BYTES, PUBLIC_BYTES, PUBLIC_BYTES, SIGNATURE_BYTES), "keys", most=1) or ((),)
        if not one:
            raise WireError("keys are missing")
        advert = cls(*one)
        try:
            _ = advert.public
        except ValueError:
            raise WireError("keys with an identity that is no point of P-384") from None
        try:
            for key in (advert.mask_key, advert.seal_key):
                primitives.agreed(X25519PrivateKey.generate(), key)
        except ValueError:
            raise WireError(
                f"{shown(advert.id)} has a key that hides nothing: all secrets made with it are 0"
            ) from None
        return advert

    @property
    def raw(self) -> bytes:
        """The record."""
        return self.identity + self.mask_key + self.seal_key + self.signature

    @cached_property
    def public(self) -> ec.EllipticCurvePublicKey:
        """The member's identity key."""
        return primitives.identity_of(self.identity)

    @cached_property
    def id(self) -> bytes:
        """The member's id."""
        return primitives.id_of(self.public)

    def fits(self, sum_id: SumId) -> bool:
        """Whether the member has signed these keys for this sum."""
        return primitives.signed(self.public, self.signature, signed_text(sum_id, self.mask_key, self.seal_key))


def signed_text(sum_id: SumId, mask_key: bytes, seal_key: bytes) -> bytes:
    """The text of an advert that its member signs."""
    return sum_id.text("keys", mask_key, seal_key)


class Listing:
    """The adverts of all members of a sum, sorted by id.

    Args:
        adverts: one of each member.
    """

    def __init__(self, adverts: Iterable[Advert]) -> None:
        self.members = {one.id: one for one in sorted(adverts, key=lambda one: one.id)}
        self.numbers = {member: number for number, member in enumerate(self.members, start=1)}

    @cached_property
    def raw(self) -> bytes:
        """As it travels."""
        return b"".join(one.raw for one in self.members.values())

    @cached_property
    def digest(self) -> bytes:
        """SHA-256, to which masks and signatures are bound."""
        return hashlib.sha256(self.raw).digest()

    @classmethod
    def read(cls, raw: bytes) -> Self:
        """Read a listing.

        Raises:
            WireError: it is none, or names a member twice.
        """
        adverts = [Advert.read(raw[at : at + ADVERT_BYTES]) for at in range(0, len(raw), ADVERT_BYTES)]
        found = cls(adverts)
        if not adverts or len(found.members) != len(adverts) or found.raw != raw:
            raise WireError("the list of keys is empty, not in order, or has a member twice")
        return found


def survivors_text(sum_id: SumId, listing: Listing, survivors: bytes) -> bytes:
    """The text of a list of survivors that its members sign."""
    return sum_id.text("survivors", listing.digest, survivors)


def write_survivors(states: dict[bytes, bytes]) -> bytes:
    """A list of survivors: every member that has shared its secrets, with ``ALIVE`` or ``DROPPED``."""
    return b"".join(member + states[member] for member in sorted(states))


def read_survivors(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The inverse of ``write_survivors``; a member may be named twice."""
    for member, state in cut(raw, (ID_BYTES, 1), "list of survivors"):
        if state not in (ALIVE, DROPPED):
            raise WireError("list of survivors: a state that is neither alive nor dropped")
        yield member, state


def write_sealed(sealed: dict[bytes, bytes]) -> bytes:
    """Sealed shares by member: of their receiver on the way up, of their sender on the way down."""
    return b"".join(member + sealed[member] for member in sorted(sealed))


def read_sealed(raw: bytes) -> dict[bytes, bytes]:
    """The inverse of ``write_sealed``."""
    return _by_member(raw, SEALED_BYTES, "sealed shares")


def write_signatures(signatures: dict[bytes, bytes]) -> bytes:
    """Signatures of a list of survivors, by member."""
    return b"".join(member + signatures[member] for member in sorted(signatures))


def read_signatures(raw: bytes) -> dict[bytes, bytes]:
    """The inverse of ``write_signatures``."""
    return _by_member(raw, SIGNATURE_BYTES, "signatures")


def write_shares(shares: dict[bytes, bytes]) -> bytes:
    """Shares by the member whose secret they are of: of a survivor's self mask, of a drop-out's mask key."""
    return b"".join(member + shares[member] for member in sorted(shares))


def read_shares(raw: bytes) -> dict[bytes, bytes]:
    """The inverse of ``write_shares``."""
    return _by_member(raw, SEED_BYTES, "shares")


def cut(raw: bytes, sizes: tuple[int, ...], what: str, most: int = MOST_MEMBERS) -> list[tuple[bytes, ...]]:
    """Cut bytes into records of fields of these sizes.

    Raises:
        WireError: the bytes do not make whole records, or make too many.
    """
    size = sum(sizes)
    if len(raw) % size or len(raw) > most * size:
        raise WireError(f"{what}: {len(raw)} bytes; allowed: up to {most} records of {size} bytes")
    records = []
    for start in range(0, len(raw), size):
        fields, at = [], start
        for width in sizes:
            fields.append(raw[at : at + width])
            at += width
        records.append(tuple(fields))
    return records


def shown(member: bytes) -> str:
    """An id as ``ssh-keygen -l`` shows the key."""
    return "SHA256:" + base64.b64encode(member).decode().rstrip("=")


def _by_member(raw: bytes, size: int, what: str) -> dict[bytes, bytes]:
    records = cut(raw, (ID_BYTES, size), what)
    found = {member: value for member, value in records}  # noqa: C416 - the records have two fields
    if len(found) != len(records):
        raise WireError(f"{what}: a member is named twice")
    return found
