"""Federations with `secure_aggregation`: the mean is that of the sites that were left, and a lie is refused by name."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import Context, Message

from client import app as sites, masked
from client.app import app
from client.privacy.ledger_summary import summary
from common.errors import WorkerDied
from common.masking import parts
from common.masking.parts import DROPPED, Listing, SumId
from common.masking.site import SiteSum
from common.protocol import wire
from common.protocol.exchanges import SHARES, SURVIVORS, UNMASK, ExchangeRequest, MaskedTrainRequest
from common.protocol.messages import Failure, TrainRequest
from deploy.sandbox.tiny import make_federation
from server.loop.checkpoint import newest
from server.report.words import security
from server.run.folder import read_lines, read_run
from server.run.read import read_all
from tests.harness.in_one_process import in_one_process
from tests.harness.masking import identity
from tests.harness.results import events

SIZES = {"a": 12, "b": 20, "c": 28}
SETTINGS: dict[str, Any] = {
    "strategy": {"name": "fedit", "rank": 2, "blocks": "lower half", "modules": "attention"},
    "training": {"optimizer": "sgd", "learning_rate": 0.5, "local_steps": 1},
    "evaluation": {"every": 100, "samples": 0},
    "cohort": {"min_clients": 2},
    "admission": {"norm_ratio": None, "max_refusals": 50},
}
#: Where site c dies, by round. In round 6 it has no keys: they went ahead and died with the worker after round 5.
DIES = {2: "train", 3: "keys", 4: SURVIVORS, 5: UNMASK}
LOST = (2, 3, 6)  # rounds without its update


def site_of(context: Context) -> str:
    return Path(str(context.node_config["site"])).stem


def stage_of(message: Message) -> tuple[int, str]:
    config = message.content["config"]
    return int(config.get("server-round", 0)), str(config.get("stage", message.metadata.message_type.partition(".")[0]))  # type: ignore[arg-type]


def dying(message: Message, context: Context) -> Message:
    """Site c, whose worker dies at one exchange of each round, and has no keys when it is there again."""
    number, stage = stage_of(message)
    if site_of(context) == "c" and DIES.get(number) == stage:
        if masked._sums.pop((1, "c"), None) is not None or stage == "keys":
            return Message(Failure(WorkerDied.code, "killed").to_error(), reply_to=message)
    return app(message, context)


def absent(message: Message, context: Context) -> Message:
    """Without masks: site c has no update in the rounds in which ``dying`` loses it."""
    if site_of(context) == "c" and stage_of(message) in [(number, "train") for number in LOST]:
        return Message(Failure(WorkerDied.code, "killed").to_error(), reply_to=message)
    return app(message, context)


def moved(run: Path) -> torch.Tensor:
    checkpoint = newest(run, pytest.fail)
    assert checkpoint is not None
    return torch.cat([checkpoint.state[name].flatten() for name in sorted(checkpoint.state) if "lora_B" in name])


def entries(folder: Path, site: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{site}-ledger.jsonl").read_text().splitlines()]


def federation(folder: Path, rounds: int, **changes: Any) -> Path:
    folder.mkdir()
    return make_federation(folder, SIZES, rounds=rounds, **{**SETTINGS, **changes})


def test_mean_is_that_of_the_sites_left_whenever_one_dies(tmp_path: Path) -> None:
    secure = {"secure_aggregation": {"threshold": 2}}
    run = in_one_process(federation(tmp_path / "masked", 7, **secure), app=dying)
    plain = in_one_process(federation(tmp_path / "plain", 7), app=absent)
    assert float((moved(run) - moved(plain)).norm() / moved(plain).norm()) < 1e-5
    assert [(e["round"], e["reason"].partition(":")[2].split()[0]) for e in events(run, "client_failed")] == [
        (2, "this"),  # asked once more, as when a worker has died: it has no keys of this round
        (3, "keys:"),
        (4, "survivors:"),
        (5, "unmask:"),
        (6, "this"),
    ]
    trained = [(r["round"], r["client"]) for r in read_lines(run / "metrics.jsonl") if r["phase"] == "train"]
    assert {n for n, client in trained if client == "c"} == {1, 4, 5, 7}
    told = [r["diagnostics"] for r in read_lines(run / "metrics.jsonl") if r["phase"] == "aggregate"]
    assert [d["masked-updates"] for d in told] == [3, 2, 2, 3, 3, 2, 3]
    ledger = entries(tmp_path / "masked", "c")
    sent = [e for e in ledger if e["event"] == "sent" and e["message"] == "train"]
    assert [(e["round"], e["masked"]) for e in sent] == [(1, True), (4, True), (5, True), (7, True)]
    assert {fact[0] for e in sent for fact in e["out"]["tensors"].values()} == {"int32"}
    sent = [e for e in entries(tmp_path / "masked", "a") if e["event"] == "sent" and e["message"] == "exchange"]
    late = [SURVIVORS, UNMASK]  # keys and shares went ahead where a round has the sites of the last one
    stages = {number: [e["stage"] for e in sent if e["round"] == number] for number in range(1, 8)}
    assert stages == {number: late if number in (2, 6) else ["keys", SHARES, *late] for number in range(1, 8)}
    assert "4 of these updates: the server sees sums of them alone" in summary(tmp_path / "masked" / "c-ledger.jsonl")
    shown = {folder: dict(row[:2] for row in security(read_all(folder))) for folder in (run, plain)}
    assert shown[run]["Updates"] == "masked: the server saw sums of at least 2 sites' updates, and no single one"
    assert shown[plain]["Updates"] == "the server saw each site's own"


# A server that lies to site a


LIES = {
    1: "invented",
    2: "replayed",
    3: "two lists",
    4: "alive and dropped",
    5: "keys again",
    6: "invented ahead",
    7: "replayed ahead",
    8: "too few signatures",
    9: "without masks",
    10: "many rows",
    11: "a second sum for a new worker",
}
#: Where the first answer is kept, and another asked for.
TWICE = {"keys again": "keys", "a second sum for a new worker": UNMASK}
_kept: dict[str, bytes] = {}


def changed(message: Message, **fields: Any) -> Message:
    """A message as a server would send it that lies."""
    request = ExchangeRequest.read(message.content)
    content = ExchangeRequest(**{**vars(request), **fields}).to_record()
    lying = Message(content, dst_node_id=message.metadata.dst_node_id, message_type=message.metadata.message_type)
    lying.metadata.__dict__.update(message.metadata.__dict__)
    return lying


def unmasked(message: Message) -> Message:
    """The request to train, as it would be without masks."""
    asked = vars(MaskedTrainRequest.read(message.content))
    content = TrainRequest(**{field.name: asked[field.name] for field in fields(TrainRequest)}).to_record()
    plain = Message(content, dst_node_id=message.metadata.dst_node_id, message_type="train")
    plain.metadata.__dict__.update(message.metadata.__dict__ | {"_message_type": "train"})
    return plain


def trained_with_a_lie(message: Message, context: Context, number: int) -> Message:
    asked = site_of(context), LIES.get(number)
    if asked == ("a", "without masks"):
        message = unmasked(message)
    if asked == ("a", "many rows"):
        message.content["config"].update({"most-rows": 10**9, "heaviest": 10**9})  # type: ignore[call-arg]
    reply = app(message, context)
    if site_of(context) == "c" and number == 13:  # here it is the site that lies
        reply.content["config"]["masked-weight"] = 2**40
    return reply


def false_survivors(message: Message, context: Context, lie: str) -> Message:
    payload = ExchangeRequest.read(message.content).payload
    states = dict(parts.read_survivors(payload))
    other = next(member for member in states if member != _own_id())
    if lie == "two lists":
        app(message, context)
        return changed(message, payload=parts.write_survivors({**states, other: DROPPED}))
    return changed(message, payload=payload + other + DROPPED)


def lied_to(message: Message, context: Context) -> Message:
    number, stage = stage_of(message)
    lie = LIES.get(number, "")
    if stage == "train":
        return trained_with_a_lie(message, context, number)
    if site_of(context) != "a" or stage not in ("keys", SHARES, SURVIVORS, UNMASK):
        return app(message, context)
    payload = ExchangeRequest.read(message.content).payload
    if stage == SHARES:
        message = changed(message, payload=false_keys(payload, lie, SumId(1, number, 0, 2)))
    if stage == SURVIVORS and lie.endswith(" ahead"):
        ahead = ExchangeRequest.read(message.content).ahead
        assert ahead is not None
        message = changed(message, ahead=false_keys(ahead, lie.partition(" ")[0], SumId(1, number + 1, 0, 2)))
    if stage == SURVIVORS and lie in ("two lists", "alive and dropped"):
        message = false_survivors(message, context, lie)
    if stage == UNMASK and lie == "too few signatures":
        message = changed(message, payload=payload[: len(payload) // 3])
    if TWICE.get(lie) == stage:
        app(message, context)
    if lie == "a second sum for a new worker" and stage == UNMASK:
        masked._sums.pop((1, "a"))
        message = changed(message, stage="keys", attempt=1, payload=b"")
    return app(message, context)


def false_keys(listing: bytes, lie: str, which: SumId) -> bytes:
    """The keys of two sites beside a's own: invented, or those of an earlier round."""
    own = _own_id()
    mine, others = [], []
    for one in Listing.read(listing).members.values():
        (mine if one.id == own else others).append(one)
    _kept.setdefault("others", b"".join(one.raw for one in others))
    if lie == "invented":
        others = [parts.Advert.read(SiteSum(which, identity(k), {}, 0).advert) for k in (8, 9)]
    if lie == "replayed":
        others = _adverts(_kept["others"])
    return Listing([*mine, *others]).raw


