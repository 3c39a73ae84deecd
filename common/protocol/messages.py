"""What crosses the line between server and site, each kind of message as a class that writes and reads it."""

from dataclasses import dataclass

from flwr.app import Error
from flwr.common.constant import ErrorCode

from common.errors import FedSpanError, WireError

LONGEST_TEXT = 4096  # characters of a sentence, such as the reason of an error
_CUT = " ..."


def _family(error: type[FedSpanError]) -> list[type[FedSpanError]]:
    """A class and all that derive from it."""
    return [error, *(one for derived in error.__subclasses__() for one in _family(derived))]


#: Name of every error that a reply may be, by its code: FedSpan's classes, and Flower's own codes.
KINDS: dict[int, str] = {
    **{code: name for name, code in vars(ErrorCode).items() if name.isupper()},
    **{error.code: error.__name__ for error in _family(FedSpanError)},
}


@dataclass(frozen=True)
class Failure:
    """A reply that is an error.

    Attributes:
        code: of the error's class, or one of Flower's.
        reason: the sentence for the operator; empty when there is none.
    """

    code: int
    reason: str

    @property
    def kind(self) -> str:
        """The error's name in a run's records."""
        return KINDS[self.code]

    @classmethod
    def of(cls, error: FedSpanError) -> "Failure":
        """The failure that tells of an error as it is."""
        return cls(error.code, str(error))

    def to_error(self) -> Error:
        """As Flower sends it; a longer reason is cut."""
        cut = len(self.reason) > LONGEST_TEXT
        return Error(self.code, self.reason[: LONGEST_TEXT - len(_CUT)] + _CUT if cut else self.reason)

    @classmethod
    def read(cls, error: Error) -> "Failure":
        """From a reply.

        Raises:
            WireError: nothing has this code, or the reason is too long.
        """
        reason = error.reason or ""
        if error.code not in KINDS:
            raise WireError(f"its error has code {error.code}; allowed: {', '.join(map(str, sorted(KINDS)))}")
        if len(reason) > LONGEST_TEXT:
            raise WireError(f"its error's reason has {len(reason)} characters; allowed: up to {LONGEST_TEXT}")
        return cls(error.code, reason)
