"""A masked sum of a round, by the names of its sites."""

from collections.abc import Callable
from dataclasses import dataclass, field

from common.masking.server import ServerSum
from strategies.combine.masked import Vector


@dataclass
class OpenSum:
    """A sum whose members have shared their secrets.

    Attributes:
        sum: the sum.
        vector: the form of the members' vectors.
        about: all that the members were told alike.
        most_rows: the most training rows of a member.
        heaviest: the number of rows that weighs 1.
        rows: training rows by member.
        members: ids in the sum, by site.
    """

    sum: ServerSum
    vector: Vector
    about: bytes
    most_rows: int
    heaviest: int
    rows: dict[str, int]
    members: dict[str, bytes] = field(default_factory=dict)

    def add_keys(self, site: str, keys: bytes) -> None:
        """Take a site's keys."""
        self.members[site] = self.sum.add_keys(site, keys)

    def add(self, take: Callable[[bytes, bytes], None]) -> Callable[[str, bytes], None]:
        """A function that takes an answer by its site, from one that takes it by its member's id."""
        return lambda site, answer: take(self.members[site], answer)

    def alive(self) -> list[str]:
        """The sites whose numbers are in the sum."""
        return [site for site, member in self.members.items() if member in self.sum.alive]

    def signers(self) -> list[str]:
        """The sites that have signed the list of survivors."""
        return [site for site, member in self.members.items() if member in self.sum.signers()]
