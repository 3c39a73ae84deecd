"""Sites of one process: each begins with the base model as it is on disk, and what nobody changes is there once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from client.session import Session
from client.site_model import Bases
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.site import SiteConfig
from common.data.tasks import CausalLM
from common.model.base_model import Base
from deploy.sandbox.tiny import make_federation

_LORA = {"rank": 4, "lora_alpha": 8.0, "blocks": "lower half"}


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "fedftg", "blocks": "lower half", "rank": 4, "scale": 1.0},
        {"name": "rolora", **_LORA},
        {"name": "fedsa-lora", **_LORA},
        {"name": "flora", **_LORA},
        {"name": "fedex-lora", **_LORA},
    ],
    ids=lambda strategy: strategy["name"],
)
def test_model_is_read_once_and_no_site_sees_what_another_made_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: dict[str, Any]
) -> None:
    file = make_federation(tmp_path, {"site-a": 12, "site-b": 12}, strategy=strategy, evaluation={"server": None})
    federation = resolved(load(file, FederationConfig), file)
    read: list[str] = []
    from_disk = CausalLM.load

    def counted(self: CausalLM, source: str, *about: Any) -> Base:
        read.append(source)
        return from_disk(self, source, *about)

    monkeypatch.setattr(CausalLM, "load", counted)
    bases = Bases()

    def session(site: str, shared: Bases | None) -> Session:
        site_file = tmp_path / f"{site}.yaml"
        return Session(load(site_file, SiteConfig), site_file, federation, shared)

    alone, first, second = session("site-b", None), session("site-a", bases), session("site-b", bases)
    first.hello()
    state, names = _trained(first), list(first.exchanged)
    first.set_state({name: 0.99 * state[name] for name in first.exchanged}, None, names, after=9)
    first.train(1, names)
    mine = _trained(first)
    assert all(not torch.equal(mine[name], state[name]) for name in state)
    assert second.hello() == alone.hello() == second.hello()
    theirs = _trained(second)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in _trained(alone).items())
    assert second.model.base.tokenizer is first.model.base.tokenizer
    assert len(read) == 2  # one for both, one for the site that is alone

    weights = [{name: p.data_ptr() for name, p in site._tuned.model.named_parameters()} for site in (first, second)]
    own = {p.data_ptr() for site in (first, second) for p in (site._tuned.parameters | site._tuned.local).values()}
    assert len(own) == 2 * len(mine)
    frozen = [name for name, address in weights[0].items() if address not in own]
    assert frozen
    assert all(weights[0][name] == weights[1][name] for name in frozen)


def _trained(session: Session) -> dict[str, torch.Tensor]:
    """All that a site trains: what it exchanges and what it keeps."""
    tuned = session._tuned
    return tuned.get() | {name: parameter.detach().clone() for name, parameter in tuned.local.items()}
