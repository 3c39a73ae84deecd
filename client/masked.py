"""A site's part in masked sums: its keys of the current round, in this process's memory alone. No Flower.

A process that is started anew has no keys, so its site drops out of the round; the others unmask the sum without it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from client.privacy.agreement import Agreement
from client.privacy.guarantee import in_federation
from client.session import Session
from common.config.site import PrivacyConfig
from common.errors import ConfigError, PolicyError, StaleStateError
from common.masking.fixed_point import encoded_weight, largest
from common.masking.parts import SumId
from common.masking.site import SiteSum
from common.protocol.digest import tensors_digest
from common.protocol.exchanges import KEYS, SHARES, SURVIVORS, ExchangeRequest, MaskedTrainRequest
from common.protocol.tensors import Tensors
from common.system.keys import read_private
from strategies.combine.masked import Vector, agreed_text, weight_of

LONG_LIVED = "FEDSPAN_WORKER"  # environment variable: this process answers more than one message
HOLDS = "FEDSPAN_HOLDS"  # environment variable for the worker's supervisor: this process has keys of a round
#: Steps of the grid up to what the site's own training can reach, at least. On a coarser grid, which a server could ask
#: for by a number of rows that no site has, small sites' numbers would all be 0, and the sum a large site's own.
_LEAST_STEPS = 2**12


@dataclass
class Sums:
    """A site's sums in one run.

    Attributes:
        current: the sum of the current round; None: none yet.
        following: the next round's, whose keys went ahead; None: none did.
    """

    current: tuple[SumId, SiteSum] | None = None
    following: tuple[SumId, SiteSum] | None = None

    def find(self, which: SumId, *, begins: bool = False) -> SiteSum | None:
        """A sum; the next round's is found only when its training ``begins``, and is then the current one."""
        if begins and self.following is not None and self.following[0] == which:
            self.current, self.following = self.following, None
        return self.current[1] if self.current is not None and self.current[0] == which else None


_sums: dict[tuple[int, str], Sums] = {}  # by run and site