def _own_id() -> bytes:
    current = masked._sums[1, "a"].current
    assert current is not None
    return parts.Advert.read(current[1].advert).id


def _adverts(raw: bytes) -> list[parts.Advert]:
    size = parts.ADVERT_BYTES
    return [parts.Advert.read(raw[at : at + size]) for at in range(0, len(raw), size)]


def test_a_server_that_lies_is_refused_by_name_and_the_others_go_on(tmp_path: Path) -> None:
    run = in_one_process(federation(tmp_path / "lies", 13, secure_aggregation={"threshold": 2}), app=lied_to)
    failed = [(e["round"], e["reason"]) for e in events(run, "client_failed")]
    reasons = {number: reason for number, reason in failed if reason.startswith("a: ")}
    for number, text in {
        1: "shares: round 1: SHA256:",
        2: "shares: round 2: the keys of ",
        3: "survivors: round 3: a second list of survivors came",
        4: "survivors: round 4: ",
        5: "keys: round 5: keys of this round, or a later one, were given already",
        6: "survivors: round 7: SHA256:",
        7: "survivors: round 8: the keys of ",
        8: "unmask: round 8: 1 have signed the list of survivors, 2 are needed",
        9: "this site has agreed to `secure_aggregation`: its update leaves masked, or not at all",
        10: "round 10: the most rows of a site are 1000000000, of which 1000000000 weigh 1; ",
        11: "unmask: round 11: this site has helped to unmask a sum of this round or a later one",
    }.items():
        assert reasons[number].startswith(f"a: {text}"), reasons[number]
    assert all("is no peer that this site has agreed to" in reasons[number] for number in (1, 6))
    assert all("are not signed for this round" in reasons[number] for number in (2, 7))
    assert "is named both alive and dropped" in reasons[4]
    refused = [json.loads(line) for line in (tmp_path / "lies" / "a-ledger.jsonl").read_text().splitlines()]
    assert [e["round"] for e in refused if e["event"] == "refused"] == list(LIES)
    refusals = [e["reason"] for e in events(run, "update_refused")]
    assert refusals == ["c: masked-weight is 1099511627776; allowed: 0 to 2^32 - 1"]


