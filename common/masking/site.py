"""A site's part in one masked sum. It answers each exchange once, and refuses whatever would lay its vector open."""

from collections.abc import Mapping
from enum import IntEnum

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from common.errors import PolicyError
from common.masking import parts, primitives
from common.masking.fixed_point import Words
from common.masking.parts import ALIVE, DROPPED, Advert, Listing, SumId, shown


class Stage(IntEnum):
    """How far a sum has come, by the last thing that the site has given or received."""

    KEYS = 1
    SHARES = 2
    RECEIVED = 3
    VECTOR = 4
    SIGNATURE = 5
    UNMASKED = 6


class SiteSum:
    """One sum, from fresh keys to unmasking; its secrets are in memory and nowhere else.

    Args:
        sum_id: which sum.
        identity: the site's identity key.
        peers: names of the peers that the site's people have approved, by fingerprint (``SHA256:...``).
        least_peers: the least number of approved peers beside this site whose vectors are in the sum.
        most_members: the most members that the site takes part with; None: below twice the threshold, as in any case.
        only: ids of the survivors of a sum that the site has helped to unmask in an earlier attempt of this round;
            None: none. Sites train alike in both, so the sum of other survivors would differ by somebody's update.

    Attributes:
        advert: the site's keys for this sum, for the server.
        stage: how far the sum has come.
        unmasked: ids of the survivors of the sum that the site has helped to unmask in this round; None: none yet.
    """

    def __init__(
        self,
        sum_id: SumId,
        identity: ec.EllipticCurvePrivateKey,
        peers: Mapping[str, str],
        least_peers: int,
        most_members: int | None = None,
        only: frozenset[bytes] | None = None,
    ) -> None:
        self._sum, self._identity = sum_id, identity
        self._peers, self._least = peers, least_peers
        self._most = min(2 * sum_id.threshold - 1, most_members or 2 * sum_id.threshold)
        self._self_seed, self._mask_seed = primitives.new_seed(), primitives.new_seed()
        self._mask_key = primitives.exchange_key(self._mask_seed, sum_id.text("mask key"))
        self._seal_key = primitives.exchange_key(primitives.new_seed(), sum_id.text("seal key"))
        public = (primitives.public_bytes(self._mask_key), primitives.public_bytes(self._seal_key))
        signature = primitives.sign(identity, parts.signed_text(sum_id, *public))
        self._own = Advert(primitives.identity_bytes(identity.public_key()), *public, signature)
        self._listing = Listing([self._own])
        self._held: dict[bytes, tuple[bytes, bytes]] = {}  # shares by member: of its self mask, of its mask key
        self._states: dict[bytes, bytes] = {}
        self._signed = b""
        self.advert, self.stage, self.unmasked = self._own.raw, Stage.KEYS, only

    def share(self, listing: bytes) -> bytes:
        """Check the members' keys; seal shares of this site's secrets for each of them.

        The server passes on those for the others; the site's own record is there for what commits to its own shares.

        Args:
            listing: the keys of all members.

        Raises:
            PolicyError: the members are not those that the site's people have approved, or the keys are not theirs.
            WireError: this is no list of keys.
        """
        self._after(Stage.KEYS, "shares")
        found = Listing.read(listing)
        others = [one for one in found.members.values() if one.id != self._own.id]
        if found.members.get(self._own.id, self._own).raw != self._own.raw or len(others) == len(found.members):
            raise PolicyError(f"{self._sum}: the list of keys does not have this site's own")
        for one in others:
            if shown(one.id) not in self._peers:
                raise PolicyError(f"{self._sum}: {shown(one.id)} is no peer that this site has agreed to")
            if not one.fits(self._sum):
                raise PolicyError(f"{self._sum}: the keys of {self._name(one.id)} are not signed for this round")
        count, threshold = len(found.members), self._sum.threshold
        if not threshold <= count <= self._most:
            raise PolicyError(
                f"{self._sum}: {count} members and threshold {threshold}; allowed: {threshold} to {self._most}"
            )
        self._enough(len(others), "take part")
        self._listing, self.stage = found, Stage.SHARES
        pairs = zip(
            *(primitives.split(seed, threshold, count) for seed in (self._self_seed, self._mask_seed)), strict=True
        )
        sealed = {}
        for one, pair in zip(found.members.values(), pairs, strict=True):
            sealed[one.id] = primitives.seal(self._sealing(self._own.id, one.id), pair)
            if one.id == self._own.id:
                self._held[one.id] = pair
        return parts.write_sealed(sealed)

    def receive(self, sealed: bytes) -> None:
        """Take the shares that the others have sealed for this site.

        Args:
            sealed: the shares for this site of all members that have shared, by sender.

        Raises:
            PolicyError: too few have shared, or a share is not what its sender sealed.
            WireError: these are no sealed shares.
        """
        self._after(Stage.SHARES, "a masked vector")
        for sender, one in parts.read_sealed(sealed).items():
            if sender not in self._listing.members or sender == self._own.id:
                raise PolicyError(f"{self._sum}: {shown(sender)} has shares, but no keys")
            shares = primitives.unseal(self._sealing(sender, self._own.id), one)
            if shares is None:
                raise PolicyError(f"{self._sum}: the shares of {self._name(sender)} were not sealed for this site")
            self._held[sender] = shares
        if len(self._held) < self._sum.threshold:
            raise PolicyError(f"{self._sum}: {len(self._held)} members have shared, {self._sum.threshold} are needed")
        self._enough(len(self._held) - 1, "have shared")
        self.stage = Stage.RECEIVED

    @property
    def members(self) -> int:
        """How many members have given keys: as many as numbers are encoded for.

        Masks cancel only between sites that were sent the same list of keys. A number of sharers would not do: the
        server may withhold shares from some sites, whose grid would then be another.
        """
        return len(self._listing.members)

    def mask(self, vector: Words, about: bytes) -> Words:
        """Mask the site's vector, in place.

        Args:
            vector: the encoded numbers.
            about: the state that was trained, and all else that members must agree on. Masks cancel only between
                members for which it is the same, so a server that sends different states gets no sum.
        """
        self._after(Stage.RECEIVED, "a masked vector")
        self.stage = Stage.VECTOR
        primitives.add_mask(vector, self_key(self._sum, self._own.id, self._self_seed))
        for member in self._held:
            if member != self._own.id:
                key = pair_key(self._sum, self._mask_key, self._own.id, self._listing, member, about)
                primitives.add_mask(vector, key, negative=member < self._own.id)
        return vector

    def sign(self, survivors: bytes) -> bytes:
        """Sign the list of those whose vectors are in the sum; one list in a round.

        Raises:
            PolicyError: the list contradicts itself, another one, or this site.
            WireError: this is no list of survivors.
        """
        if self.stage is Stage.SIGNATURE and survivors != self._signed:
            raise PolicyError(f"{self._sum}: a second list of survivors came")
        if self.stage is not Stage.SIGNATURE:
            self._after(Stage.VECTOR, "a signature")
        states: dict[bytes, bytes] = {}
        for member, state in parts.read_survivors(survivors):
            if member not in self._held:
                raise PolicyError(f"{self._sum}: {self._name(member)} has not shared, but is in the list of survivors")
            if states.setdefault(member, state) != state:
                raise PolicyError(f"{self._sum}: {self._name(member)} is named both alive and dropped")
        if states.keys() != self._held.keys():
            missing = min(self._held.keys() - states.keys())
            raise PolicyError(f"{self._sum}: {self._name(missing)} is neither alive nor dropped in the list")
        if states[self._own.id] != ALIVE:
            raise PolicyError(f"{self._sum}: this site has sent its vector, but is named dropped")
        alive = _alive(states)
        if len(alive) < self._sum.threshold:
            raise PolicyError(f"{self._sum}: {len(alive)} survivors, {self._sum.threshold} are needed")
        self._enough(len(alive) - 1, "survive")
        if self.unmasked not in (None, alive):
            raise PolicyError(f"{self._sum}: this site has helped to unmask the sum of other survivors already")
        self._signed, self._states, self.stage = survivors, states, Stage.SIGNATURE
        return primitives.sign(self._identity, parts.survivors_text(self._sum, self._listing, survivors))

    def unmask(self, signatures: bytes) -> bytes:
        """Give the shares that unmask the sum: of each survivor's self mask, of each drop-out's mask key.

        Args:
            signatures: signatures of the list of survivors that this site has signed, by member.

        Raises:
            PolicyError: too few survivors have signed that list.
            WireError: these are no signatures.
        """
        self._after(Stage.SIGNATURE, "shares that unmask")
        text, found = parts.survivors_text(self._sum, self._listing, self._signed), parts.read_signatures(signatures)
        for member, signature in found.items():
            if self._states.get(member) != ALIVE:
                raise PolicyError(f"{self._sum}: {self._name(member)} has signed, but is no survivor")
            if not primitives.signed(self._listing.members[member].public, signature, text):
                raise PolicyError(f"{self._sum}: {self._name(member)} has not signed this list of survivors")
        if len(found) < self._sum.threshold:
            raise PolicyError(
                f"{self._sum}: {len(found)} have signed the list of survivors, {self._sum.threshold} are needed"
            )
        self.stage, self.unmasked = Stage.UNMASKED, _alive(self._states)
        return parts.write_shares({m: self._held[m][state == DROPPED] for m, state in self._states.items()})

    def _after(self, stage: Stage, what: str) -> None:
        """Raise a PolicyError unless the sum has come to this stage, and no further."""
        if self.stage is not stage:
            raise PolicyError(f"{self._sum}: {what} asked for out of turn, or twice")

    def _enough(self, others: int, what: str) -> None:
        if others < self._least:
            raise PolicyError(f"{self._sum}: {others} known peers {what}; this site asks for at least {self._least}")

    def _name(self, member: bytes) -> str:
        fingerprint = shown(member)
        return f"{self._peers[fingerprint]} ({fingerprint})" if fingerprint in self._peers else fingerprint

    def _sealing(self, sender: bytes, receiver: bytes) -> bytes:
        other = self._listing.members[receiver if sender == self._own.id else sender]
        secret = primitives.agreed(self._seal_key, other.seal_key)
        return primitives.derived(secret, self._sum.text("sealed shares", sender, receiver))


def _alive(states: Mapping[bytes, bytes]) -> frozenset[bytes]:
    return frozenset(member for member, state in states.items() if state == ALIVE)


def self_key(sum_id: SumId, member: bytes, seed: bytes) -> bytes:
    """The key of a member's self mask."""
    return primitives.derived(seed, sum_id.text("self mask", member))


def pair_key(
    sum_id: SumId,
    own: X25519PrivateKey,
    own_id: bytes,
    listing: Listing,
    other: bytes,
    about: bytes,
) -> bytes:
    """The key of the mask that two members share; the one with the smaller id adds it, the other subtracts it."""
    secret = primitives.agreed(own, listing.members[other].mask_key)
    return primitives.derived(secret, sum_id.text("pairwise mask", *sorted((own_id, other)), listing.digest, about))
