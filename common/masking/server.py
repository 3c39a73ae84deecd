"""The server's part in one masked sum: it passes on keys, shares and signatures, adds vectors, and unmasks their sum.

It holds one vector, whatever the number of members.
"""

import numpy as np

from common.errors import AggregationError, RefusedUpdate, WireError
from common.masking import parts, primitives
from common.masking.fixed_point import Words
from common.masking.parts import ALIVE, DROPPED, Advert, Listing, SumId
from common.masking.primitives import SIGNATURE_BYTES
from common.masking.site import pair_key, self_key


class ServerSum:
    """One sum.

    Args:
        sum_id: which sum.

    Attributes:
        id: which sum.
        names: the members' names, by id.
        sharers: the members that have shared their secrets, by id.
        alive: the members whose vectors are in the sum, by id.
    """

    def __init__(self, sum_id: SumId) -> None:
        self.id = self._sum = sum_id
        self._adverts: dict[bytes, Advert] = {}
        self._sealed: dict[bytes, dict[bytes, bytes]] = {}  # by receiver, then by sender
        self._total: Words = np.zeros(0, np.uint32)
        self._signatures: dict[bytes, bytes] = {}
        self._shares: dict[bytes, dict[bytes, bytes]] = {}  # by the member whose secret it is of, then by holder
        self.names: dict[bytes, str] = {}
        self.sharers: list[bytes] = []
        self.alive: list[bytes] = []

    def add_keys(self, name: str, raw: bytes) -> bytes:
        """Take a member's keys; returns its id.

        Raises:
            RefusedUpdate: they are no keys for this sum, or another member has the same identity.
        """
        try:
            advert = Advert.read(raw)
        except WireError as error:
            raise RefusedUpdate(f"{name}: {error}") from None
        if not advert.fits(self._sum):
            raise RefusedUpdate(f"{name}: its keys are not signed for this round")
        if advert.id in self._adverts:
            raise RefusedUpdate(f"{name}: {self.names[advert.id]} has the same identity key")
        self._adverts[advert.id], self.names[advert.id] = advert, name
        return advert.id

    @property
    def listing(self) -> Listing:
        """The keys of all members, for all of them."""
        return Listing(self._adverts.values())

    def add_shares(self, member: bytes, raw: bytes) -> None:
        """Take the shares that a member has sealed for all, itself among them.

        Raises:
            RefusedUpdate: they are not for exactly the members.
        """
        try:
            sealed = parts.read_sealed(raw)
        except WireError as error:
            raise RefusedUpdate(f"{self.names[member]}: {error}") from None
        if sealed.keys() != self._adverts.keys():
            raise RefusedUpdate(f"{self.names[member]}: its shares are not for all members, and them alone")
        self.sharers.append(member)
        for receiver, one in sealed.items():
            self._sealed.setdefault(receiver, {})[member] = one

    def shares_for(self, member: bytes) -> bytes:
        """The shares that the others have sealed for a member."""
        sealed = self._sealed.get(member, {})
        return parts.write_sealed({sender: one for sender, one in sealed.items() if sender != member})

    def expect(self, words: int) -> None:
        """Say of how many words a vector is; before the first one comes."""
        self._total = np.zeros(words, np.uint32)

    def add_vector(self, member: bytes, vector: Words) -> None:
        """Add a member's masked vector to the sum."""
        if vector.shape != self._total.shape:
            raise RefusedUpdate(f"{self.names[member]}: {vector.size} masked numbers; allowed: {self._total.size}")
        self._total += vector
        self.alive.append(member)

    @property
    def survivors(self) -> bytes:
        """The list of survivors, to be signed."""
        return parts.write_survivors({m: ALIVE if m in self.alive else DROPPED for m in self.sharers})

    def add_signature(self, member: bytes, signature: bytes) -> None:
        """Take a survivor's signature of the list.

        Raises:
            RefusedUpdate: it is none.
        """
        text, public = parts.survivors_text(self._sum, self.listing, self.survivors), self._adverts[member].public
        if len(signature) != SIGNATURE_BYTES or not primitives.signed(public, signature, text):
            raise RefusedUpdate(f"{self.names[member]}: it has not signed the list of survivors")
        self._signatures[member] = signature

    @property
    def signatures(self) -> bytes:
        """The signatures of the list of survivors, for the survivors that have signed it."""
        return parts.write_signatures(self._signatures)

    def signers(self) -> list[bytes]:
        """The members that have signed the list of survivors."""
        return list(self._signatures)

    def add_unmasking(self, member: bytes, raw: bytes) -> None:
        """Take a survivor's shares of the survivors' self masks and of the drop-outs' mask keys.

        Raises:
            RefusedUpdate: they are not of exactly those that have shared, or not those that the member was given.
        """
        try:
            shares = parts.read_shares(raw)
        except WireError as error:
            raise RefusedUpdate(f"{self.names[member]}: {error}") from None
        if shares.keys() != set(self.sharers):
            raise RefusedUpdate(f"{self.names[member]}: its shares are not of all that have shared, and of them alone")
        for owner, share in shares.items():
            of_self_mask, of_mask_key = primitives.committed(self._sealed[member][owner])
            if primitives.digest(share) != (of_self_mask if owner in self.alive else of_mask_key):
                raise RefusedUpdate(f"{self.names[member]}: its share of {self.names[owner]}'s secret is false")
        for owner, share in shares.items():
            self._shares.setdefault(owner, {})[member] = share

    @property
    def unmaskers(self) -> int:
        """How many survivors have given their shares."""
        return len(next(iter(self._shares.values()), {}))

    def total(self, about: bytes) -> Words:
        """The sum of the survivors' vectors, unmasked in place; call once.

        Args:
            about: as ``SiteSum.mask``.

        Raises:
            AggregationError: too few have given their shares, or the shares do not fit.
        """
        self.require(self.unmaskers, "have given their shares")
        listing = self.listing
        for member in self.alive:
            primitives.add_mask(self._total, self_key(self._sum, member, self._secret(listing, member)), negative=True)
        for member in set(self.sharers) - set(self.alive):
            self._remove(listing, member, about)
        return self._total

    def require(self, count: int, what: str) -> None:
        """Raise an AggregationError when fewer members than the threshold are left."""
        if count < self._sum.threshold:
            raise AggregationError(f"{count} sites {what}, {self._sum.threshold} needed to unmask the sum")

    def inconsistent(self) -> list[str]:
        """Names of the members that have sealed shares of no one secret, as far as more shares came than are needed.

        A share that came is the one that was sealed, so this is the fault of who has sealed it.
        """
        listing, found = self.listing, []
        for member, shares in self._shares.items():
            more = range(len(shares) - self._sum.threshold + 1)
            if len({self._secret(listing, member, first) for first in more}) > 1:
                found.append(self.names[member])
        return found

    def _secret(self, listing: Listing, member: bytes, first: int = 0) -> bytes:
        """The seed of a member, from as many shares as needed, in the holders' order."""
        held = sorted(self._shares[member].items())[first : first + self._sum.threshold]
        return primitives.combined({listing.numbers[holder]: share for holder, share in held})

    def _remove(self, listing: Listing, dropped: bytes, about: bytes) -> None:
        """Remove the pairwise masks of a drop-out from the sum: all that the survivors share with it."""
        seed = self._secret(listing, dropped)
        key = primitives.exchange_key(seed, self._sum.text("mask key"))
        if primitives.public_bytes(key) != listing.members[dropped].mask_key:
            raise AggregationError(f"the shares of {self.names[dropped]}, which has dropped out, do not give its key")
        for member in self.alive:
            mask = pair_key(self._sum, key, dropped, listing, member, about)
            primitives.add_mask(self._total, mask, negative=member < dropped)
