"""A site's work without Flower: what is trained, what is returned, what stays."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification

from client.session import Session
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.site import SiteConfig
from common.errors import DataError, ModelError, StaleStateError, TrainingError
from common.protocol.factors import Exchange, unpack
from common.protocol.messages import TRAINING
from common.protocol.tensors import Tensors
from common.protocol.versions import Step
from deploy.sandbox.tiny import make_federation, make_tokenizer
from strategies.flower.named import make_rule

LORA = {"name": "ffa-lora", "rank": 2, "blocks": "lower half", "modules": "mlp"}


def session(tmp_path: Path, site: dict[str, Any] | None = None, **changes: Any) -> Session:
    strategy = changes.pop("strategy", None)
    tmp_path.mkdir(exist_ok=True)
    file = make_federation(tmp_path, {"site-a": 12}, **changes)
    if strategy is not None:
        data = yaml.safe_load(file.read_text())
        file.write_text(yaml.safe_dump({**data, "strategy": strategy}))
    site_file = tmp_path / "site-a.yaml"
    if site:
        site_file.write_text(yaml.safe_dump({**yaml.safe_load(site_file.read_text()), **site}))
    return Session(load(site_file, SiteConfig), site_file, resolved(load(file, FederationConfig), file))


def classifier(tmp_path: Path, training: dict[str, Any] | None = None, **strategy: Any) -> Session:
    """A session of a tiny BERT that tells pain from swelling."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=0, initializer_range=0.5, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    rows = [f'{{"text": "{w} {i}", "label": "{w}"}}' for i in range(20) for w in ("pain", "swelling")]
    (tmp_path / "labelled.jsonl").write_text("\n".join(rows))
    server = {"server": None} if strategy.get("head") == "local" else {}
    data = {"path": "labelled.jsonl", "prompt": "text", "answer": "label", "held_out": 0.2}
    return session(
        tmp_path,
        {"data": data},
        model={"path": "bert"},
        task={"type": "sequence-classification", "labels": ["pain", "swelling"]},
        strategy={**LORA, "blocks": "all", **strategy},
        training=training or {"local_steps": 20, "learning_rate": 0.05},
        evaluation=server,
    )


def state(own: Session) -> Tensors:
    return own._tuned.get()


def test_only_the_active_tensors_are_trained_and_returned(tmp_path: Path) -> None:
    own = session(tmp_path, strategy=LORA)
    before = state(own)
    active = [name for name in before if "lora_B" in name]
    frozen = own.set_state(before, None, active)
    assert frozen.keys() == before.keys() - set(active)
    trained, metrics = own.train(1, active)
    assert list(trained) == active
    assert all(not torch.equal(trained[name], before[name]) for name in active)
    after = state(own)
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert metrics.keys() == TRAINING.keys() - {"wire_error", "rows_left_out", "clipped"}
    assert own.lora_alpha == 16.0


def test_adapter_names_are_pefts(tmp_path: Path) -> None:
    import peft

    own = session(tmp_path, strategy=LORA)
    assert state(own).keys() == peft.get_peft_model_state_dict(own._tuned.model).keys()


def test_server_and_sites_draw_the_same_a(tmp_path: Path) -> None:
    one, two = session(tmp_path, strategy=LORA), session(tmp_path, strategy=LORA)
    torch.manual_seed(123)
    assert all(torch.equal(t, state(two)[name]) for name, t in state(one).items())


def test_outdated_frozen_tensors_are_noticed(tmp_path: Path) -> None:
    own = session(tmp_path, strategy=LORA)
    tensors = state(own)
    active = [name for name in tensors if "lora_B" in name]
    with pytest.raises(TrainingError, match="out of date; send them in full"):
        own.set_state(tensors, "0" * 64, active)
    with pytest.raises(TrainingError, match="neither sent nor kept"):
        own.set_state({name: tensors[name] for name in active}, None, active)


@pytest.mark.parametrize(
    ("head", "exchanged", "stays"), [("train", True, False), ("freeze", False, False), ("local", False, True)]
)
def test_classification_head(tmp_path: Path, head: str, exchanged: bool, stays: bool) -> None:
    own = classifier(tmp_path, head=head)
    tensors = state(own)
    heads = [name for name in tensors if "classifier" in name]
    assert bool(heads) == exchanged
    active = [name for name in tensors if "lora_A" not in name]
    own.set_state(tensors, None, active)
    before = own.evaluate()
    fresh = {name: p.detach().clone() for name, p in own._tuned.model.named_parameters() if "classifier" in name}
    trained, _ = own.train(1, active)
    assert set(heads) <= trained.keys()
    moved = {n for n, p in own._tuned.model.named_parameters() if n in fresh and not torch.equal(p, fresh[n])}
    assert bool(moved) == (exchanged or stays)
    assert bool(own.kept) == stays
    if head != "freeze":
        assert own.evaluate()["loss"] < before["loss"]
        assert 0 <= own.evaluate()["accuracy"] <= 1


