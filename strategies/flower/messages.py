"""The messages of a round under a rule: what is sent to whom, and which replies are believed.

A client is sent just the tensors it does not hold yet: it keeps the tensors that were frozen in its last round (their
digest comes back in its reply), all others are sent anew. So FFA-LoRA's A and RoLoRA's idle factor travel once, and a
late joiner or a returner receives what it lacks without any special case.

Where a rule makes each state of the last one by a step (FedFTG, in factors), a client under FedSpan's round loop is
sent the steps from the version that it holds, if these are smaller than the state; who has the base model holds the
first version.

What a message holds, and under which names, is declared in ``common.protocol.messages``.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import ArrayRecord

from common.config.aggregation import ServerOptimizerConfig
from common.errors import RefusedUpdate, WireError
from common.protocol import wire
from common.protocol.digest import tensor_digest, tensors_digest
from common.protocol.factors import Factors, unpack
from common.protocol.messages import State, TrainReply
from common.protocol.versions import Step
from strategies.admission.well_formed import admit, admit_factors
from strategies.flower.versions import Versions
from strategies.lora_names import rank_of
from strategies.rule import Outcome, Rule, Tensors, Update
from strategies.server_optimizer import ServerOptimizer

_ALPHAS = (1e-6, 1e6)  # of a client's own: products in it, and what it is sent for it, stay finite


@dataclass
class Client:
    """What the server knows of one client node."""

    name: str
    rank: int | None = None
    lora_alpha: float | None = None
    held: dict[str, str] = field(default_factory=dict)  # tensor name -> digest
    has_base: bool = False  # whether it has the base model, which is the first version
    version: str | None = None  # which version it holds besides

    def forget(self) -> None:
        """Until its next reply proves otherwise, the client holds nothing but the base model."""
        self.held, self.version = {}, None


class RuleMessages:
    """Who is sent what under a ``Rule``, and which replies are believed: all that the round loop asks of a strategy.

    Args:
        rule: what is trained and how replies are combined.
        server_optimizer: how the server goes along the averaged change; None: as far as it goes.

    Attributes:
        clients: what is known of every node, by its id.
        versions: of the state, when it travels in steps; None: it does not.

    Raises:
        ValueError: the rule takes no server optimizer.
    """

    def __init__(self, rule: Rule, server_optimizer: ServerOptimizerConfig | None) -> None:
        if server_optimizer is not None and not rule.section.takes_server_optimizer:
            name = type(rule).__name__
            raise ValueError(f"{name}: the change of its state is no mean of changes; it takes no server_optimizer")
        self.rule = rule
        self.clients: dict[int, Client] = {}
        self.server_optimizer = None if server_optimizer is None else ServerOptimizer(server_optimizer)
        self.versions: Versions | None = None
        self._state: Tensors = {}
        self._active: list[str] = []
        self._round = 0
        self._bundled = False  # any Flower client reads plain arrays
        self._mixed_alphas = rule.section.mixed_ranks

    def begin(
        self, state: Tensors, versions: Versions | None = None, moments: Mapping[str, Tensors] | None = None
    ) -> None:
        """Send clients only what they lack, in the form that FedSpan's own read, whose alpha is the federation's.

        Args:
            state: what the first round, or the next one, starts from.
            versions: how it came about; None: it is the base model's, which the clients have.
            moments: of the server optimizer after the last round; None: there was none.
        """
        self._bundled, self._mixed_alphas = True, False
        if self.server_optimizer is not None:
            self.server_optimizer.moments = {kind: dict(named) for kind, named in (moments or {}).items()}
        if self.rule.section.changes_base:
            self.versions = versions or Versions(state)

    def combine(self, server_round: int, state: Tensors, updates: Iterator[Update]) -> Outcome:
        """The outcome of a round; see ``Rule.aggregate``."""
        outcome = self.rule.aggregate(server_round, state, updates)
        if self.server_optimizer is not None:
            outcome = self.server_optimizer.step(self.rule.active(server_round, state), state, outcome)
        if self.versions is not None:
            self.versions.advance(outcome)
        return outcome

    def client(self, node_id: int) -> Client:
        """What is known of a node; a node never seen before holds nothing."""
        return self.clients.setdefault(node_id, Client(f"node-{node_id}"))

    def train_states(self, server_round: int, state: Tensors, node_ids: Iterable[int]) -> list[tuple[int, State]]:
        """What each node needs for a round's training, by its id."""
        self._state, self._active, self._round = state, self.rule.active(server_round, state), server_round
        return list(self._states(server_round, node_ids, trained=True))

    def evaluate_states(self, version: int, state: Tensors, node_ids: Iterable[int]) -> list[tuple[int, State]]:
        """What each node needs to evaluate the state after round ``version``; nothing is trained."""
        self._state, self._active = state, []
        return list(self._states(version, node_ids, trained=False))

    def _states(self, server_round: int, node_ids: Iterable[int], *, trained: bool) -> Iterator[tuple[int, State]]:
        records: dict[object, ArrayRecord] = {}  # clients that need the same tensors share one record
        version = None if self.versions is None else self.versions.latest
        for node_id in node_ids:
            client = self.client(node_id)
            since, steps = self._steps_for(client)
            if steps is not None:
                for step in steps:
                    if step.server_round not in records:
                        records[step.server_round] = wire.encode(step.tensors, bundled=True)
                arrays, digest = ArrayRecord(), None
            else:
                fitted = self.rule.state_for(self._state, client.rank, client.lora_alpha)
                frozen = {name: tensor for name, tensor in fitted.items() if name not in self._active}
                need = [n for n, t in fitted.items() if not (n in client.held and client.held[n] == tensor_digest(t))]
                key = (client.rank, client.lora_alpha, *need)
                if key not in records:
                    records[key] = wire.encode({name: fitted[name] for name in need}, bundled=self._bundled)
                arrays = records[key]
                digest = tensors_digest(frozen) if frozen and trained and self.versions is None else None
            yield (
                node_id,
                State(
                    server_round=server_round,
                    active=self._active,
                    version=version,
                    since=since,
                    frozen_digest=digest,
                    arrays=arrays,
                    steps={step.server_round: records[step.server_round] for step in steps or []},
                ),
            )

    def _steps_for(self, client: Client) -> tuple[str | None, list[Step] | None]:
        """From which version the client is sent steps, and these; None when it is sent the state."""
        if self.versions is not None and self.versions.state is self._state:
            for version in (client.version, self.versions.first if client.has_base else None):
                if version is not None and (steps := self.versions.since(version)) is not None:
                    return version, steps
        return None, None

    def base_of(self, node_id: int) -> Tensors:
        """What a node trained from in the current round, in the rank and scaling of its last reply."""
        client = self.client(node_id)
        return self.rule.state_for(self._state, client.rank, client.lora_alpha)

    def admit(self, reply: TrainReply, node_id: int) -> Update:
        """The update in a reply to the current round.

        Args:
            reply: as it was read.
            node_id: whose it is.

        Raises:
            RefusedUpdate: it is not admitted; the text says why and whose.
        """
        client = self.client(node_id)
        client.forget()
        if self.versions is not None and reply.version == self.versions.latest:
            client.version = self.versions.latest  # whatever its update is worth
        about = reply.server_round
        if about != self._round:
            raise RefusedUpdate(f"{client.name}: the update is of round {about}, this is round {self._round}")
        expected = self.rule.state_for(self._state, None, None)
        tensors, changes = self._read_tensors(client, reply.arrays, expected)
        admitted = admit(
            client.name,
            tensors,
            expected,
            [name for name in self._active if name not in changes],
            any_rank=self.rule.section.mixed_ranks,
            max_rank=self.rule.max_rank,
        )
        admit_factors(client.name, changes)
        frozen = {name: expected[name] for name in expected if name not in self._active}
        if self.versions is None and not frozen.keys() <= tensors.keys():
            _check_acknowledged(client.name, reply.frozen_digest, frozen)
            client.held = {name: tensor_digest(t) for name, t in frozen.items()}
        client.lora_alpha = self._lora_alpha(client, reply.lora_alpha)
        if self.rule.section.mixed_ranks:
            client.rank = rank_of(admitted)
        return Update(client.name, reply.num_examples, admitted, client.lora_alpha, changes)

    def _lora_alpha(self, client: Client, told: float | None) -> float | None:
        """The alpha of a reply; a client that tells none has the federation's, and of base weights there is none."""
        common = self.rule.lora_alpha
        if told is None or self.rule.section.trains == "weights":
            return common
        if common not in (None, told) and not self._mixed_alphas:
            raise RefusedUpdate(f"{client.name}: lora-alpha is {told}; the federation's is {common}")
        if told != common and not _ALPHAS[0] <= told <= _ALPHAS[1]:
            raise RefusedUpdate(f"{client.name}: lora-alpha is {told}; allowed: {_ALPHAS[0]:g} to {_ALPHAS[1]:g}")
        return told

    def _read_tensors(
        self, client: Client, arrays: ArrayRecord, expected: Tensors
    ) -> tuple[Tensors, dict[str, Factors]]:
        """What a reply holds whole, and what in factors."""
        weights = self._active if self.rule.section.trains == "weights" else []  # a LoRA factor comes whole
        shapes = {name: tuple(expected[name].shape) for name in weights}
        try:
            return unpack(wire.decode(arrays), shapes, self.rule.exchange(self._round))
        except WireError as error:
            raise RefusedUpdate(f"{client.name}: {error}") from None


def _check_acknowledged(client: str, acknowledged: str | None, frozen: Tensors) -> None:
    """Whether a client's digest of the frozen tensors is the federation's."""
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
