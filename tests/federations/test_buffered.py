"""Rounds that wait for no slow site, with true sites: the result is that of FedBuff (arXiv 2106.06639)."""

from pathlib import Path

import numpy as np
import torch

from client.privacy.agreement import make_agreement
from client.session import Session
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.site import SiteConfig
from deploy.sandbox.tiny import make_federation
from tests.harness.in_one_process import in_one_process
from tests.harness.results import events, weights

SIZES = {"site-a": 9, "site-b": 17, "site-c": 30}
#: Site and age of each round's updates: the sites of one process work in turn.
CAME = [
    [("site-a", 0), ("site-b", 0)],
    [("site-c", 1), ("site-a", 0)],
    [("site-b", 1), ("site-a", 0)],
    [("site-c", 1), ("site-a", 0)],
]
Arrays = dict[str, np.ndarray]


def test_changes_of_old_updates_are_added_in_the_basis_in_which_they_were_made(tmp_path: Path) -> None:
    strategy = {"name": "fedftg", "blocks": "lower half", "rank": 2, "subspace": "shared", "scale": 1.0}
    cohort = {"min_clients": 2, "mode": "buffered", "size": 2, "max_age": 1}
    file = make_federation(tmp_path, SIZES, strategy=strategy, cohort=cohort, rounds=len(CAME))
    run = in_one_process(file)
    replies = events(run, "reply")
    assert [(e["round"], e["client"], e.get("age", 0)) for e in replies] == [
        (number, site, age) for number, came in enumerate(CAME, start=1) for site, age in came
    ]
    torch.set_num_threads(1)
    config = make_agreement(resolved(load(file, FederationConfig), file)).federation

    def trained(site: str, server_round: int, start: Arrays) -> tuple[Arrays, int]:
        own = file.parent / f"{site}.yaml"
        session = Session(load(own, SiteConfig), own, config)
        tensors = {name: torch.from_numpy(array.astype(np.float32)) for name, array in start.items()}
        session.set_state(tensors, None, list(tensors), after=server_round - 1)
        session.train(server_round, list(tensors))
        return {name: tensor.double().numpy() for name, tensor in session._tuned.get().items()}, session.train_rows

    exported, base = weights(run), weights(file.parent)
    own = file.parent / "site-a.yaml"
    active = list(Session(load(own, SiteConfig), own, config).exchanged)
    states: list[Arrays] = [{name: base[name].double().numpy() for name in active}]
    for number, came in enumerate(CAME, start=1):
        state = {name: array.copy() for name, array in states[-1].items()}
        done = [(age, *trained(site, number - age, states[number - age - 1])) for site, age in came]
        rows = sum(count for _, _, count in done)
        for age, after, count in done:
            for name, array in state.items():
                array += count / rows / (1 + age) ** 0.5 * (after[name] - states[number - age - 1][name])
        states.append(state)
    for name, expected in states[-1].items():
        moved = expected - base[name].double().numpy()
        assert np.linalg.norm(moved) > 0
        assert np.linalg.norm(exported[name].double().numpy() - expected) < 1e-4 * np.linalg.norm(moved)
