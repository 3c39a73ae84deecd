"""Each rule as a Flower strategy, for any Flower app."""

import inspect
import random
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from logging import WARNING
from typing import Any, TypedDict, Unpack

from flwr.app import DEFAULT_TTL, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from common.config.aggregation import ServerOptimizerConfig
from common.errors import AggregationError, RefusedUpdate, WireError
from common.protocol import wire
from common.protocol.messages import ARRAYS, CONFIG, METRICS, State, TrainReply
from common.protocol.records import get_record
from common.text import SENTENCE, one_line
from strategies.flower.messages import RuleMessages
from strategies.flower.streaming import StreamingGrid
from strategies.rule import Rule, Update

MetricsFn = Callable[[list[RecordDict], str], MetricRecord]


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
    """FedAvg's options, and those of ``FlowerStrategy`` itself."""

    seed: int
    join_timeout: float
    server_optimizer: ServerOptimizerConfig | None


class FlowerStrategy(RuleMessages, FedAvg):
    """A Flower strategy that follows a ``Rule``: ``start(grid, initial_arrays, ...)``."""

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
            rule: says which tensors are trained, and aggregates updates.
            seed: seed for sampling clients; the same seed and nodes give the same cohorts.
            join_timeout: seconds that ``configure_train`` waits for ``min_available_nodes``.
            server_optimizer: optimizer that the server applies to the averaged update, with the average as its
                gradient. None: apply the average directly, as FedAvg does.
            options: FedAvg's options. Metrics are by default averaged by ``weighted_mean``.

        Raises:
            ValueError: the rule takes no server optimizer.
        """
        options.setdefault("train_metrics_aggr_fn", weighted_mean)
        options.setdefault("evaluate_metrics_aggr_fn", weighted_mean)
        FedAvg.__init__(self, **options)
        RuleMessages.__init__(self, rule, server_optimizer)
        self._seed = seed
        self._join_timeout = join_timeout

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
        """As ``flwr.serverapp.strategy.Strategy.start``, but each reply is aggregated as it arrives, then freed."""
        streaming: Any = StreamingGrid(grid)
        return super().start(streaming, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample nodes and make their training messages; the caller's records are not changed."""
        if self.fraction_train == 0.0:
            return []
        nodes = self._sample(grid, self.fraction_train, self.min_train_nodes, server_round)
        states = self.train_states(server_round, wire.decode(arrays), nodes)
        return [self._message(MessageType.TRAIN, node_id, state, config) for node_id, state in states]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the admitted replies; a rejected reply is logged with the reason.

        Raises:
            AggregationError: fewer than ``min_train_nodes`` replies were admitted, or the updates cannot be aggregated.
        """
        if self.fraction_train == 0.0:
            return None, None
        refused: list[str] = []
        contents: list[RecordDict] = []

        def updates() -> Iterator[Update]:
            for reply in replies:
                if reply.has_error():
                    client = self.client(reply.metadata.src_node_id)
                    client.forget()
                    refused.append(f"{client.name}: {_reason(reply)}")
                    log(WARNING, "round %s, failed: %s", server_round, refused[-1])
                    continue
                try:
                    update = self.read_update(reply)
                except RefusedUpdate as reason:
                    refused.append(one_line(str(reason), SENTENCE))
                    log(WARNING, "round %s, not admitted: %s", server_round, reason)
                    continue
                contents.append(_scalars(reply.content))
                del reply  # decision 008: a loop variable keeps the last update while the next is pulled
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
        states = self.evaluate_states(server_round, wire.decode(arrays), nodes)
        return [self._message(MessageType.EVALUATE, node_id, state, config) for node_id, state in states]

    def _message(self, kind: str, node_id: int, state: State, config: ConfigRecord) -> Message:
        """A message with a state, under this app's record names, and the caller's settings added to the state's."""
        content = {self.arrayrecord_key if key == ARRAYS else key: part for key, part in state.to_record().items()}
        content[self.configrecord_key] = ConfigRecord({**config, **content.pop(CONFIG)})  # type: ignore[dict-item]
        return Message(RecordDict(content), node_id, kind, ttl=DEFAULT_TTL, group_id=str(state.server_round))

    def read_update(self, reply: Message) -> Update:
        """The update in a reply to a training message of the current round.

        Raises:
            RefusedUpdate: the reply cannot be read, or is rejected; the text names the client and the reason.
        """
        node_id = reply.metadata.src_node_id
        keys = self.arrayrecord_key, self.configrecord_key, self.weighted_by_key
        try:
            told = TrainReply.of_any_client(reply.content, self.given(node_id).server_round, *keys)
        except WireError as error:
            client = self.client(node_id)
            client.forget()
            raise RefusedUpdate(f"{client.name}: {error}") from None
        return self.admit(told, node_id)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average the metrics of all replies that have metrics."""
        contents = []
        for reply in replies:
            if reply.has_error():
                log(WARNING, "round %s, no evaluation: %s", server_round, _reason(reply))
            elif METRICS in reply.content:
                contents.append(_scalars(reply.content))
        return self.evaluate_metrics_aggr_fn(contents, self.weighted_by_key) if contents else None

    def _sample(self, grid: Grid, fraction: float, minimum: int, server_round: int) -> list[int]:
        """Sample ``max(minimum, fraction * connected)`` nodes, the same for the same seed, round and nodes.

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