# A server that sends whole weights of FedFTG under the name of others


def weights_of_its_own(message: Message, context: Context) -> Message:
    """In round 2 sites b and c are sent weights that nobody trained, under the true version's name, twice."""
    number, stage = stage_of(message)
    if (number, stage) != (2, "train") or site_of(context) == "a":
        return app(message, context)
    asked = MaskedTrainRequest.read(message.content)
    whole = {name: tensor + 1e-4 for name, tensor in state_of(context).items()}
    false = replace(asked, since=None, steps={}, arrays=wire.encode(whole, bundled=True))
    lying = Message(false.to_record(), dst_node_id=message.metadata.dst_node_id, message_type="train.masking")
    lying.metadata.__dict__.update(message.metadata.__dict__)
    return app(lying, context)


def state_of(context: Context) -> dict[str, torch.Tensor]:
    """What a site holds."""
    (session,) = [one for key, one in sites._sessions.items() if Path(key[1]).stem == site_of(context)]
    weights = session.weights
    assert weights is not None
    return weights.tensors


def test_weights_that_a_site_cannot_check_give_no_sum(tmp_path: Path) -> None:
    strategy = {"name": "fedftg", "subspace": "shared", "rank": 4, "blocks": "lower half", "modules": "mlp"}
    settings = {"strategy": strategy, "secure_aggregation": {"threshold": 2, "tries": 2}}
    run = in_one_process(federation(tmp_path / "x", 3, **settings), app=weights_of_its_own, ends="failed")
    failed = [e for e in events(run, "client_failed") if e["round"] == 2]
    said = "round 2: whole weights came, whose version this site cannot check; send the steps from the base model"
    assert [(e["client"], e["reason"]) for e in failed] == [(s, f"{s}: {said}") for s in "bcbc"]
    assert "1 sites sent their numbers" in str(read_run(run)["reason"])
    plain = in_one_process(federation(tmp_path / "y", 3, **settings))  # sites follow steps, however many
    assert read_run(plain)["status"] == "completed"


