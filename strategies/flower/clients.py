"""The server's knowledge of the clients: what each holds, and which work it was given."""

from dataclasses import dataclass, field

from common.errors import RefusedUpdate, WireError
from common.protocol import wire
from common.protocol.digest import tensors_digest
from common.protocol.factors import Factors, unpack
from common.protocol.messages import TrainReply
from strategies.admission.well_formed import most_bytes
from strategies.rule import Rule, Tensors

_ALPHAS = (1e-6, 1e6)  # allowed for an alpha that a client reports: products and rescaled states stay finite


@dataclass
class Client:
    """The server's knowledge of one client node."""

    name: str
    rank: int | None = None
    lora_alpha: float | None = None
    held: dict[str, str] = field(default_factory=dict)  # frozen tensors at the client: name -> digest
    has_base: bool = False  # whether the client has the base model, which is the first version
    version: str | None = None  # the latest version that the client holds, beside the first

    def forget(self) -> None:
        """Assume that the client holds nothing but the base model, until its next reply shows more."""
        self.held, self.version = {}, None


@dataclass(frozen=True)
class Start:
    """The work that a node was given; what the server has noted decides, not what a reply says.

    Attributes:
        server_round: the round, from 1.
        state: the state that the node started from.
        active: names of the tensors that the node trains.
        version: the state's version; None under a strategy without versions.
    """

    server_round: int = 0
    state: Tensors = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    version: str | None = None


def read_tensors(
    rule: Rule, client: str, reply: TrainReply, expected: Tensors, start: Start
) -> tuple[Tensors, dict[str, Factors]]:
    """A reply's dense tensors, and its changes in factors.

    Args:
        rule: says what may come in which form.
        client: the client's name.
        reply: the reply.
        expected: every tensor as the client was to hold it at the start.
        start: the work that the client was given.

    Raises:
        RefusedUpdate: a tensor cannot be read.
    """
    weights = start.active if rule.section.trains == "weights" else []  # LoRA's A and B are sent dense
    shapes = {name: tuple(expected[name].shape) for name in weights}
    any_rank = rule.section.mixed_ranks
    most = most_bytes(expected, in_factors=bool(weights), any_rank=any_rank, max_rank=rule.max_rank)
    try:
        return unpack(wire.decode(reply.arrays, most), shapes, rule.exchange(start.server_round))
    except WireError as error:
        raise RefusedUpdate(f"{client}: {error}") from None


def lora_alpha_of(client: str, told: float | None, common: float | None, *, mixed: bool) -> float | None:
    """A client's alpha: as reported, else the federation's.

    Args:
        client: the client's name.
        told: the alpha that it reports.
        common: the federation's.
        mixed: whether alphas may differ between clients.

    Raises:
        RefusedUpdate: the alpha is not the federation's, or out of range.
    """
    if told is None:
        return common
    if common not in (None, told) and not mixed:
        raise RefusedUpdate(f"{client}: lora-alpha is {told}; the federation's is {common}")
    if told != common and not _ALPHAS[0] <= told <= _ALPHAS[1]:
        raise RefusedUpdate(f"{client}: lora-alpha is {told}; allowed: {_ALPHAS[0]:g} to {_ALPHAS[1]:g}")
    return told


def check_acknowledged(client: str, acknowledged: str | None, frozen: Tensors) -> None:
    """Raise a RefusedUpdate for a reply whose digest of the frozen tensors is missing or not the federation's."""
    if acknowledged is None:
        raise RefusedUpdate(
            f"{client}: the reply holds neither the {len(frozen)} frozen tensors nor their digest "
            "('frozen-digest' in 'config')"
        )
    if acknowledged != (digest := tensors_digest(frozen)):
        raise RefusedUpdate(
            f"{client}: its frozen tensors differ from the federation's "
            f"(digest {acknowledged[:16]}, expected {digest[:16]})"
        )
