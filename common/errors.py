"""Every error a user can meet, on one page.

    FedSpanError
    ├── ConfigError          a federation or site file is wrong (names file, key and what is allowed)
    ├── DataError            a shard is missing, empty or malformed (names file, column, row number; never content)
    ├── ModelError           a model folder is absent, unreadable or of an unknown family
    │   └── SelectionError   `modules` / `blocks` match no tensor of the model
    ├── TrainingError        local training cannot start or cannot go on
    │   └── StaleStateError  a site lacks what a message builds on; it is then sent everything
    ├── WireError            a message holds a tensor that cannot be read or is not what was asked for
    ├── PolicyError          a site's policy does not allow what was asked, or what would leave
    ├── LedgerError          a site's ledger is damaged or cannot be written; nothing leaves then
    ├── RefusedUpdate        one client's reply was not admitted to the average (names client and tensor)
    ├── AggregationError     the admitted replies cannot be combined
    ├── FederationError      the run as a whole cannot go on (names who is missing and why)
    ├── LaunchError          a process, port or run folder prevents the start
    └── LinkError            a SuperLink cannot be trusted or does not let this site in (names host and file)
        └── UnreachableError nobody answers there; it may come up yet

The text of an error says what, where, and what is allowed. It never holds a row of a private shard: a site sends
the text of a ``FedSpanError`` to the operator, and of any other exception only its type and place.
"""


class FedSpanError(Exception):
    """Base of all errors that FedSpan raises for a reason that its user can mend."""


class ConfigError(FedSpanError):
    """A federation or site file is wrong."""


class DataError(FedSpanError):
    """A shard is missing, empty or malformed."""


class ModelError(FedSpanError):
    """A model folder is absent, unreadable or of an unknown family."""


class SelectionError(ModelError):
    """The selection of trained tensors matches nothing in the model."""


class TrainingError(FedSpanError):
    """Local training cannot start or cannot go on."""


#: Code of the reply that a site's worker gives when the process that did the work has died (``client.connect.worker``).
WORKER_DIED = 1002


class StaleStateError(TrainingError):
    """A site lacks what a message builds on, and must be sent everything."""

    #: Code of the reply, by which the server knows it (Flower's own codes are below 1000).
    code = 1001


class WireError(FedSpanError):
    """A message holds a tensor that cannot be read or is not what was asked for."""


class PolicyError(FedSpanError):
    """A site's policy does not allow what was asked, or what would leave."""


class LedgerError(FedSpanError):
    """A site's ledger is damaged or cannot be written; nothing leaves then."""


class RefusedUpdate(FedSpanError):  # noqa: N818 - a refusal is an outcome of admission, not a fault of the program
    """One client's reply was not admitted to the average."""


class AggregationError(FedSpanError):
    """The admitted replies cannot be combined."""


class FederationError(FedSpanError):
    """The run as a whole cannot go on."""


class LaunchError(FedSpanError):
    """A process, port or run folder prevents the start."""


class LinkError(FedSpanError):
    """A SuperLink cannot be trusted, or does not let this site in."""


class UnreachableError(LinkError):
    """Nobody answers at the SuperLink's address; it may come up yet."""