def test_local_head_is_taken_up_by_a_new_process(tmp_path: Path) -> None:
    one = classifier(tmp_path, head="local")
    tensors = state(one)
    one.set_state(tensors, None, list(tensors))
    one.train(1, list(tensors))
    trained = {name: p.detach().clone() for name, p in one._tuned.local.items()}
    two = classifier(tmp_path, head="local")
    two.kept = one.kept
    two.set_state(tensors, None, list(tensors))
    assert trained
    assert all(torch.equal(p, trained[name]) for name, p in two._tuned.local.items())


@pytest.mark.parametrize("mode", ["keep", "reset"])
def test_optimizer_moments_are_kept_or_reset(tmp_path: Path, mode: str) -> None:
    """Two rounds in two processes: with `keep` the second goes on with the first one's moments."""
    one = session(tmp_path, strategy={**LORA, "optimizer_state": mode})
    tensors = state(one)
    active = [name for name in tensors if "lora_B" in name]
    one.set_state(tensors, None, active)
    trained, _ = one.train(1, active)
    moments = {name: t for name, t in one.kept.items() if name.startswith("exp_avg|")}
    assert bool(moments) == (mode == "keep")
    two = session(tmp_path, strategy={**LORA, "optimizer_state": mode})
    two.kept = one.kept
    two.set_state({**tensors, **trained}, None, active, after=1)
    two.train(2, active)
    if mode == "keep":
        steps = {float(t) for name, t in two.kept.items() if name.startswith("step|")}
        assert steps == {6.0}  # three local steps in each round


def test_mixed_rank_is_refused_where_the_strategy_needs_equal_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"max_rank 1 is below the federation's rank 2, and ffa-lora needs equal ranks"
    ):
        session(tmp_path, {"max_rank": 1}, strategy=LORA).hello()
    assert session(tmp_path, {"max_rank": 1}, strategy={**LORA, "name": "flexlora"}).hello().rank == 1


def test_rank_above_a_layer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"model.layers.0.mlp.gate_proj.weight: LoRA rank is 33; allowed for this layer: 1 to 32"
    ):
        state(session(tmp_path, strategy={**LORA, "rank": 33}))


def test_label_that_is_not_listed_is_counted_at_hello_not_quoted(tmp_path: Path) -> None:
    own = classifier(tmp_path, head="train")
    file = tmp_path / "labelled.jsonl"
    file.write_text(file.read_text() + '\n{"text": "secret text", "label": "secret label"}')
    reason = (
        rf"shard {file}: 1 of 41 rows \(numbers 41\) have a label that is not in task.labels: \['pain', 'swelling'\]"
    )
    with pytest.raises(DataError, match=reason) as caught:
        own.hello()
    assert "secret" not in str(caught.value)


def test_rows_longer_than_the_models_positions_are_refused_at_hello(tmp_path: Path) -> None:
    own = classifier(tmp_path, head="train")  # of 512 positions
    own.hello()
    longer = own.federation.training.model_copy(update={"max_length": 513})
    own = Session(own.site, tmp_path / "site-a.yaml", own.federation.model_copy(update={"training": longer}))
    with pytest.raises(
        ModelError, match=r"`training.max_length` is 513, but this bert model has 512 positions; allowed"
    ):
        own.hello()


def test_dropout_differs_by_seed_site_and_round(tmp_path: Path) -> None:
    """Also where their names end alike."""

    def drawn(name: str, seed: int, server_round: int) -> float:
        folder = tmp_path / f"{name}-{seed}"
        own = session(folder, {"name": name}, training={"seed": seed, "local_steps": 1})
        own.set_state(state(own), None, list(state(own)))
        torch.manual_seed(0)
        own.train(server_round, list(state(own)))
        return float(torch.rand(1))

    settings = [("north-ward-1", 0, 1), ("north-ward-1", 7, 1), ("south-ward-1", 0, 1), ("north-ward-1", 0, 12)]
    assert len({drawn(*setting) for setting in settings}) == len(settings)
    assert drawn("again", 3, 2) == drawn("again", 3, 2)


