"""Sites of one process: each begins with the base model as it is on disk, whatever the others made of theirs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from client.bases import Bases
from client.session import Session
from common.base_model import Base
from common.config import FederationConfig, SiteConfig, resolved
from common.tasks import CausalLM
from common.yaml_file import load
from tests.tiny import make_federation


def test_model_is_read_once_and_no_site_sees_what_another_made_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_federation(tmp_path, {"site-a": 12, "site-b": 12})
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
    state = first._tuned.get()
    first.set_state(state, None, list(state))
    trained, _ = first.train(1, list(state))
    assert trained
    assert any(not torch.equal(first._tuned.get()[name], state[name]) for name in state)
    assert second.hello() == alone.hello() == second.hello()
    theirs = second._tuned.get()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in alone._tuned.get().items())
    assert second._base.tokenizer is first._base.tokenizer
    assert len(read) == 2  # one for both, one for the site that is alone
