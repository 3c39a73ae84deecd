"""Which sites are admitted to a run."""

import re
from pathlib import Path

import pytest
import torch
from flwr.app import Message, MessageType

from common.protocol import wire
from common.protocol.messages import EvaluateReply
from tests.harness.fake_sites import NAME, Site, run
from tests.server.loop.test_admission import DECLARED, cohort, events


class Noisy(Site):
    """A site that sends its weights whole, with noise."""

    def __init__(self, number: int, noise: float) -> None:
        super().__init__(number)
        self._noise = noise

    def reply(self, message: Message) -> Message:
        reply = super().reply(message)
        if message.metadata.message_type == MessageType.TRAIN:
            g = torch.Generator().manual_seed(9)
            noised = self.weights.tensors[NAME] + self._noise * torch.randn((60, 40), generator=g)
            reply.content["arrays"] = wire.encode({NAME: noised})
        return reply


def unevaluated(message: Message) -> Message | None:
    """These sites read steps alone; a state that noise has filled goes down whole."""
    if message.metadata.message_type != MessageType.EVALUATE:
        return None
    return Message(EvaluateReply().to_record(), reply_to=message)


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ({"base_digest": "5eed"}, "site-3: its base model differs: digest 5eed, the federation's is base"),
        ({"tokenizer_digest": "5eed"}, "site-3: its tokenizer differs: digest 5eed, the federation's is tokenizer"),
        ({"train_rows": 0}, "site-3: train_rows is 0; allowed: a whole number from 1"),
        ({"rank": "2"}, "site-3: rank is '2'; allowed: a whole number from 0"),
        (
            {"site": "../site-3"},
            "node 3: site is '../site-3'; allowed: letters, digits, '.', '_' and '-', up to 64, but not server",
        ),
        (
            {"site": "server"},
            "node 3: site is 'server'; allowed: letters, digits, '.', '_' and '-', up to 64, but not server",
        ),
        ({"site": "site-2"}, "site-2: a site of this name has already joined, and is still connected"),
    ],
)
def test_site_that_does_not_fit_is_refused_by_name_and_the_others_go_on(
    tmp_path: Path, says: dict[str, int | str], reason: str
) -> None:
    sites = [Site(1), Site(2), Site(3)]
    sites[2].says = says
    run(tmp_path, sites, 1, cohort=cohort(2))
    (refused,) = events(tmp_path, "client_refused")
    assert refused["reason"] == reason
    assert sites[2].sent == []


@pytest.mark.parametrize(("limit", "declares", "taken"), [(4, 5, False), (5, 5, True), (None, 10**9, True)])
def test_site_that_declares_more_rows_than_allowed_is_not_admitted(
    tmp_path: Path, limit: int | None, declares: int, taken: bool
) -> None:
    sites = [Site(1), Site(2), Site(3)]
    sites[2].says = {"train_rows": declares}
    run(tmp_path, sites, 1, cohort=cohort(2), admission={"max_rows": limit})
    reasons = [e["reason"] for e in events(tmp_path, "client_refused")]
    assert reasons == ([] if taken else ["site-3: it declares 5 training rows; allowed by `admission.max_rows`: 4"])
    assert bool(sites[2].sent) == taken


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        (DECLARED, r"adds noise of standard deviation 100 .*allowed by `admission.max_noise`: 0"),
        ({**DECLARED, "noise": float("nan")}, "site-3: noise is nan; allowed: a positive number"),
        ({"clip": 1.0}, "site-3: noise is missing; allowed: a positive number"),
    ],
)
def test_site_that_adds_noise_is_not_admitted_unless_the_federation_says_so(
    tmp_path: Path, declared: dict[str, float], reason: str
) -> None:
    sites = [Site(1), Site(2), Site(3)]
    sites[2].privacy = declared
    run(tmp_path, sites, 1, cohort=cohort(2))
    (refused,) = events(tmp_path, "client_refused")
    assert refused["client"] == "site-3"
    assert re.search(reason, refused["reason"])


@pytest.mark.parametrize(
    ("declared", "actual", "refused"), [(100.0, 100.0, False), (10.0, 100.0, True), (0, 100.0, True)]
)
def test_noise_is_admitted_as_far_as_it_was_declared(
    tmp_path: Path, declared: float, actual: float, refused: bool
) -> None:
    sites = [Site(1), Site(2), Site(3), Noisy(4, actual)]
    sites[3].privacy = {**DECLARED, "noise": declared} if declared else {}
    for site in sites:
        site.before_reply = unevaluated
    run(tmp_path, sites, 1, cohort=cohort(3), admission={"max_noise": 200.0})
    assert bool(events(tmp_path, "update_refused")) == refused
    (joined,) = [e for e in events(tmp_path, "client_joined") if e["client"] == "site-4"]
    assert (joined["privacy"] is None) == (declared == 0)