@cache
def flower_strategy(rule: type[Rule]) -> type[FlowerStrategy]:
    """Make a class of Flower strategies from a rule's class, such as ``strategies.FedIT`` from ``FedITRule``.

    The class takes the rule's arguments and, by name, ``FlowerOptions``; where the rule has a ``seed``, too, both get
    the same. ``FedIT(lora_alpha=8.0, fraction_train=0.5)`` is
    ``FlowerStrategy(FedITRule(lora_alpha=8.0), fraction_train=0.5)``.
    """
    make: Callable[..., Rule] = rule
    own, flowers = inspect.signature(rule).parameters, FlowerOptions.__annotations__

    def init(self: FlowerStrategy, *args: Any, **options: Any) -> None:  # noqa: ANN401 - as ``__signature__`` says
        made = make(*args, **{key: value for key, value in options.items() if key in own})
        rest = {key: value for key, value in options.items() if key in flowers or key not in own}
        FlowerStrategy.__init__(self, made, **rest)

    more = inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD, annotation=Unpack[FlowerOptions])
    about = f"{rule.section.title} ({rule.section.source}) for any Flower app; see ``{rule.__module__}``.\n\n"
    return type(
        rule.__name__.removesuffix("Rule"),
        (FlowerStrategy,),
        {
            "__init__": init,
            "__doc__": about + inspect.cleandoc(rule.__doc__ or ""),
            "__module__": "strategies",
            "__signature__": inspect.Signature([*own.values(), more]),
        },
    )


def _reason(reply: Message) -> str:
    return one_line(reply.error.reason or "", SENTENCE)


def _scalars(content: RecordDict) -> RecordDict:
    """A reply's content without its arrays."""
    return RecordDict({key: part for key, part in content.items() if not isinstance(part, ArrayRecord)})


def sample(nodes: list[int], fraction: float, minimum: int, seed: int, server_round: int) -> list[int]:
    """Sample ``max(minimum, fraction * len(nodes))`` of ``nodes``; Python's global generator is not touched."""
    size = min(len(nodes), max(minimum, int(fraction * len(nodes))))
    return sorted(random.Random(f"{seed}/{server_round}").sample(nodes, size))  # noqa: S311 - no secret


def weighted_mean(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Mean of every scalar metric over the clients that report it, weighted by ``weighted_by_key``.

    A reply without a positive weight is left out: one negative weight could flip the sign of the mean.
    """
    sums: dict[str, tuple[float, float]] = {}
    for content in contents:
        metrics = get_record(content, METRICS, MetricRecord)
        weight = metrics.get(weighted_by_key)
        if not isinstance(weight, (int, float)) or not weight > 0:
            continue
        for key, value in metrics.items():
            if isinstance(value, (int, float)) and key != weighted_by_key:
                total, seen = sums.get(key, (0.0, 0.0))
                sums[key] = (total + weight * value, seen + weight)
    return MetricRecord({key: total / seen for key, (total, seen) in sums.items()})
