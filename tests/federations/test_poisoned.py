"""Updates that are malformed, impossible or outlying are refused, and the result is the one without them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict

from client.app import app as honest
from common.protocol import wire
from common.protocol.tensors import Tensors
from deploy.sandbox.tiny import make_federation
from tests.harness.in_one_process import in_one_process
from tests.harness.results import events, same_bits, trainings

SIZES = {"site-a": 9, "site-b": 17, "site-c": 11}
HONEST = 3  # rounds before the third site's updates are tampered with: it fails, so that the others set the measure
LORA = {"blocks": "lower half", "rank": 2}


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


KINDS = [*TENSORS, "of another round", "no arrays", "no num-examples", *EXAMPLES]


def poisoned(message: Message, context: Context) -> Message:
    """FedSpan's ClientApp, whose training replies are tampered with as the plan beside the site file says, by round."""
    reply = honest(message, context)
    plan = Path(f"{context.node_config['site']}.plan")
    if message.metadata.message_type != MessageType.TRAIN or not plan.exists() or reply.has_error():
        return reply
    kind = yaml.safe_load(plan.read_text()).get(message.content.config_records["config"]["server-round"])
    return reply if kind is None else tampered(kind, message, reply)


def planned(folder: Path, strategy: dict[str, object], kinds: list[str]) -> Path:
    """The run folder of a federation whose third site follows the plan, but for the last round."""
    file = make_federation(
        folder,
        SIZES,
        strategy=strategy,
        rounds=HONEST + len(kinds) + 1,
        evaluation={"every": 100, "max_examples": 1, "samples": 0},
        cohort={"min_clients": 2},
        admission={"max_refusals": 99},
    )
    plan = dict(enumerate(["fails"] * HONEST + kinds, start=1))
    (folder / "site-c.yaml.plan").write_text(yaml.safe_dump(plan))
    return in_one_process(file, app=poisoned)


@pytest.mark.parametrize(
    "strategy",
    [
        {"rank": 4},
        {"name": "flexlora", **LORA},
        *(pytest.param({"name": name, **LORA}, marks=pytest.mark.long) for name in ("rolora", "ffa-lora")),
    ],
)
def test_poisoned_updates_never_touch_the_result(tmp_path: Path, strategy: dict[str, object]) -> None:
    """The result is the one of a federation in which the site fails in those rounds."""
    run, failing = (
        planned(tmp_path / name, strategy, kinds)
        for name, kinds in (("poisoned", KINDS), ("failing", ["fails"] * len(KINDS)))
    )
    refused = {event["round"]: event["reason"] for event in events(run, "update_refused")}
    for number, kind in enumerate(KINDS, start=HONEST + 1):
        assert number in refused, f"{kind} was admitted"
        assert refused[number].startswith("site-c: ")
    same_bits(run, failing)
    assert trainings(run) == trainings(failing)
