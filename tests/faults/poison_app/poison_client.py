"""FedSpan's ClientApp, whose training replies are tampered with as the plan beside the site file says, by round."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.app import app as honest
from common.protocol import wire

Tensors = dict[str, torch.Tensor]


def first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    """Change the first matrix only; of factors, all that count directions alike would be another update."""

    def tamper(tensors: Tensors) -> Tensors:
        name = min(name for name, tensor in tensors.items() if tensor.ndim == 2)
        return {**tensors, name: change(tensors[name])}

    return tamper


def without_first(tensors: Tensors) -> Tensors:
    name = min(name for name, tensor in tensors.items() if tensor.ndim == 2)
    return {key: tensor for key, tensor in tensors.items() if key != name}


def renamed(tensors: Tensors) -> Tensors:
    name = min(tensors)
    return {**{key: tensor for key, tensor in tensors.items() if key != name}, "renamed": tensors[name]}


TENSORS: dict[str, Callable[[Tensors], Tensors]] = {
    "nan": first(lambda t: t * float("nan")),
    "infinity": first(lambda t: torch.where(torch.arange(t.numel()).view(t.shape) == 3, float("inf"), t)),
    "scaled by 1e6": first(lambda t: t * 1e6),
    "scaled by -1e6": first(lambda t: t * -1e6),
    "wrong shape": first(lambda t: t[:, :-1].contiguous() if t.shape[1] > t.shape[0] else t[:-1].contiguous()),
    "wrong rank": first(lambda t: torch.cat([t, t], dim=0 if t.shape[0] < t.shape[1] else 1)),
    "wrong type": first(lambda t: t.double()),
    "a tensor is missing": without_first,
    "one tensor more": lambda tensors: {**tensors, "more": torch.zeros(2, 2)},
    "renamed tensor": renamed,
}
EXAMPLES = {"num-examples 0": 0, "num-examples -15": -15, "num-examples 10**9": 10**9}


def tampered(kind: str, message: Message, reply: Message) -> Message:
    if kind == "fails":
        return Message(Error(2, "as planned"), reply_to=message)
    content: dict[str, Any] = dict(reply.content)
    if kind in TENSORS:
        arrays = content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        content["arrays"] = wire.encode(TENSORS[kind](wire.decode(arrays)))
    elif kind == "of another round":
        content["config"] = ConfigRecord({**content["config"], "server-round": 1})
    elif kind == "no arrays":
        del content["arrays"]
    elif kind == "no num-examples":
        content["metrics"] = MetricRecord({k: v for k, v in content["metrics"].items() if k != "num-examples"})
    else:
        content["metrics"] = MetricRecord({**content["metrics"], "num-examples": EXAMPLES[kind]})
    return Message(RecordDict(content), reply_to=message)


class Poisoned(ClientApp):
    """Answers as FedSpan's own app, but for the rounds of the plan."""

    def __call__(self, message: Message, context: Context) -> Message:
        plan = Path(f"{context.node_config['site']}.plan")
        go, deadline = plan.with_suffix(".go"), time.monotonic() + 180
        while plan.exists() and not go.exists() and time.monotonic() < deadline:  # its hello
            time.sleep(0.1)
        reply = honest(message, context)
        if message.metadata.message_type != MessageType.TRAIN or not plan.exists() or reply.has_error():
            return reply
        number = str(message.content["config"]["server-round"])  # type: ignore[index, call-overload]
        kind = yaml.safe_load(plan.read_text()).get(number)
        return reply if kind is None else tampered(kind, message, reply)


app = Poisoned()
