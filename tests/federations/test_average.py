"""FedFTG among three sites: the average, and the scores of what the models answer."""

from pathlib import Path

import numpy as np
import pytest
import torch

from client.privacy.agreement import make_agreement
from client.session import Session
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.site import SiteConfig
from deploy.sandbox.tiny import make_federation
from tests.harness.in_one_process import in_one_process
from tests.harness.results import records, weights

SIZES = {"site-a": 9, "site-b": 17, "site-c": 30}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Its file and its run folder."""
    folder = tmp_path_factory.mktemp("average")
    file = make_federation(folder, SIZES, strategy={"rank": 2}, evaluation={"generate": 2})
    return file, in_one_process(file)


def test_average_equals_an_independent_float64_computation(federation: tuple[Path, Path]) -> None:
    file, run = federation
    torch.set_num_threads(1)
    config = make_agreement(resolved(load(file, FederationConfig), file)).federation
    state: dict[str, torch.Tensor] | None = None
    for server_round in (1, 2):
        replies = []
        for site in SIZES:
            own = file.parent / f"{site}.yaml"
            session = Session(load(own, SiteConfig), own, config)
            start = session._tuned.get() if state is None else state
            session.set_state(start, None, list(start), after=server_round - 1)
            session.train(server_round, list(start))
            replies.append((session._tuned.get(), session.train_rows))  # the weights, whatever form they travel in
        total = sum(rows for _, rows in replies)
        state = {
            name: torch.from_numpy(
                sum(
                    (t[name].numpy().astype(np.float64) * (rows / total) for t, rows in replies),
                    start=np.zeros(tuple(replies[0][0][name].shape)),
                ).astype(np.float32)
            )
            for name in replies[0][0]
        }
    assert state is not None
    exported, base = weights(run), weights(file.parent)
    for name, expected in state.items():
        assert not torch.equal(base[name], expected)
        # Relative to the change: rounds of Adam amplify the last bits of single entries that are near zero.
        assert float((exported[name] - expected).norm() / (expected - base[name]).norm()) < 1e-5


def test_answers_are_generated_and_scored_everywhere(federation: tuple[Path, Path]) -> None:
    found = records(federation[1], "evaluate")
    assert {(r["round"], r["client"]) for r in found} == {(n, who) for n in (0, 1, 2) for who in (*SIZES, "server")}
    expected = {"loss", "perplexity", "tokens", "examples", "generated", "rouge_l", "bleu_4", "exact_match"}
    assert all(set(record["evaluate"]) == expected for record in found)
