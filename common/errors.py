"""Every error a user can meet, on one page.

    FedSpanError               an error that a user can fix
    ├── ConfigError            a federation or site file, or an argument, is wrong (names key and what is allowed)
    ├── DataError              a shard is missing, empty or malformed (names file, column, row number; never content)
    ├── ModelError             a model folder is absent, unreadable, incomplete or not to be trained
    │   └── SelectionError     `modules` / `blocks` match no tensor of the model
    ├── TrainingError          local training cannot start or cannot go on
    │   ├── DivergedError      its numbers overflowed: the learning rate is too large
    │   └── StaleStateError    a site lacks the state that a message builds on; the server resends everything
    ├── WorkerDied             a site's worker process ended at work; the server resends the message, once
    ├── WireError              a message cannot be read, or is not what was asked for
    ├── PolicyError            a site's policy does not allow what was asked, or what would leave
    ├── LedgerError            a site's ledger is damaged or cannot be written; nothing leaves then
    ├── RefusedUpdate          admission rejected a client's reply (names client and tensor)
    │   └── DivergedUpdate     the reply's numbers are not finite, or too large to compute with
    ├── AggregationError       the admitted replies cannot be aggregated
    │   └── DivergedAverage    the aggregate is not finite, or too large to compute with
    ├── FederationError        the run as a whole cannot go on (names who is missing and why)
    ├── RunFolderError         the folder of a run or experiment is missing, damaged, in use, or of another one
    ├── RunFailed              a run ended without a result (carries its reason)
    ├── LaunchError            a process, port or program prevents the start
    └── LinkError              a SuperLink cannot be trusted or does not let this site in (names host and file)
        └── UnreachableError   nobody answers at the SuperLink's address; it may come up later

The text of an error names the mistake, its place, and the allowed values. It never holds a row of a private shard: a
site sends the text of a ``FedSpanError`` to the operator, and for any other exception only type and place. Once rows
are touched for a message, errors that may come from them (all but ``PUBLIC``) are answered with a sentence of ``SAID``.

Programs read two numbers, never the text. ``code`` names the class in a site's reply (``common.protocol.messages``);
Flower's own codes are below 1000. ``exit_code`` is a command's: 2 when a file or an argument is wrong, 1 otherwise.
"""

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar


class FedSpanError(Exception):
    """Base of all errors that FedSpan raises for a reason that a user can fix."""

    code: ClassVar[int] = 1000
    exit_code: ClassVar[int] = 1


class ConfigError(FedSpanError):
    """A federation or site file, or an argument, is wrong."""

    code, exit_code = 1010, 2


class DataError(FedSpanError):
    """A shard is missing, empty or malformed."""

    code, exit_code = 1020, 2


class ModelError(FedSpanError):
    """A model folder is absent, unreadable, incomplete or not to be trained."""

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
    """A site lacks the state that a message builds on; the server must resend everything."""

    code = 1001


class WorkerDied(FedSpanError):  # noqa: N818 - it names what happened, as the operator reads it
    """The process that did a site's work ended before it answered.

    Then ``client.connect.worker_supervisor`` answers the message with this error.
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
    """Admission rejected a client's reply."""

    code = 1080


class DivergedUpdate(RefusedUpdate):
    """A client's update holds numbers that are not finite, or too large to compute with."""

    code = 1081


class AggregationError(FedSpanError):
    """The admitted replies cannot be aggregated."""

    code = 1090


class DivergedAverage(AggregationError):  # noqa: N818 - as ``DivergedUpdate``
    """The aggregate of the replies is not finite, or too large to compute with."""

    code = 1091


class FederationError(FedSpanError):
    """The run as a whole cannot go on.

    Attributes:
        causes: kind (see ``kind_of``) of the error of every site that failed or was rejected; "server": its own error.
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
    """Nobody answers at the SuperLink's address; the SuperLink may come up later."""

    code = 1141


def kind_of(error: BaseException) -> str:
    """The kind of an error in a run's records: the name of its class."""
    return type(error).__name__


def place_of(error: BaseException) -> str:
    """Type and place of an error whose text may quote a row."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{kind_of(error)} at {Path(place.filename).name}:{place.lineno}"


#: Errors that a site may answer with; any other ``FedSpanError`` becomes its nearest base class among these.
AT_A_SITE: tuple[type[FedSpanError], ...] = (FedSpanError, ConfigError, DataError, ModelError, SelectionError)
AT_A_SITE += (TrainingError, DivergedError, StaleStateError, WorkerDied, WireError, PolicyError, LedgerError)
#: Errors that do not depend on rows, so that their code and text may leave a site with `privacy`, too.
PUBLIC = (ConfigError, ModelError, StaleStateError, WorkerDied, WireError, PolicyError, LedgerError)
#: Texts, by class, that replace all other errors' texts once a round or an evaluation is charged. With `privacy` a site
#: always sends the last one, with its code.
SAID: dict[type, str] = {
    DataError: "its shard cannot be used",
    DivergedError: "the numbers of its training overflowed; lower training.learning_rate",
    TrainingError: "its training could not start or go on, as when memory runs out",
    FedSpanError: "this site could not do its part",
}
#: Kinds of errors for numbers that overflowed, or soon would: the learning rate is too large.
DIVERGED = frozenset(error.__name__ for error in (DivergedError, DivergedUpdate, DivergedAverage))
