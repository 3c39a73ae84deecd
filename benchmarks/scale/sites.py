"""Light sites: they speak Flower's gRPC as SuperNodes do and answer as FedSpan's sites do, but train nothing.

One thread of this process for each, so that hundreds fit one machine; or a process for each, beside other frameworks.
"""

import multiprocessing
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.synchronize import Event

import torch
from flwr.app import ArrayRecord, Message, MessageType
from flwr.client.grpc_rere_client.connection import grpc_request_response
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.supercore.retry import RetryInvoker, make_simple_grpc_retry_invoker
from flwr.supercore.run import RunNotRunningException

from common.config.federation import FederationConfig
from common.protocol import wire
from common.protocol.factors import Factors, pack
from common.protocol.messages import EvaluateReply, EvaluateRequest, Hello, TrainReply, TrainRequest
from strategies.flower.named import make_rule
from strategies.rule import Tensors

ROWS = 64  # that each site declares
POLL_SECONDS = 1.0  # between two questions for messages; a real SuperNode waits 3 seconds by default
_LEAVE_SECONDS = 5.0  # in which all sites together take their leave
_MOVED = 1e-5  # size of the numbers that stand for a change; admission allows far more


class Answers:
    """The answers of a site: tensors of the right shapes, which differ between sites and rounds.

    Args:
        federation: the federation, with absolute paths.
        state: the state before round 1.
        base_digest: digest of the base model.
        tokenizer_digest: digest of its tokenizer.
    """

    def __init__(self, federation: FederationConfig, state: Tensors, base_digest: str, tokenizer_digest: str) -> None:
        self._rule = make_rule(federation.strategy, seed=federation.training.seed)
        self._state, self._rank = state, federation.strategy.rank
        self._held: dict[int, Tensors] = {}  # LoRA's factors as each site was sent them last
        self._digests = base_digest, tokenizer_digest

    def __call__(self, number: int, message: Message) -> Message:
        """The answer of a site to a message."""
        kind = message.metadata.message_type
        if kind == MessageType.QUERY:
            base, tokenizer = self._digests
            told = {"site": f"site-{number:04}", "train_rows": ROWS, "held_out_rows": 1, "device": "none"}
            hello = Hello(**told, rank=self._rank, base_digest=base, tokenizer_digest=tokenizer, version="1")  # type: ignore[arg-type]
            return Message(hello.to_record(), reply_to=message)
        if kind == MessageType.EVALUATE:
            EvaluateRequest.read(message.content)
            return Message(EvaluateReply(scores={"loss": 1.0}).to_record(), reply_to=message)
        asked = TrainRequest.read(message.content)
        reply = TrainReply(
            server_round=asked.server_round,
            arrays=self._update(number, asked),
            num_examples=ROWS,
            version=asked.version,
            frozen_digest=asked.frozen_digest,
            clock={"started": time.time()},
        )
        return Message(reply.to_record(), reply_to=message)

    def _update(self, number: int, asked: TrainRequest) -> ArrayRecord:
        size, tensors = _MOVED * (1 + number / 1000), {}
        exchange, held = self._rule.exchange(asked.server_round), self._held.setdefault(number, {})
        if self._rule.section.trains == "lora":
            held |= wire.decode(asked.arrays)
            for step in asked.steps.values():  # where base weights change, A and B come dense beside their factors
                held |= {name: one for name, one in wire.decode(step).items() if name in asked.active}
        drawn = torch.Generator().manual_seed(1000 * asked.server_round + number)
        for name in asked.active:
            start = held.get(name, self._state[name])
            if self._rule.section.trains == "lora" or start.ndim != 2:
                tensors[name] = start + size * torch.rand(start.shape, generator=drawn).to(start.dtype)
                continue
            left = size * torch.rand(start.shape[0], self._rank, generator=drawn)
            right = size * torch.rand(self._rank, start.shape[1], generator=drawn)
            change = Factors(1.0, [(left, right)], common=exchange.basis is not None)
            tensors |= pack(name, change, start, exchange)
        return wire.encode(tensors, bundled=True)


class LightSites:
    """Sites as threads. Use as a context manager: they have joined inside it, and leave at its end.

    Args:
        count: number of sites.
        first: number of the first one.
        address: the SuperLink's Fleet API, host and port.
        root: the authority's certificate, PEM; None: no TLS.
        answer: see ``Answers``.
    """

    def __init__(
        self,
        count: int,
        address: str,
        root: bytes | None,
        answer: Callable[[int, Message], Message],
        *,
        first: int = 0,
    ) -> None:
        self._address, self._root, self._answer = address, root, answer
        self._over = threading.Event()
        numbers = range(first, first + count)
        self._threads = [threading.Thread(target=self._live, args=(k,), daemon=True) for k in numbers]
        self._invokers: list[RetryInvoker] = []
        self.errors: list[str] = []
        self.joined = 0

    def __enter__(self) -> "LightSites":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for invoker in self._invokers:
            invoker.max_tries = 1  # a server that has ended is not called again
        deadline = time.monotonic() + _LEAVE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _live(self, number: int) -> None:
        invoker = make_simple_grpc_retry_invoker()
        self._invokers.append(invoker)
        link = grpc_request_response(self._address, self._root is None, invoker, root_certificates=self._root)
        with link as (_, receive, send, _run, _fab, pull, push, confirm):
            self.joined += 1
            while not self._over.wait(POLL_SECONDS):
                try:
                    while (came := receive()) is not None:
                        message, tree = came
                        run = message.metadata.run_id
                        ids = [part.object_id for part in iterate_object_tree(tree)]
                        contents = pull_objects(ids, partial(pull, run), max_concurrent_pulls=1)
                        confirm(run, tree.object_id)
                        whole = inflate_object_from_contents(tree.object_id, contents)
                        assert isinstance(whole, Message)
                        whole.metadata.__dict__["_message_id"] = tree.object_id
                        reply = self._answer(number, whole)
                        reply.metadata.__dict__["_message_id"] = reply.object_id
                        objects = get_all_nested_objects(reply)
                        wanted, session = send(reply, get_object_tree(reply), 0.0)
                        push_object_contents_from_iterable(
                            ((i, one.deflate()) for i, one in objects.items() if i in wanted),
                            partial(push, run, session),
                            max_concurrent_pushes=1,
                        )
                except RunNotRunningException:
                    return
                except Exception as error:  # noqa: BLE001 - counted, and told in the table
                    if self._over.wait(_LEAVE_SECONDS):  # the server has ended, and with it the channel
                        return
                    self.errors.append(f"{type(error).__name__}: {error}")


class SitesApart(LightSites):
    """Sites as processes; otherwise as ``LightSites``, which it does not look into."""

    def __init__(self, count: int, address: str, root: bytes | None, answer: Callable[[int, Message], Message]) -> None:
        super().__init__(0, address, root, answer)
        context = multiprocessing.get_context("spawn")
        self._end = context.Event()
        arguments = [(number, address, root, answer, self._end) for number in range(count)]
        self._processes = [context.Process(target=_live_apart, args=one, daemon=True) for one in arguments]

    def __enter__(self) -> "SitesApart":
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for process in self._processes:
            process.join(2 * _LEAVE_SECONDS)
            process.kill()


def _live_apart(
    number: int, address: str, root: bytes | None, answer: Callable[[int, Message], Message], over: Event
) -> None:
    torch.set_num_threads(1)
    with LightSites(1, address, root, answer, first=number):
        over.wait()
