"""What is spooled is what comes back, whatever the order of arrival; the folder is gone afterwards."""

from pathlib import Path

import pytest
import torch

from common.errors import FederationError
from common.protocol.factors import Factors
from server.loop.pending_updates import PendingUpdates
from strategies.admission.bounds import UpdateSize
from strategies.rule import Update
from tests.harness.full_disk import no_space

SIZE = UpdateSize(1.0, 1.0, 0.0)
BASIS = torch.arange(4.0).reshape(1, 4)  # all sites share it in a round


def make(client: str, seed: int) -> Update:
    g = torch.Generator().manual_seed(seed)
    terms = [(torch.randn(6, 2, generator=g), torch.randn(2, 4, generator=g)) for _ in range(2)]
    more = (torch.randn(6, 1, generator=g), BASIS)
    factors = {"a.weight": Factors(0.99, terms), "b.weight": Factors(1.0, [more], common=True)}
    return Update(client, seed, {"c.weight": torch.randn(3, 5, generator=g).bfloat16()}, 16.0, factors)


def same(a: Update, b: Update) -> bool:
    return (
        (a.client, a.num_examples, a.lora_alpha) == (b.client, b.num_examples, b.lora_alpha)
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
        and a.factors.keys() == b.factors.keys()
        and all(
            (x.decay, x.common) == (y.decay, y.common)
            and all(
                torch.equal(l1, l2) and torch.equal(r1, r2) for (l1, r1), (l2, r2) in zip(x.terms, y.terms, strict=True)
            )
            for x, y in ((a.factors[name], b.factors[name]) for name in a.factors)
        )
    )


def test_updates_come_back_by_name_as_they_were(tmp_path: Path) -> None:
    updates = {name: make(name, seed) for seed, name in enumerate(["site-b", "site-c", "site-a"], start=1)}
    with PendingUpdates(tmp_path / "incoming") as pending:
        for update in updates.values():
            pending.put(update, SIZE)
        back = list(pending.updates())
        assert [update.client for update in back] == ["site-a", "site-b", "site-c"]
        assert all(same(update, updates[update.client]) for update in back)
        assert all(update.factors["b.weight"].terms[0][1] is BASIS for update in back)
    assert not (tmp_path / "incoming").exists()


def test_what_a_killed_server_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "incoming").mkdir()
    (tmp_path / "incoming" / "0.safetensors").write_bytes(b"half of it")
    with PendingUpdates(tmp_path / "incoming") as pending:
        assert list(pending.updates()) == []
        pending.put(make("site-a", 1), SIZE)
        assert len(list(pending.updates())) == 1


def test_full_disk_is_an_error_that_names_client_and_folder(tmp_path: Path) -> None:
    with (
        PendingUpdates(tmp_path / "incoming") as pending,
        no_space(64),
        pytest.raises(FederationError, match=r"site-a: its update cannot be kept in .*incoming: .*too large"),
    ):
        pending.put(make("site-a", 1), SIZE)


def test_updates_longer_than_the_median_allows_are_removed_and_told(tmp_path: Path) -> None:
    with PendingUpdates(tmp_path / "incoming") as pending:
        for number, (signal, noise) in enumerate([(1.0, 0.0), (2.0, 0.0), (25.0, 0.0), (25.0, 9.0)]):
            pending.put(make(f"site-{number}", number), UpdateSize(signal, signal, noise))
        assert pending.refuse_beyond(10.0) == {}  # the upper median is 25
        for number in (4, 5, 6):
            pending.put(make(f"site-{number}", number), UpdateSize(2.0, 2.0, 0.0))
        refused = pending.refuse_beyond(10.0)
        assert refused == {"site-2": "site-2: its update moved by 25; allowed: 20, 10 times the round's median"}
        pending.put(make("site-7", 7), SIZE)  # its file is none of the others'
        names = [f"site-{number}" for number in (0, 1, 3, 4, 5, 6, 7)]
        for update, name in zip(pending.updates(), names, strict=True):
            assert same(update, make(name, int(name[-1])))
