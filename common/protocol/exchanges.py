"""The messages of a masked sum, beside the training message (``common.masking``).

Four exchanges go with a round. *keys*: a site answers with fresh public keys, signed with its identity key. *shares*:
it is sent all keys, and answers with shares of its secrets, sealed for the others. The training message brings the
others' shares; the site answers with masked numbers. *survivors*: it is sent the list of those whose numbers are in the
sum, and signs it. *unmask*: it is sent the signatures, and answers with the shares that unmask the sum, nothing else.

The first two may go ahead: the site's keys of the next round with its masked numbers, and its shares for the next round
with its signature of the list of survivors. Then the next round has no exchanges of its own for them.
"""

from dataclasses import dataclass
from typing import Annotated

from common.protocol.fields import Entry
from common.protocol.kinds import FLAG, blob, matching, whole
from common.protocol.messages import HelloRequest, Reply, TrainReply, TrainRequest

KEYS, SHARES, SURVIVORS, UNMASK = STAGES = ("keys", "shares", "survivors", "unmask")
ACTION = "masking"  # Flower's message types are query.masking and train.masking
_PAYLOAD = blob(2**22)  # records of some ten thousand members
_STAGE = matching("|".join(STAGES), ", ".join(STAGES))


@dataclass(frozen=True, kw_only=True)
class ExchangeRequest(HelloRequest):
    """One of the four exchanges of a masked sum."""

    server_round: Annotated[int, Entry("server-round", whole(1), "number of the round")]
    attempt: Annotated[int, Entry("attempt", whole(0), "how often the round was begun before")]
    stage: Annotated[str, Entry("stage", _STAGE, "which exchange")]
    payload: Annotated[bytes, Entry("payload", _PAYLOAD, "keys of all members, list of survivors, or signatures of it")]
    ahead: Annotated[
        bytes | None,
        Entry("ahead", _PAYLOAD, "with the list of survivors: keys of the next round's members", optional=True),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ExchangeReply(Reply):
    """A site's answer to an exchange."""

    payload: Annotated[
        bytes,
        Entry(
            "payload",
            _PAYLOAD,
            "public keys of the round with a signature; shares sealed for the other sites; a signature of the list of "
            "survivors; or shares that unmask the sum",
        ),
    ]
    ahead: Annotated[
        bytes | None,
        Entry(
            "ahead",
            _PAYLOAD,
            "with a signature of the list of survivors: shares for the next round, sealed for the other sites",
            optional=True,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class MaskedTrainRequest(TrainRequest):
    """Train, and answer with masked numbers."""

    attempt: Annotated[int, Entry("attempt", whole(0), "how often the round was begun before")]
    rows: Annotated[int, Entry("most-rows", whole(1), "most training rows of a site in the round")]
    heaviest: Annotated[int, Entry("heaviest", whole(1), "number of rows that weighs 1 in the sum")]
    sealed: Annotated[bytes, Entry("sealed", _PAYLOAD, "shares of the others' secrets, sealed for this site")]
    wants_keys: Annotated[bool, Entry("wants-keys", FLAG, "whether the site is to send keys of the next round, too")]


@dataclass(frozen=True, kw_only=True)
class MaskedTrainReply(TrainReply):
    """A site's masked numbers; they have the names of the tensors that were trained."""

    weight: Annotated[int, Entry("masked-weight", whole(0), "the site's weight in the sum, masked")]
    next_keys: Annotated[
        bytes | None, Entry("next-keys", _PAYLOAD, "public keys of the next round with a signature", optional=True)
    ] = None
