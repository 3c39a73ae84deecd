"""The masked sums of a round and of the next, by the names of their sites."""

from dataclasses import dataclass, field

from common.errors import AggregationError
from common.masking.fixed_point import Words, encoded_weight
from common.masking.parts import SumId
from common.masking.server import ServerSum
from strategies.combine.masked import Vector


class Members:
    """A sum, and who takes part in it.

    Args:
        which: which sum.

    Attributes:
        sum: the sum.
        members: ids in the sum, by site.
    """

    def __init__(self, which: SumId) -> None:
        self.sum, self.members = ServerSum(which), dict[str, bytes]()

    def add_keys(self, site: str, keys: bytes) -> None:
        """Take a site's keys."""
        self.members[site] = self.sum.add_keys(site, keys)

    def add_shares(self, site: str, sealed: bytes) -> None:
        """Take a site's sealed shares."""
        self.sum.add_shares(self.members[site], sealed)

    def sharers(self) -> set[str]:
        """The sites that have shared their secrets."""
        return {site for site, member in self.members.items() if member in self.sum.sharers}


@dataclass
class OpenSum:
    """A sum whose members have shared their secrets, and what they were told alike.

    Attributes:
        of: the sum with its members.
        vector: the form of the members' vectors.
        about: all that the members were told alike.
        most_rows: the most training rows of a member.
        heaviest: the number of rows that weighs 1.
        rows: training rows by member.
    """

    of: Members
    vector: Vector
    about: bytes
    most_rows: int
    heaviest: int
    rows: dict[str, int]
    sum: ServerSum = field(init=False)
    members: dict[str, bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.sum, self.members = self.of.sum, self.of.members
        self.sum.expect(self.vector.words + 1)

    def add_signature(self, site: str, signature: bytes) -> None:
        """Take a site's signature of the list of survivors."""
        self.sum.add_signature(self.members[site], signature)

    def add_unmasking(self, site: str, shares: bytes) -> None:
        """Take a site's shares that unmask the sum."""
        self.sum.add_unmasking(self.members[site], shares)

    def total(self, weights: list[float]) -> Words:
        """The unmasked sum of the updates, of sites with these weights.

        Raises:
            AggregationError: it cannot be unmasked.
        """
        words, clients = self.sum.total(self.about), len(self.members)
        if int(words[-1]) != sum(encoded_weight(weight, clients) for weight in weights) % 2**32:
            raise AggregationError(
                "the sum is not unmasked: a site sealed false shares, or masked another weight or state"
            )
        return words[:-1]

    def alive(self) -> list[str]:
        """The sites whose numbers are in the sum."""
        return [site for site, member in self.members.items() if member in self.sum.alive]

    def signers(self) -> list[str]:
        """The sites that have signed the list of survivors."""
        return [site for site, member in self.members.items() if member in self.sum.signers()]