def test_fewer_rows_per_pass_stay_for_later_rounds(tmp_path: Path) -> None:
    own = session(tmp_path, training={"packing": "off"})  # of 4 rows per step
    own.set_state(state(own), None, list(state(own)))
    sizes: list[int] = []

    def fail(module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    own._tuned.model.register_forward_pre_hook(fail, with_kwargs=True)
    assert own.train(1, list(state(own)))[1]["micro_batch"] == 2.0
    assert sizes == [4] + [2] * 6
    assert own.train(2, list(state(own)))[1]["micro_batch"] == 2.0
    assert sizes == [4] + [2] * 12


def test_seed_and_round_decide_the_result(tmp_path: Path) -> None:
    def trained(server_round: int) -> Tensors:
        own = session(tmp_path)
        own.set_state(state(own), None, list(state(own)))
        return own.train(server_round, list(state(own)))[0]

    one, again, other = trained(1), trained(1), trained(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


FEDFTG = {"name": "fedftg", "blocks": "lower half", "rank": 2, "scale": 1.0}


def round_of(own: Session, number: int) -> tuple[Tensors, dict[str, float]]:
    """A round from the base model."""
    weights = own.weights
    assert weights is not None
    own.follow([], weights.first, weights.first)
    return own.train(number, list(weights.tensors))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("subspace", ["own", "shared"])
def test_update_is_made_for_the_wire_as_the_federation_file_says(tmp_path: Path, subspace: str, precision: str) -> None:
    own = session(tmp_path, strategy={**FEDFTG, "subspace": subspace, "wire_precision": precision})
    sent, metrics = round_of(own, 1)
    rule = make_rule(own.federation.strategy, seed=own.federation.training.seed)
    assert own.weights is not None
    shapes = {name: tuple(t.shape) for name, t in own.weights.tensors.items()}
    exchange = rule.exchange(1)
    assert exchange is not None
    whole, factors = unpack(sent, shapes, exchange)  # as the server reads it
    assert not whole
    trained = own._tuned.get()
    for name, change in factors.items():
        moved = trained[name] - own.weights.tensors[name]
        error = float((change.apply(own.weights.tensors[name]) - trained[name]).norm() / moved.norm())
        assert error < {"float32": 1e-5, "bfloat16": 1e-2, "int8": 3e-2}[precision]
    assert ("wire_error" in metrics) == (precision != "float32")
    assert metrics.get("wire_error", 1e-9) > 0


def test_low_precision_weights_are_federated_in_float32(tmp_path: Path) -> None:
    """What a bfloat16 weight cannot hold is in what travels, in factors or whole."""
    for rank in (2, 24):  # with rank 24 the factors are larger than the weight
        own = session(
            tmp_path, strategy={**FEDFTG, "rank": rank}, model={"dtype": "bfloat16"}, training={"learning_rate": 1e-6}
        )
        sent, _ = round_of(own, 1)
        assert own.weights is not None
        name = next(iter(own.weights.tensors))
        start = own.weights.tensors[name]
        assert start.dtype == torch.float32
        whole, factors = unpack(sent, {name: tuple(start.shape)}, Exchange())
        made = factors[name].apply(start) if name in factors else whole[name]
        assert (name in factors) == (rank == 2)
        assert 0 < float((made - start).norm() / start.norm()) < 1e-3
        assert torch.equal(own._tuned.get()[name], made.to(torch.bfloat16))


def test_new_process_follows_the_steps_from_the_base_model(tmp_path: Path) -> None:
    one = session(tmp_path, strategy=FEDFTG)
    sent, _ = round_of(one, 1)
    assert one.weights is not None
    first = one.weights.first
    step = Step(1, sent)
    one.follow([step], first, step.next(first))
    two = session(tmp_path, strategy=FEDFTG)
    two.follow([step], first, step.next(first))
    assert all(torch.equal(t, two._tuned.get()[name]) for name, t in one._tuned.get().items())
    # Sent anew from the base model, as after an error, a process that has gone on loads the base model again.
    other = Step(1, {name: 2 * tensor if "/left" in name else tensor for name, tensor in sent.items()})
    two.follow([other], first, other.next(first))
    fresh = session(tmp_path, strategy=FEDFTG)
    fresh.follow([other], first, other.next(first))
    assert all(torch.equal(t, two._tuned.get()[name]) for name, t in fresh._tuned.get().items())
    with pytest.raises(StaleStateError, match="send the weights in full"):
        two.follow([], "elsewhere", "nowhere")


@pytest.mark.parametrize("strategy", [FEDFTG, {**LORA, "name": "fedit"}], ids=["fedftg", "fedit"])
def test_packed_rows_give_the_update_of_padded_ones(tmp_path: Path, strategy: dict[str, Any]) -> None:
    found = {}
    for packing in ("off", "on"):
        own = session(tmp_path / packing, strategy=strategy, training={"packing": packing, "batch_size": 4})
        own.hello()
        assert (own.model.packing is not None) == (packing == "on")
        start, names = state(own), list(own.exchanged)
        own.set_state(start, None, names)
        _, numbers = own.train(1, names)
        change = torch.cat([(tensor - start[name]).flatten() for name, tensor in state(own).items()])
        found[packing] = change, numbers["loss"], numbers["tokens"]
    (padded, loss, tokens), (packed, *same) = found["off"], found["on"]
    assert same == [pytest.approx(loss, rel=1e-6), tokens]
    assert float((packed - padded).norm() / padded.norm()) < 1e-4  # Adam divides small gradients by themselves
    assert not torch.equal(packed, padded)
