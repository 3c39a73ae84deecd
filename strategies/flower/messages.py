"""The messages of a round under a rule: which tensors to send to each client, and which replies to admit.

The server sends a client only the tensors that the client does not hold yet. A client keeps the tensors that were
frozen in its last round, and its reply holds their digest; all other tensors are sent again. So FFA-LoRA's A and
RoLoRA's frozen factor are sent once, and a late joiner or a returning client receives what it lacks without any special
case (decision 003).

Where a rule makes each state from the last one by a step (FedFTG, in factors), FedSpan's round loop sends a client the
steps from the client's version to the latest, if the steps are smaller than the state. A client that has the base model
holds the first version (decision 005).

``common.protocol.messages`` declares the names and contents of the messages.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

from flwr.app import ArrayRecord
from torch import Tensor

from common.config.aggregation import ServerOptimizerConfig
from common.errors import RefusedUpdate
from common.protocol import wire
from common.protocol.digest import tensor_digest, tensors_digest
from common.protocol.messages import State, TrainReply
from common.protocol.versions import Step
from strategies.admission.well_formed import admit, admit_factors
from strategies.combine.stale import staleness
from strategies.flower.clients import Client, Start, check_acknowledged, lora_alpha_of, read_tensors
from strategies.flower.versions import Versions
from strategies.lora_names import check_state, rank_of
from strategies.rule import RoundResult, Rule, Tensors, Update
from strategies.server_optimizer import ServerOptimizer
from strategies.way_down import WayDown


class RuleMessages:
    """A ``Rule`` with its messages: the interface of a strategy to the round loop.

    Args:
        rule: says which tensors are trained, and aggregates updates.
        server_optimizer: optimizer that the server applies to the averaged update, with the average as its gradient.
            None: apply the average directly, as FedAvg does.

    Attributes:
        clients: the server's knowledge of every node, by node id.
        versions: the state's versions, when clients are sent steps; None: clients are sent tensors.
        earlier: the work of nodes that still train from an earlier version, by node id; see ``keep_open``.
        way_down: publishes the state in steps of bounded rank; None: every step is the round's whole change.

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
        self.earlier: dict[int, Start] = {}
        self._given = Start()  # the work of all other nodes
        self.way_down: WayDown | None = None
        self._state: Tensors = {}
        self._active: list[str] = []
        self._bundled = False  # any Flower client reads plain arrays
        self._mixed_alphas = rule.section.mixed_ranks

    def begin(
        self,
        state: Tensors,
        versions: Versions | None = None,
        moments: Mapping[str, Tensors] | None = None,
        waiting: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Prepare for FedSpan's own clients, which read bundled arrays and steps, and use the federation's alpha.

        Args:
            state: the state that the next round starts from.
            versions: the state's versions, from a checkpoint; None: the state is the base model's, which clients have.
            moments: the server optimizer's moments, from a checkpoint; None: the optimizer starts new.
            waiting: changes that wait to be sent (``strategies.way_down``), from a checkpoint.
        """
        self._bundled, self._mixed_alphas = True, False
        if self.server_optimizer is not None:
            self.server_optimizer.moments = {kind: dict(named) for kind, named in (moments or {}).items()}
        if self.rule.section.changes_base:
            self.versions = versions or Versions(state)
        if (rank := self.rule.downlink_rank()) is not None:
            self.way_down = WayDown(rank, waiting)

    def combine(self, server_round: int, state: Tensors, updates: Iterator[Update]) -> RoundResult:
        """Aggregate a round's updates (``Rule.aggregate``), and apply the server optimizer and the way down."""
        if self.way_down is not None:
            outcome = self.way_down.aggregate(self.rule, self.server_optimizer, server_round, state, updates)
        else:
            outcome = self.rule.aggregate(server_round, state, updates)
            if self.server_optimizer is not None:
                outcome = self.server_optimizer.step(self.rule.active(server_round, state), state, outcome)
        if self.versions is not None:
            self.versions.advance(outcome)
        return outcome

    def settle(self, before: Tensors, state: Tensors) -> Tensors:
        """Publish what waits: the last round's result, from ``before``, in place of ``state``, which no client has."""
        if self.way_down is None or not self.way_down.waiting or self.versions is None:
            return state
        self.versions.amend(self.way_down.settle(before, state))
        return self.versions.state

    def client(self, node_id: int) -> Client:
        """The server's knowledge of a node; a node never seen before holds nothing."""
        return self.clients.setdefault(node_id, Client(f"node-{node_id}"))

    def train_states(self, server_round: int, state: Tensors, node_ids: Iterable[int]) -> list[tuple[int, State]]:
        """The state to send to each node for a round's training: (node id, state) pairs.

        Raises:
            AggregationError: a LoRA state holds a factor that the rule would not know as one.
        """
        if self.rule.section.trains == "lora":
            check_state(state, self.rule.section.stays_at_site)
        self._state, self._active = state, self.rule.active(server_round, state)
        version = None if self.versions is None else self.versions.latest
        self._given, nodes = Start(server_round, state, self._active, version), list(node_ids)
        for node_id in nodes:
            self.earlier.pop(node_id, None)
        return list(self._states(server_round, nodes, trained=True))

    def given(self, node_id: int) -> Start:
        """The work that a node was given last."""
        return self.earlier.get(node_id, self._given)

    def keep_open(self, node_ids: Iterable[int], store: Callable[[int, Tensors], Tensors]) -> None:
        """Remember the work of nodes that go on with it while the next version is made, and forget all other work.

        Args:
            node_ids: the nodes.
            store: takes a round and the state that it started from; gives the state in a form that takes no memory.
        """
        going_on = {node_id: self.given(node_id) for node_id in node_ids}
        if any(start is self._given for start in going_on.values()):
            aside = replace(self._given, state=store(self._given.server_round, self._given.state))
            going_on = {n: aside if start is self._given else start for n, start in going_on.items()}
        self.earlier = going_on

    def carried_over(self, update: Update, node_id: int, server_round: int, state: Tensors) -> Update:
        """A node's admitted update for the version that ``server_round`` makes of ``state``."""
        start = self.given(node_id)
        age = server_round - start.server_round
        if age == 0:
            return update
        return self.rule.carried_over(replace(update, age=age, norms={}), start.state, state, staleness(age))

    def evaluate_states(self, version: int, state: Tensors, node_ids: Iterable[int]) -> list[tuple[int, State]]:
        """The state to send to each node to evaluate the state after round ``version``: (node id, state) pairs."""
        self._state, self._active = state, []
        return list(self._states(version, node_ids, trained=False))

    def _states(self, server_round: int, node_ids: Iterable[int], *, trained: bool) -> Iterator[tuple[int, State]]:
        records: dict[object, ArrayRecord] = {}  # clients that need the same tensors share one encoded record
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

    def model_state(
        self, number: int, state: Tensors, version: str | None, node_id: int, form: Literal["name", "steps", "whole"]
    ) -> State:
        """The state after round ``number``, for a site that is to write its model.

        Args:
            number: the round.
            state: the state, which is sent in the federation's rank.
            version: the state's version; None under a strategy without versions.
            node_id: the node.
            form: "name": nothing but the version; "steps": the steps to it, or, where there are none, all of it.
        """
        self._state, steps, since = state, None, None
        if form == "steps":
            since, steps = self._steps_for(self.client(node_id))
        whole = form == "whole" or (form == "steps" and steps is None)
        return State(
            server_round=number,
            active=[],
            version=version,
            since=since,
            arrays=wire.encode(self.rule.state_for(state, None, None) if whole else {}, bundled=self._bundled),
            steps={step.server_round: wire.encode(step.tensors, bundled=True) for step in steps or []},
        )

    def _steps_for(self, client: Client) -> tuple[str | None, list[Step] | None]:
        """The version that the client holds and the steps from there to the latest; (None, None): send tensors."""
        if self.versions is not None and self.versions.state is self._state:
            for version in (client.version, self.versions.first if client.has_base else None):
                if version is not None and (steps := self.versions.since(version)) is not None:
                    return version, steps
        return None, None

    def base_of(self, node_id: int) -> Tensors:
        """The state that a node trained from, in the rank and scaling of the node's last reply."""
        client = self.client(node_id)
        return self.rule.state_for(self.given(node_id).state, client.rank, client.lora_alpha)

    def admit(self, reply: TrainReply, node_id: int) -> Update:
        """Check a reply to the work that a node was given and return the update in it.

        Args:
            reply: a training reply whose form was checked when it was read.
            node_id: the node that sent the reply.

        Raises:
            RefusedUpdate: the update is rejected; the text names the client and the reason.
        """
        client, start = self._answered(reply, node_id), self.given(node_id)
        expected = self.rule.state_for(start.state, None, None)
        tensors, changes = read_tensors(self.rule, client.name, reply, expected, start)
        admitted = admit(
            client.name,
            tensors,
            expected,
            [name for name in start.active if name not in changes],
            any_rank=self.rule.section.mixed_ranks,
            max_rank=self.rule.max_rank,
        )
        admit_factors(client.name, changes)
        frozen = {name: expected[name] for name in expected if name not in start.active}
        if self.versions is None and not frozen.keys() <= tensors.keys():
            check_acknowledged(client.name, reply.frozen_digest, frozen)
            client.held = {name: tensor_digest(t) for name, t in frozen.items()}
        client.lora_alpha = self._lora_alpha(client, reply.lora_alpha)
        if self.rule.section.mixed_ranks:
            client.rank = rank_of(admitted)
        return Update(client.name, reply.num_examples, admitted, client.lora_alpha, changes)

    def acknowledge(self, reply: TrainReply, node_id: int) -> None:
        """Check all but the tensors of a reply: those of a masked one tell nothing, those of one too late do not count.

        Raises:
            RefusedUpdate: the reply is of another round, or from another state, or of another alpha.
        """
        client, start = self._answered(reply, node_id), self.given(node_id)
        frozen = {name: tensor for name, tensor in start.state.items() if name not in start.active}
        if self.versions is None:
            if frozen:
                check_acknowledged(client.name, reply.frozen_digest, frozen)
            client.held = {name: tensor_digest(tensor) for name, tensor in frozen.items()}
        client.lora_alpha = self._lora_alpha(client, reply.lora_alpha)

    def _answered(self, reply: TrainReply, node_id: int) -> Client:
        """The client of a reply, whose round is the one it was asked for; what it holds is what the reply says."""
        client, start = self.client(node_id), self.given(node_id)
        client.forget()
        if start.version is not None and reply.version == start.version:
            client.version = start.version  # also when the update is rejected later
        about = reply.server_round
        if about != start.server_round:
            raise RefusedUpdate(f"{client.name}: the update is of round {about}, this is round {start.server_round}")
        return client

    def _lora_alpha(self, client: Client, told: float | None) -> float | None:
        """The client's alpha: as reported, else the federation's; base weights have no alpha to report."""
        reported = None if self.rule.section.trains == "weights" else told
        return lora_alpha_of(client.name, reported, self.rule.lora_alpha, mixed=self._mixed_alphas)
