"""A server that has models written which no round has made: a site writes those of its agreement, and no others."""

from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord

from common.model.card import BaseFacts, Card
from common.model.finished import About, Use
from common.protocol.digest import tensors_digest
from common.protocol.messages import DeliverReply, DeliverRequest, Failure, State
from tests.attacks.test_asking import Site


def test_cards_of_other_models_fill_no_disk(tmp_path: Path) -> None:
    site = Site(tmp_path / "made", own={"keep": {"model": "models", "when": "every"}})
    folder = tmp_path / "made" / "models" / "tiny"
    first = site.state(number=0)
    weights = site.session().weights
    assert weights is not None
    digest = tensors_digest(weights.tensors)
    base = BaseFacts(name="m", digest="0" * 64, tokenizer_digest="0" * 64, dtype="float32")
    facts: dict[str, Any] = {"federation": "tiny", "task": site.config.task, "strategy": site.config.strategy}
    facts |= {"base": base, "form": "model", "round": 1, "rounds": 2, "sites": 1, "trained_digest": digest}
    told = State(server_round=1, active=[], arrays=ArrayRecord(), version=first.version, since=first.since)

    def asked(**changed: object) -> tuple[str, DeliverReply | None]:
        about = About(use=Use.of(site.config, None), card=Card(**{**facts, **changed})).model_dump_json()
        request = DeliverRequest(**vars(site.settings), **vars(told), about=about)
        reply = site._ask("query.deliver", request.to_record())
        return (Failure.read(reply.error).reason, None) if reply.has_error() else ("", DeliverReply.read(reply.content))

    with torch.random.fork_rng():
        for key, lie in (
            ("rounds", {"rounds": 10**6, "round": 10**6}),
            ("federation", {"federation": "other"}),
            ("strategy", {"strategy": site.config.strategy.model_copy(update={"rank": 3})}),
        ):
            assert f"the model card's `{key}` is not that of the federation" in asked(**lie)[0]
            assert not folder.exists()
        (folder / "model").mkdir(parents=True)  # somebody's, since the site has joined
        (folder / "model" / "theirs").write_text("kept")
        _, refused = asked()
        assert refused is not None
        assert "its folder holds something else" in str(refused.reason)
        assert [path.name for path in folder.rglob("*")] == ["model", "theirs"]
        folder.rename(tmp_path / "elsewhere")
        _, written = asked()
    assert written is not None
    assert written.files is not None
    assert sorted(path.name for path in folder.iterdir()) == ["delivered.json", "round-001"]
