"""Every error a user can meet, on one page.

    FedSpanError               something that its user can mend
    ├── ConfigError            a federation or site file, or an argument, is wrong (names key and what is allowed)
    ├── DataError              a shard is missing, empty or malformed (names file, column, row number; never content)
    ├── ModelError             a model folder is absent, unreadable or of an unknown family
    │   └── SelectionError     `modules` / `blocks` match no tensor of the model
    ├── TrainingError          local training cannot start or cannot go on
    │   ├── DivergedError      its numbers overflowed: the learning rate is too large
    │   └── StaleStateError    a site lacks what a message builds on; it is then sent everything
    ├── WorkerDied             a site's worker process ended at work; the message is then sent once more
    ├── WireError              a message cannot be read, or is not what was asked for
    ├── PolicyError            a site's policy does not allow what was asked, or what would leave
    ├── LedgerError            a site's ledger is damaged or cannot be written; nothing leaves then
    ├── RefusedUpdate          one client's reply was not admitted to the average (names client and tensor)
    │   └── DivergedUpdate     its numbers are not finite, or too large to compute with
    ├── AggregationError       the admitted replies cannot be combined
    │   └── DivergedAverage    what they combine to is not finite, or too large to compute with
    ├── FederationError        the run as a whole cannot go on (names who is missing and why)
    ├── RunFolderError         the folder of a run or experiment is missing, damaged, in use, or of another one
    ├── RunFailed              a run ended without a result (carries its reason)
    ├── LaunchError            a process, port or program prevents the start
    └── LinkError              a SuperLink cannot be trusted or does not let this site in (names host and file)
        └── UnreachableError   nobody answers there; it may come up yet

The text of an error says what, where, and what is allowed. It never holds a row of a private shard: a site sends
the text of a ``FedSpanError`` to the operator, and of any other exception only its type and place.

Programs read two numbers, never the text. ``code`` names the class in a site's reply (``common.protocol.messages``);
Flower's own codes are below 1000. ``exit_code`` is a command's: 2 when a file or an argument is wrong, 1 otherwise.
"""

from collections.abc import Mapping
from typing import ClassVar


class FedSpanError(Exception):
    """Base of all errors that FedSpan raises for a reason that its user can mend."""

    code: ClassVar[int] = 1000
    exit_code: ClassVar[int] = 1


class ConfigError(FedSpanError):
    """A federation or site file, or an argument, is wrong."""

    code, exit_code = 1010, 2


class DataError(FedSpanError):
    """A shard is missing, empty or malformed."""

    code, exit_code = 1020, 2


class ModelError(FedSpanError):
    """A model folder is absent, unreadable or of an unknown family."""

    code, exit_code = 1030, 2


class SelectionError(ModelError):
    """The selection of trained tensors matches nothing in the model."""

    code = 1031


class TrainingError(FedSpanError):
    """Local training cannot start or cannot go on."""

    code = 1040


class DivergedError(TrainingError):
    """The numbers of local training overflowed: the learning rate is too large."""

    code = 1041


class StaleStateError(TrainingError):
    """A site lacks what a message builds on, and must be sent everything."""

    code = 1001


class WorkerDied(FedSpanError):  # noqa: N818 - it names what happened, as the operator reads it
    """The process that did a site's work ended before it answered.

    It is ``client.connect.worker_supervisor`` that answers then.
    """

    code = 1002


class WireError(FedSpanError):
    """A message cannot be read, or is not what was asked for."""

    code = 1050


class PolicyError(FedSpanError):
    """A site's policy does not allow what was asked, or what would leave."""

    code = 1060


class LedgerError(FedSpanError):
    """A site's ledger is damaged or cannot be written; nothing leaves then."""

    code = 1070


class RefusedUpdate(FedSpanError):  # noqa: N818 - a refusal is an outcome of admission, not a fault of the program
    """One client's reply was not admitted to the average."""

    code = 1080


class DivergedUpdate(RefusedUpdate):
    """A client's update holds numbers that are not finite, or too large to compute with."""

    code = 1081


class AggregationError(FedSpanError):
    """The admitted replies cannot be combined."""

    code = 1090


class DivergedAverage(AggregationError):  # noqa: N818 - as ``DivergedUpdate``
    """What the replies combine to is not finite, or too large to compute with."""

    code = 1091


class FederationError(FedSpanError):
    """The run as a whole cannot go on.

    Attributes:
        causes: kind (see ``kind_of``) of the error of every site that failed or was refused; "server": of its own.
    """

    code = 1100

    def __init__(self, reason: str, causes: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.causes = dict(causes or {})


class RunFolderError(FedSpanError):
    """The folder of a run or experiment is missing, damaged, in use, or of another one."""

    code, exit_code = 1110, 2


class RunFailed(FedSpanError):  # noqa: N818 - an outcome of the run, not a fault of the program that tells it
    """A run ended without a result; the text is its reason."""

    code = 1120


class LaunchError(FedSpanError):
    """A process, port or program prevents the start."""

    code = 1130


class LinkError(FedSpanError):
    """A SuperLink cannot be trusted, or does not let this site in."""

    code = 1140


class UnreachableError(LinkError):
    """Nobody answers at the SuperLink's address; it may come up yet."""

    code = 1141


def kind_of(error: BaseException) -> str:
    """The name by which a run's records know an error: its class."""
    return type(error).__name__


#: What a site may answer with; of any other ``FedSpanError`` the nearest of these above it in the tree.
AT_A_SITE: tuple[type[FedSpanError], ...] = (FedSpanError, ConfigError, DataError, ModelError, SelectionError)
AT_A_SITE += (TrainingError, DivergedError, StaleStateError, WorkerDied, WireError, PolicyError, LedgerError)
#: Those that say nothing of rows, so that their code and text leave a site with `privacy`, too.
PUBLIC = (ConfigError, ModelError, StaleStateError, WorkerDied, WireError, PolicyError, LedgerError)
#: Kinds of errors that say that numbers overflowed, or soon would: the learning rate is too large.
DIVERGED = frozenset(error.__name__ for error in (DivergedError, DivergedUpdate, DivergedAverage))