def test_noise_is_shared_and_the_ledger_says_against_whom(tmp_path: Path) -> None:
    """Every site adds a part; the states that follow are within the sites' reach."""
    secure = {"threshold": 2, "noise": 0.002}
    file = federation(tmp_path / "noise", 2, secure_aggregation=secure, cohort={"min_clients": 3})
    privacy = {"clip": 0.01, "noise_multiplier": 0.25, "noise": "shared", "delta": 1e-5, "max_epsilon": 1e5}
    for site in SIZES:
        own = file.parent / f"{site}.yaml"
        own.write_text(yaml.safe_dump({**yaml.safe_load(own.read_text()), "privacy": privacy}))
    run = in_one_process(file)
    entries = [json.loads(line) for line in (file.parent / "a-ledger.jsonl").read_text().splitlines()]
    spent = [e["privacy"] for e in entries if e["event"] == "sent" and e["message"] == "train"]
    assert [one["noise_multiplier"] for one in spent] == [pytest.approx(0.2 * 2**0.5, rel=1e-4)] * 2
    assert [one["worst_multiplier"] for one in spent] == [pytest.approx(0.2, rel=1e-4)] * 2
    norms = [r["diagnostics"]["mean-norm"] for r in read_lines(run / "metrics.jsonl") if r["phase"] == "aggregate"]
    numbers = moved(run).numel() * 2  # A and B have as many
    assert all(0.3 < norm / (0.002 / 3**0.5 * numbers**0.5) < 3 for norm in norms)


@pytest.mark.long
def test_killed_server_goes_on_with_fresh_keys(tmp_path: Path) -> None:
    whole = in_one_process(federation(tmp_path / "whole", 4, secure_aggregation={"threshold": 2}))
    file = federation(tmp_path / "killed", 4, secure_aggregation={"threshold": 2})
    in_one_process(file, killed_in=3)
    run = in_one_process(file, resume=True)
    assert float((moved(run) - moved(whole)).norm() / moved(whole).norm()) < 1e-5
