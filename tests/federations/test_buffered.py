"""Rounds that wait for no slow site, with true sites: the result is that of FedBuff (arXiv 2106.06639)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from client.privacy.agreement import make_agreement
from client.session import Session
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.site import SiteConfig
from common.protocol.tensors import Tensors
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


#: Own bases, from which much waits at the server, and moments and bases that every site goes on with.
ALL_AT_ONCE = {"downlink_rank": 3, "optimizer_state": "keep", "update_proj_gap": 4}


@pytest.mark.parametrize("options", [{"subspace": "shared"}, ALL_AT_ONCE], ids=["shared", "own"])
def test_result_is_that_of_fedbuff_from_each_sites_training_done_again(
    tmp_path: Path, options: dict[str, object]
) -> None:
    strategy = {"name": "fedftg", "blocks": "lower half", "rank": 2, "scale": 1.0, **options}
    cohort = {"min_clients": 2, "mode": "buffered", "size": 2, "max_age": 1}
    kept = {"checkpoint": {"keep": len(CAME)}, "cohort": cohort, "rounds": len(CAME)}
    file = make_federation(tmp_path, SIZES, strategy=strategy, **kept)
    run = in_one_process(file)
    replies = events(run, "reply")
    assert [(e["round"], e["client"], e.get("age", 0)) for e in replies] == [
        (number, site, age) for number, came in enumerate(CAME, start=1) for site, age in came
    ]
    torch.set_num_threads(1)
    config = make_agreement(resolved(load(file, FederationConfig), file)).federation
    own: dict[str, Tensors] = {}

    def trained(site: str, server_round: int, start: Arrays) -> tuple[Arrays, int]:
        file_ = file.parent / f"{site}.yaml"
        session = Session(load(file_, SiteConfig), file_, config)
        session.kept = own.get(site, {})
        tensors = {name: torch.from_numpy(array.astype(np.float32)) for name, array in start.items()}
        session.set_state(tensors, None, list(tensors), after=server_round - 1)
        session.train(server_round, list(tensors))
        own[site] = session.kept
        return {name: tensor.double().numpy() for name, tensor in session._tuned.get().items()}, session.train_rows

    def after(number: int, file: str) -> Arrays:
        folder = run / "checkpoints" / f"round-{number:06}"
        return {n: t.double().numpy() for n, t in load_file(folder / f"{file}.safetensors").items()}

    def waiting(number: int, name: str) -> np.ndarray | float:
        if not (run / "checkpoints" / f"round-{number:06}" / "waiting.safetensors").exists():
            return 0.0
        found = after(number, "waiting")
        factors = [found.get(f"{name}/{side}") for side in ("left", "right")]
        return found[name] if name in found else 0.0 if factors[0] is None else factors[0] @ factors[1]

    base, exported = weights(file.parent), weights(run)
    states = [{name: base[name].double().numpy() for name in after(1, "state")}]  # as the sites train from them
    sums = [dict(states[0])]  # with what waits
    for number, came in enumerate(CAME, start=1):
        sum_ = {name: array.copy() for name, array in sums[-1].items()}
        done = [(age, *trained(site, number - age, states[number - age - 1])) for site, age in came]
        rows = sum(count for _, _, count in done)
        states.append(after(number, "state"))
        for name, array in sum_.items():
            for age, there, count in done:
                array += count / rows / (1 + age) ** 0.5 * (there[name] - states[number - age - 1][name])
            moved = np.linalg.norm(array - sums[-1][name])
            assert moved > 0
            assert np.linalg.norm(states[-1][name] + waiting(number, name) - array) < 1e-4 * moved
        sums.append(sum_)
        held_back = any(np.linalg.norm(waiting(number, name)) > 0 for name in sum_)
        assert held_back == ("downlink_rank" in options and number < len(CAME))
    for name, expected in sums[-1].items():
        assert np.linalg.norm(exported[name].double().numpy() - expected) < 1e-4 * np.linalg.norm(
            expected - sums[0][name]
        )
    assert bool(own["site-c"]) == ("optimizer_state" in options)