@dataclass(frozen=True)
class Member:
    """A site as a member of masked sums.

    Args:
        site: the site's name.
        run: Flower's number of the run.
        agreement: names the approved peers.
        identity: file with the site's registered private key; None: the link was started without one.
        privacy: the site file's section ``privacy``.
    """

    site: str
    run: int
    agreement: Agreement
    identity: Path | None
    privacy: PrivacyConfig | None

    def exchange(self, request: ExchangeRequest, unmasked: int = 0) -> bytes:
        """Answer one of the exchanges.

        Args:
            request: the exchange.
            unmasked: the run's last round whose sum the site has helped to unmask, as its ledger tells; 0: none.

        Raises:
            ConfigError: the site has no identity key, or no process that outlives a message.
            PolicyError: the request would lay the site's update open, or the agreement names no peers.
            StaleStateError: this process has no keys of the round.
        """
        if request.stage == KEYS:
            return self._begin(request.server_round, request.attempt, unmasked)
        found = self._sum(request.server_round, request.attempt)
        if request.stage == SHARES:
            return found.share(request.payload)
        if request.stage == SURVIVORS:
            return found.sign(request.payload)
        if self._sums.following is None:
            os.environ.pop(HOLDS, None)
        return found.unmask(request.payload)

    def share_ahead(self, listing: bytes | None) -> bytes | None:
        """Seal shares for the sum of the next round, whose keys went ahead; None: nobody has asked.

        Raises:
            PolicyError: as ``SiteSum.share``.
            StaleStateError: no keys went ahead.
        """
        if listing is None:
            return None
        if self._sums.following is None:
            raise StaleStateError("this site has given no keys of the next round")
        return self._sums.following[1].share(listing)

    def keys_ahead(self, request: MaskedTrainRequest, unmasked: int) -> bytes | None:
        """Make the keys of the next round, when the site's numbers of this round are masked; None: nobody has asked.

        Args:
            request: this round's.
            unmasked: see ``exchange``.

        Raises:
            PolicyError: there is no next round, or the site has helped to unmask its sum before.
        """
        if not request.wants_keys:
            return None
        which = SumId(self.run, request.server_round + 1, request.attempt, self._threshold)
        if which.server_round > self.agreement.federation.rounds:
            raise PolicyError(f"{which}: the last one is round {self.agreement.federation.rounds}")
        self._sums.following = which, self._made(which, unmasked, None)
        return self._sums.following[1].advert

    def forget(self) -> None:
        """Forget all keys: the run ends."""
        _sums.pop((self.run, self.site), None)
        os.environ.pop(HOLDS, None)

    def part(self, request: MaskedTrainRequest, session: Session) -> "Part":
        """Check a request to train for a masked sum, before it is charged; the session has the state.

        Raises:
            PolicyError: the request would lay the site's update open.
            StaleStateError: this process has no keys of the round, or its weights came whole, under a name that does
                not tell what they are.
        """
        if session.weights is not None and not session.weights.proven:
            # With others' weights the others' updates would tell of this site's, in their sum
            raise StaleStateError(
                f"round {request.server_round}: whole weights came, whose version this site cannot check; send the "
                "steps from the base model"
            )
        rows = session.train_rows
        if request.rows < rows or request.heaviest > request.rows:
            raise PolicyError(f"round {request.server_round}: the most rows of a site are {request.rows}, {rows} here")
        found = self._sum(request.server_round, request.attempt, begins=True)
        found.receive(request.sealed)
        steps = self.agreement.federation.training.steps
        shrunk = weight_of(rows, request.heaviest) * steps(rows) / steps(request.rows)
        if largest(found.members) * shrunk < _LEAST_STEPS:
            raise PolicyError(
                f"round {request.server_round}: the most rows of a site are {request.rows}, of which "
                f"{request.heaviest} weigh 1; beside them an update of {rows} rows would be rounded to nothing"
            )
        return Part(request, session, found, self.agreement.digest)

    def _begin(self, server_round: int, attempt: int, unmasked: int) -> bytes:
        """Make the keys of a round; those of the round before, and those that went ahead, are forgotten."""
        which = SumId(self.run, server_round, attempt, self._threshold)
        before, ahead = self._sums.current, self._sums.following
        given = [one[0] for one in (before, ahead) if one is not None and one[0].server_round <= server_round]
        if any((which.server_round, which.attempt) <= (one.server_round, one.attempt) for one in given) or (
            before is not None and server_round < before[0].server_round
        ):
            raise PolicyError(f"{which}: keys of this round, or a later one, were given already")
        again = None if before is None or before[0].server_round != server_round else before[1].unmasked
        made = self._made(which, unmasked, again)
        _sums[self.run, self.site] = Sums((which, made))
        return made.advert

    def _made(self, which: SumId, unmasked: int, again: frozenset[bytes] | None) -> SiteSum:
        """A sum with fresh keys; ``again``: the survivors of the sum of this round that was unmasked already."""
        if LONG_LIVED not in os.environ:
            raise ConfigError(
                f"{self.site}: `secure_aggregation` needs a worker, which keeps a round's keys in memory from one "
                "message to the next; run fedspan site join, or fedspan site worker"
            )
        if not self.agreement.peers:
            raise PolicyError("this site has agreed to no peers; its people do so with: fedspan site agree --peer FILE")
        # A second sum of the round, of other survivors, would differ from the first by somebody's update.
        if again is None and which.server_round <= unmasked:
            raise PolicyError(
                f"{which}: this site has helped to unmask a sum of this round or a later one, and its worker no longer "
                "knows which"
            )
        made = SiteSum(
            which,
            self._identity,
            self.agreement.by_fingerprint,
            self.agreement.least_peers,
            self._most,
            again,
        )
        os.environ[HOLDS] = "1"
        return made

    @property
    def _sums(self) -> Sums:
        return _sums.setdefault((self.run, self.site), Sums())

    def _sum(self, server_round: int, attempt: int, *, begins: bool = False) -> SiteSum:
        wanted = SumId(self.run, server_round, attempt, self._threshold)
        if (found := self._sums.find(wanted, begins=begins)) is None:
            raise StaleStateError(f"this site has no keys of round {server_round}; it drops out of this round")
        return found

    @property
    def _threshold(self) -> int:
        secure = self.agreement.federation.secure_aggregation
        if secure is None:
            raise PolicyError("this site has agreed to no `secure_aggregation`")
        return secure.threshold

    @property
    def _most(self) -> int | None:
        """Most members of a sum in which the site's noise is what it asks for; None: any."""
        return None if self.privacy is None else in_federation(self.privacy, self.agreement.federation).most_sites

    @property
    def _identity(self) -> ec.EllipticCurvePrivateKey:
        if self.identity is None:
            raise ConfigError(
                f"{self.site}: `secure_aggregation` needs the site's key; give --auth-supernode-private-key FILE"
            )
        key = read_private(self.identity)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
            raise ConfigError(f"{self.identity}: no ECDSA P-384 key, as `fedspan keys site` makes them")
        return key


class Part:
    """A site's update on its way into a sum.

    Args:
        request: the request to train.
        session: the site's session, in the state that the request names.
        found: the sum.
        settings: digest of the settings that the site has agreed to.
    """

    def __init__(self, request: MaskedTrainRequest, session: Session, found: SiteSum, settings: str) -> None:
        self._sum, self._weight = found, weight_of(session.train_rows, request.heaviest)
        weights, start = session.weights, session.exchanged
        federation = session.federation
        exchange = federation.strategy.exchange(federation.training.seed, request.server_round)
        if weights is None:  # training changes the parameters themselves
            start = {name: tensor.detach().cpu().clone() for name, tensor in start.items()}
        self._vector = Vector(federation, start, request.active, exchange, request.rows)
        privacy = session.site.privacy
        self._clip = privacy.clip if privacy is not None and privacy.noise == "shared" else None
        self._vector.check(found.members, self._clip)
        version = tensors_digest(start) if weights is None else weights.version
        self._about = agreed_text(settings, version, request.active, request.rows, request.heaviest)

    @property
    def most_bytes(self) -> int:
        """Bytes of the masked numbers."""
        return sum(self._vector.most.values())

    def masked(self, tensors: Tensors) -> tuple[Tensors, int, int]:
        """Encode and mask an update.

        Args:
            tensors: the update as it would be sent without masks, by name.

        Returns:
            The masked numbers as tensors of int32, by name; the masked weight; and how many numbers were clipped.
        """
        clients = self._sum.members
        vector, clipped = self._vector.encode(tensors, self._weight, clients, self._clip)
        weight = np.array([encoded_weight(self._weight, clients)], np.uint32)
        masked = self._sum.mask(np.concatenate([vector, weight]), self._about)
        return self._vector.split(masked[:-1]), int(masked[-1]), clipped
