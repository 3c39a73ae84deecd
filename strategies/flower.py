"""Each rule as a Flower strategy: who is asked, what is sent, which replies are believed.

The only file of this folder that knows Flower. A client is sent just the tensors it does not hold yet: it keeps the
tensors that were frozen in its last round (their digest comes back in its reply), all others are sent anew. So
FFA-LoRA's A and RoLoRA's idle factor travel once, and a late joiner or a returner receives what it lacks without any
special case.

Where a rule makes each state of the last one by a step (FedFTG, in factors), a client under FedSpan's round loop is
sent the steps from the version that it holds, if these are smaller than the state; who has the base model holds the
first version.

Records, as in Flower's own strategies: "arrays", "config", "metrics" with "num-examples". The config that a client
receives holds ``server-round``, ``active`` (names of the tensors to train and return) and ``frozen-digest`` (see
``common.digest.tensors_digest``). A client returns the active tensors, and for the frozen ones either the tensors
themselves or, when it keeps them for its next round, their digest as ``frozen-digest`` in its own "config" record.
With steps, "arrays" is empty, records ``step-<round>`` hold them, and the config says from which version (``since``)
to which (``version``) they lead; a client that keeps what it has read returns ``version``.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from logging import WARNING
from typing import Any, TypedDict, Unpack

from flwr.app import (
    DEFAULT_TTL,
    ArrayRecord,
    ConfigRecord,
    ConfigRecordValues,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from common import wire
from common.config import ServerOptimizerConfig
from common.digest import tensor_digest, tensors_digest
from common.errors import AggregationError, RefusedUpdate, WireError
from common.factors import Factors, unpack
from common.records import get_record
from common.versions import Step
from strategies.admission import admit, admit_factors
from strategies.lora_names import rank_of
from strategies.rule import Outcome, Rule, Tensors, Update
from strategies.server_optimizer import ServerOptimizer
from strategies.streaming import StreamingGrid
from strategies.versions import Versions

MetricsFn = Callable[[list[RecordDict], str], MetricRecord]


@dataclass
class Client:
    """What the server knows of one client node."""

    name: str
    rank: int | None = None
    lora_alpha: float | None = None
    held: dict[str, str] = field(default_factory=dict)  # tensor name -> digest
    has_base: bool = False  # whether it has the base model, which is the first version
    version: str | None = None  # which version it holds besides


class FedAvgOptions(TypedDict, total=False):
    """Keyword options of ``flwr.serverapp.strategy.FedAvg`` that every strategy here accepts."""

    fraction_train: float
    fraction_evaluate: float
    min_train_nodes: int
    min_evaluate_nodes: int
    min_available_nodes: int
    weighted_by_key: str
    arrayrecord_key: str
    configrecord_key: str
    train_metrics_aggr_fn: MetricsFn
    evaluate_metrics_aggr_fn: MetricsFn


class FlowerOptions(FedAvgOptions, total=False):
    """The same, with the options of ``FlowerStrategy`` itself."""

    seed: int
    join_timeout: float
    server_optimizer: ServerOptimizerConfig | None


class FlowerStrategy(FedAvg):
    """A Flower strategy that follows a ``Rule``.

    Works in two ways: ``start(grid, initial_arrays, ...)`` in any Flower app, and message by message
    (``train_messages``, ``read_update``) under FedSpan's own round loop.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        seed: int = 0,
        join_timeout: float = 300.0,
        server_optimizer: ServerOptimizerConfig | None = None,
        **options: Unpack[FedAvgOptions],
    ) -> None:
        """Make a strategy of ``rule``.

        Args:
            rule: what is trained and how replies are combined.
            seed: of the sampling of clients; the same seed and nodes give the same cohorts.
            join_timeout: seconds that ``configure_train`` waits for ``min_available_nodes``.
            server_optimizer: how the server goes along the averaged change; None: as far as it goes.
            options: FedAvg's own. Metrics are by default averaged by ``weighted_mean``.

        Raises:
            ValueError: the rule takes no server optimizer.
        """
        if server_optimizer is not None and not rule.takes_server_optimizer:
            name = type(rule).__name__
            raise ValueError(f"{name}: the change of its state is no mean of changes; it takes no server_optimizer")
        options.setdefault("train_metrics_aggr_fn", weighted_mean)
        options.setdefault("evaluate_metrics_aggr_fn", weighted_mean)
        super().__init__(**options)
        self.rule = rule
        self.clients: dict[int, Client] = {}
        self.server_optimizer = None if server_optimizer is None else ServerOptimizer(server_optimizer)
        self._seed = seed
        self._join_timeout = join_timeout
        self._state: Tensors = {}
        self._active: list[str] = []
        self._round = 0
        self._bundled = False  # any Flower client reads plain arrays
        self.versions: Versions | None = None

    # What a round sends and believes

    def begin(self, state: Tensors, versions: Versions | None = None, moments: Tensors | None = None) -> None:
        """Send clients only what they lack, in the form that FedSpan's own clients read.

        Args:
            state: what the first round, or the next one, starts from.
            versions: how it came about; None: it is the base model's, which the clients have.
            moments: of the server optimizer after the last round; None: there was none.
        """
        self._bundled = True
        if self.server_optimizer is not None:
            self.server_optimizer.moments = dict(moments or {})
        if self.rule.exchange(1) is not None:
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

    def train_messages(
        self,
        server_round: int,
        state: Tensors,
        node_ids: Iterable[int],
        config: Mapping[str, ConfigRecordValues],
        ttl: float,
    ) -> list[Message]:
        """The training messages of a round, one for each node."""
        self._state, self._active, self._round = state, self.rule.active(server_round, state), server_round
        return self._messages(MessageType.TRAIN, server_round, node_ids, config, ttl)

    def evaluate_messages(
        self,
        server_round: int,
        state: Tensors,
        node_ids: Iterable[int],
        config: Mapping[str, ConfigRecordValues],
        ttl: float,
    ) -> list[Message]:
        """Messages that have nodes evaluate ``state``; nothing is trained, so ``active`` is empty."""
        self._state, self._active = state, []
        return self._messages(MessageType.EVALUATE, server_round, node_ids, config, ttl)

    def _messages(
        self,
        kind: str,
        server_round: int,
        node_ids: Iterable[int],
        config: Mapping[str, ConfigRecordValues],
        ttl: float,
    ) -> list[Message]:
        records: dict[object, ArrayRecord] = {}  # clients that need the same tensors share one record
        messages = []
        for node_id in node_ids:
            client = self.client(node_id)
            content = ConfigRecord({**config, "server-round": server_round, "active": self._active})
            start, steps = self._steps_for(client)
            if steps is not None:
                for step in steps:
                    if step.server_round not in records:
                        records[step.server_round] = wire.encode(step.tensors, bundled=True)
                content["since"] = start
                arrays = {f"step-{s.server_round:06}": records[s.server_round] for s in steps}
                arrays[self.arrayrecord_key] = ArrayRecord()
            else:
                fitted = self.rule.state_for(self._state, client.rank, client.lora_alpha)
                frozen = {name: tensor for name, tensor in fitted.items() if name not in self._active}
                need = [n for n, t in fitted.items() if not (n in client.held and client.held[n] == tensor_digest(t))]
                key = (client.rank, client.lora_alpha, *need)
                if key not in records:
                    records[key] = wire.encode({name: fitted[name] for name in need}, bundled=self._bundled)
                arrays = {self.arrayrecord_key: records[key]}
                if frozen and kind == MessageType.TRAIN and self.versions is None:
                    content["frozen-digest"] = tensors_digest(frozen)
            if self.versions is not None:
                content["version"] = self.versions.latest
            whole = RecordDict({**arrays, self.configrecord_key: content})
            messages.append(Message(whole, node_id, kind, ttl=ttl, group_id=str(server_round)))
        return messages

    def _steps_for(self, client: Client) -> tuple[str, list[Step] | None]:
        """From which version the client is sent steps, and these; None when it is sent the state."""
        if self.versions is not None and self.versions.state is self._state:
            for version in (client.version, self.versions.first if client.has_base else None):
                if version is not None and (steps := self.versions.since(version)) is not None:
                    return version, steps
        return "", None

    def base_of(self, node_id: int) -> Tensors:
        """What a node trained from in the current round, in the rank and scaling of its last reply."""
        client = self.client(node_id)
        return self.rule.state_for(self._state, client.rank, client.lora_alpha)

    def read_update(self, message: Message, node_id: int | None = None) -> Update:
        """The update in a reply to a training message of the current round.

        Args:
            message: the reply.
            node_id: whom it answers for; None: its sender. An error that the SuperLink reports has another sender.

        Raises:
            RefusedUpdate: the reply is an error, cannot be read, or is not admitted; the text says why and whose.
        """
        client = self.client(message.metadata.src_node_id if node_id is None else node_id)
        client.held, client.version = {}, None  # until this reply proves otherwise, the client holds nothing
        if message.has_error():
            raise RefusedUpdate(f"{client.name}: {message.error.reason}")
        metrics = get_record(message.content, "metrics", MetricRecord)
        told = get_record(message.content, self.configrecord_key, ConfigRecord)
        if self.versions is not None and told.get("version") == self.versions.latest:
            client.version = self.versions.latest  # whatever its update is worth
        about = told.get("server-round", self._round)
        if about != self._round:
            raise RefusedUpdate(f"{client.name}: the update is of round {about!r}, this is round {self._round}")
        expected = self.rule.state_for(self._state, None, None)
        tensors, changes = self._read_tensors(client, message.content, expected)
        admitted = admit(
            client.name,
            tensors,
            metrics.get(self.weighted_by_key),
            expected,
            [name for name in self._active if name not in changes],
            any_rank=self.rule.mixed_ranks,
            max_rank=self.rule.max_rank,
        )
        admit_factors(client.name, changes)
        frozen = {name: expected[name] for name in expected if name not in self._active}
        if self.versions is None and not frozen.keys() <= tensors.keys():
            _check_acknowledged(client.name, told.get("frozen-digest"), frozen)
            client.held = {name: tensor_digest(t) for name, t in frozen.items()}
        alpha = metrics.get("lora-alpha")
        if alpha is not None and not (isinstance(alpha, (int, float)) and 0 < alpha < float("inf")):
            raise RefusedUpdate(f"{client.name}: lora-alpha is {alpha!r}; allowed: a positive number")
        if alpha is not None and not self.rule.mixed_ranks and self.rule.lora_alpha not in (None, alpha):
            raise RefusedUpdate(f"{client.name}: lora-alpha is {alpha}; the federation's is {self.rule.lora_alpha}")
        client.lora_alpha = None if alpha is None else float(alpha)
        if self.rule.mixed_ranks:
            client.rank = rank_of(admitted)
        examples = int(metrics[self.weighted_by_key])  # type: ignore[arg-type]
        return Update(client.name, examples, admitted, client.lora_alpha, changes)

    def _read_tensors(
        self, client: Client, content: RecordDict, expected: Tensors
    ) -> tuple[Tensors, dict[str, Factors]]:
        """What a reply holds whole, and what in factors."""
        arrays = content.get(self.arrayrecord_key)
        if not isinstance(arrays, ArrayRecord):
            raise RefusedUpdate(f"{client.name}: the reply has no {self.arrayrecord_key!r} record")
        exchange = self.rule.exchange(self._round)
        try:
            tensors = wire.decode(arrays)
            if exchange is None:
                return tensors, {}
            weights = self._active if self.rule.trains == "weights" else []  # a LoRA factor comes whole
            return unpack(tensors, {name: tuple(expected[name].shape) for name in weights}, exchange)
        except WireError as error:
            raise RefusedUpdate(f"{client.name}: {error}") from None

    # Flower's own verbs

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """As ``flwr.serverapp.strategy.Strategy.start``, but each reply is combined as it arrives, and dropped."""
        streaming: Any = StreamingGrid(grid)
        return super().start(streaming, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample nodes and make their training messages; the caller's records are not changed."""
        if self.fraction_train == 0.0:
            return []
        nodes = self._sample(grid, self.fraction_train, self.min_train_nodes, server_round)
        return self.train_messages(server_round, wire.decode(arrays), nodes, config, DEFAULT_TTL)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine the admitted replies; a refused one is logged with its reason and left out.

        Raises:
            AggregationError: fewer than ``min_train_nodes`` replies were admitted, or they cannot be combined.
        """
        if self.fraction_train == 0.0:
            return None, None
        refused: list[str] = []
        contents: list[RecordDict] = []

        def updates() -> Iterator[Update]:
            for reply in replies:
                try:
                    update = self.read_update(reply)
                except RefusedUpdate as reason:
                    refused.append(str(reason))
                    log(WARNING, "round %s, not admitted: %s", server_round, reason)
                    continue
                contents.append(_scalars(reply.content))
                del reply
                yield update
                del update
            if len(contents) < max(1, self.min_train_nodes):
                reasons = "; ".join(refused) or "no reply was refused"
                raise AggregationError(
                    f"round {server_round}: {len(contents)} admitted updates, {self.min_train_nodes} needed; {reasons}"
                )

        outcome = self.combine(server_round, self._state, updates())
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        return wire.encode(outcome.state), MetricRecord({**metrics, **outcome.diagnostics})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample nodes and make their evaluation messages."""
        if self.fraction_evaluate == 0.0:
            return []
        nodes = self._sample(grid, self.fraction_evaluate, self.min_evaluate_nodes, server_round)
        return self.evaluate_messages(server_round, wire.decode(arrays), nodes, config, DEFAULT_TTL)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Combine the metrics of all replies that have some."""
        contents = []
        for reply in replies:
            if reply.has_error():
                log(WARNING, "round %s, no evaluation: %s", server_round, reply.error.reason)
            elif "metrics" in reply.content:
                contents.append(_scalars(reply.content))
        return self.evaluate_metrics_aggr_fn(contents, self.weighted_by_key) if contents else None

    def _sample(self, grid: Grid, fraction: float, minimum: int, server_round: int) -> list[int]:
        """``max(minimum, fraction * connected)`` nodes, the same for the same seed, round and nodes.

        Raises:
            AggregationError: fewer than ``min_available_nodes`` nodes connected within ``join_timeout`` seconds.
        """
        deadline = time.monotonic() + self._join_timeout
        needed = max(self.min_available_nodes, minimum)
        while len(nodes := sorted(grid.get_node_ids())) < needed:
            if time.monotonic() > deadline:
                raise AggregationError(
                    f"{len(nodes)} of {needed} nodes connected within {self._join_timeout:g} seconds"
                )
            time.sleep(1.0)
        return sample(nodes, fraction, minimum, self._seed, server_round)


def _scalars(content: RecordDict) -> RecordDict:
    """A reply's content without its arrays."""
    return RecordDict({key: part for key, part in content.items() if not isinstance(part, ArrayRecord)})


def _check_acknowledged(client: str, acknowledged: object, frozen: Tensors) -> None:
    """Whether a client's digest of the frozen tensors is the federation's."""
    if acknowledged is None:
        raise RefusedUpdate(
            f"{client}: the reply holds neither the {len(frozen)} frozen tensors nor their digest "
            "('frozen-digest' in 'config')"
        )
    if acknowledged != (digest := tensors_digest(frozen)):
        raise RefusedUpdate(
            f"{client}: its frozen tensors differ from the federation's "
            f"(digest {str(acknowledged)[:16]}, expected {digest[:16]})"
        )


def sample(nodes: list[int], fraction: float, minimum: int, seed: int, server_round: int) -> list[int]:
    """``max(minimum, fraction * len(nodes))`` of ``nodes``, from a generator of its own."""
    size = min(len(nodes), max(minimum, int(fraction * len(nodes))))
    return sorted(random.Random(f"{seed}/{server_round}").sample(nodes, size))  # noqa: S311 - no secret


def weighted_mean(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Mean of every scalar metric over the clients that report it, weighted by ``weighted_by_key``.

    A reply without a positive weight is left out, so that no client can turn a mean round.
    """
    sums: dict[str, tuple[float, float]] = {}
    for content in contents:
        metrics = get_record(content, "metrics", MetricRecord)
        weight = metrics.get(weighted_by_key)
        if not isinstance(weight, (int, float)) or not weight > 0:
            continue
        for key, value in metrics.items():
            if isinstance(value, (int, float)) and key != weighted_by_key:
                total, seen = sums.get(key, (0.0, 0.0))
                sums[key] = (total + weight * value, seen + weight)
    return MetricRecord({key: total / seen for key, (total, seen) in sums.items()})
