"""Noise that the sites of a masked sum share, against noise that each site adds by itself: loss and epsilon.

The task of benchmarks/experiments/private.yaml: titles of ICD-10-CM, neoplasm or circulatory system. A head of 770
numbers is trained on the pooled outputs of all-MiniLM-L6-v2, which are computed once, since the model stays frozen.
Sites, server and sums are in one process; clipping, noise, masks and accounting are the product's own.
``python -m benchmarks.experiments.prepare`` fetches model and titles.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from torch import Tensor
from torch.nn import functional

from benchmarks.experiments.prepare import DEFAULT_CACHE
from benchmarks.experiments.private import CHAPTERS, PRIVACY
from benchmarks.table import Cell, Table
from client.privacy.guarantee import guarantee
from client.privacy.noise import private
from common.accountant import cost, epsilon
from common.config.site import PrivacyConfig
from common.masking import primitives
from common.masking.fixed_point import Words, decode
from common.masking.noise import Numbers, add_noise, encode_hidden
from common.masking.parts import SumId, shown
from common.masking.server import ServerSum
from common.masking.site import SiteSum

ROUNDS, RATE, BATCH, SEEDS = 5, 4.0, 32, 10
SITES = {3: 2, 10: 7, 20: 14}  # the threshold by the number of sites: the least above two thirds, 2 for 3
SHARED = ("shared", "shared, T left")
LOCAL = PrivacyConfig.model_validate(PRIVACY)
_FOLDER = DEFAULT_CACHE / "private"
_DRAWN = 738_868  # numbers of the demo at rank 16
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Titles:
    """Pooled outputs (rows, 384) and labels (rows,)."""

    features: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor) -> "Titles":
        return Titles(self.features[rows], self.labels[rows])


def titles(*files: Path) -> Titles:
    """The titles in these files, in this order, through the frozen model."""
    from transformers import AutoModel, AutoTokenizer  # takes seconds to import

    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    model = AutoModel.from_pretrained(DEFAULT_CACHE / "minilm").eval()
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_CACHE / "minilm")
    pooled = []
    with torch.inference_mode():
        for at in range(0, len(rows), 100):
            texts = [row["title"] for row in rows[at : at + 100]]
            tokens = tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
            pooled.append(model(**tokens).pooler_output)
    labels = list(CHAPTERS.values())
    return Titles(torch.cat(pooled).clone(), torch.tensor([labels.index(row["label"]) for row in rows]))


def dealt(whole: Titles, sites: int) -> list[Titles]:
    """Every site's titles: pairs of one title of either label, dealt out in turns."""
    pairs = torch.arange(len(whole.labels) // 2)
    of = [pairs[site::sites] for site in range(sites)]
    return [whole[torch.stack([2 * own, 2 * own + 1], 1).flatten()] for own in of]


def change(head: Tensors, own: Titles, generator: torch.Generator) -> Tensors:
    """The change of the head by one step of SGD on some of a site's rows."""
    rows = own[torch.randperm(len(own.labels), generator=generator)[:BATCH]]
    trained = {name: tensor.clone().requires_grad_() for name, tensor in head.items()}
    loss = functional.cross_entropy(rows.features @ trained["weight"].T + trained["bias"], rows.labels)
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return {name: -RATE * gradient for name, gradient in zip(trained, gradients, strict=True)}


def masked_mean(changes: list[Tensors], left: int, threshold: int, part: float, number: int) -> Tensors:
    """The mean of clipped changes, each with a part of the noise, by a masked sum: the server sees nothing else.

    Only the first ``left`` sites send a vector; the others drop out after they have shared their secrets.
    """
    clients, shapes = len(changes), {name: tensor.shape for name, tensor in changes[0].items()}
    sum_id = SumId(run=1, server_round=number, attempt=0, threshold=threshold)
    keys = [ec.generate_private_key(ec.SECP384R1()) for _ in changes]
    peers = {shown(primitives.id_of(key.public_key())): f"site-{k}" for k, key in enumerate(keys)}
    server, sites = ServerSum(sum_id), [SiteSum(sum_id, key, peers, threshold - 1) for key in keys]
    server.expect(sum(shape.numel() for shape in shapes.values()))
    ids = [server.add_keys(f"site-{k}", site.advert) for k, site in enumerate(sites)]
    for member, site in zip(ids, sites, strict=True):
        server.add_shares(member, site.share(server.listing.raw))
    ids, sites = ids[:left], sites[:left]
    for member, site, own in zip(ids, sites, changes[:left], strict=True):
        update = [Numbers(LOCAL.clip, tensor.numel(), tensor.flatten().numpy) for tensor in own.values()]
        words, _ = encode_hidden(update, 1.0, clients, part, LOCAL.clip)
        site.receive(server.shares_for(member))
        server.add_vector(member, site.mask(words, b"state"))
    for member, site in zip(ids, sites, strict=True):
        server.add_signature(member, site.sign(server.survivors))
    for member, site in zip(ids, sites, strict=True):
        server.add_unmasking(member, site.unmask(server.signatures))
    total: Words = server.total(b"state")
    flat = torch.from_numpy(decode(total, LOCAL.clip, left, clients, part)).float()
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}


def plain_mean(changes: list[Tensors], noise_multiplier: float) -> Tensors:
    """The mean of changes that every site clips and noises by itself."""
    config = LOCAL.model_copy(update={"noise_multiplier": noise_multiplier})
    sent = [private(own, config) for own in changes]
    return {name: torch.stack([own[name] for own in sent]).mean(0) for name in sent[0]}


def federate(sites: list[Titles], noise: str, threshold: int, seed: int) -> Tensors:
    """The head after all rounds."""
    generator = torch.Generator().manual_seed(seed)
    bound = 384**-0.5
    head = {"weight": torch.empty(2, 384).uniform_(-bound, bound, generator=generator), "bias": torch.zeros(2)}
    for number in range(1, ROUNDS + 1):
        changes = [change(head, own, generator) for own in sites]
        if noise in SHARED:
            left = len(sites) if noise == SHARED[0] else threshold
            moved = masked_mean(changes, left, threshold, part_of(threshold), number)
        else:
            moved = plain_mean(changes, LOCAL.noise_multiplier if noise == "local" else 1e-9)
        head = {name: tensor + moved[name] for name, tensor in head.items()}
    return head


def part_of(threshold: int) -> float:
    """The noise of one site, so that as many as the threshold add up to what each alone would have needed."""
    return LOCAL.noise_multiplier * LOCAL.clip / math.sqrt(threshold) * (1 + 2**-17)


def score(head: Tensors, test: Titles) -> tuple[float, float]:
    """Accuracy and loss."""
    logits = test.features @ head["weight"].T + head["bias"]
    hits = (logits.argmax(1) == test.labels).float().mean()
    return float(hits), float(functional.cross_entropy(logits, test.labels))


def rows(train: Titles, test: Titles) -> Iterator[dict[str, Cell]]:
    """One row for each number of sites and kind of noise."""
    for clients, threshold in SITES.items():
        sites = dealt(train, clients)
        for noise in ("none", "local", *SHARED):
            found = [score(federate(sites, noise, threshold, seed), test) for seed in range(SEEDS)]
            accuracy, loss = zip(*found, strict=True)
            print(clients, noise, [round(a, 2) for a in accuracy], flush=True)
            yield {
                "sites": clients,
                "noise": noise,
                "threshold": threshold if noise in SHARED else None,
                **_epsilons(noise, threshold),
                "noise in the mean": _in_mean(noise, clients, threshold),
                "accuracy": mean(accuracy),
                "deviation": stdev(accuracy),
                "loss": mean(loss),
                "loss, deviation": stdev(loss),
            }


def _epsilons(noise: str, threshold: int) -> dict[str, Cell]:
    """Epsilon of all rounds against the server alone, with one other site, and with all but this one."""
    others = {"server": 0, "server + 1 site": 1, "server + T - 1 sites": threshold - 1}
    if noise == "none":
        return dict.fromkeys((f"epsilon: {who}" for who in others), None)
    found: dict[str, Cell] = {}
    for who, colluders in others.items():
        asked = LOCAL.model_copy(update={"noise": "shared", "colluders": colluders, "noise_multiplier": 1e-3})
        section = LOCAL if noise == "local" else asked
        multiplier = guarantee(section, threshold, part_of(threshold)).noise_multiplier
        found[f"epsilon: {who}"] = epsilon(ROUNDS * cost(multiplier), LOCAL.delta)
    return found


def _in_mean(noise: str, clients: int, threshold: int) -> float:
    """Standard deviation of the noise on a number of the mean of one round."""
    if noise in SHARED:
        return part_of(threshold) / math.sqrt(clients if noise == SHARED[0] else threshold)
    return LOCAL.noise_multiplier * LOCAL.clip / math.sqrt(clients) if noise == "local" else 0.0


def seconds_to_draw(count: int) -> float:
    """Median of five."""
    found = []
    for _ in range(5):
        words = np.zeros(count, np.uint32)
        began = time.perf_counter()
        add_noise(words, 2**26)
        found.append(time.perf_counter() - began)
    return sorted(found)[2]


def run() -> Table:
    """Every number of sites and kind of noise."""
    torch.set_num_threads(1)
    train, test = titles(*sorted((_FOLDER / "10").glob("*.jsonl"))), titles(_FOLDER / "test.jsonl")
    return Table(
        "Noise shared by the sites of a masked sum against noise of every site's own: five rounds, delta 1e-5",
        list(rows(train, test)),
        [
            f"{len(train.labels):,} titles of ICD-10-CM in all, dealt out to the sites; a head of 770 numbers; "
            f"{SEEDS} seeds; clip {LOCAL.clip:g}, noise multiplier {LOCAL.noise_multiplier:g}.",
            "none: clipped as the others. local: every site adds all of the noise. shared: as many sites as the",
            "threshold T add as much together, and nobody drops out. T left: all others drop out of every round before",
            "they send. Whoever knows the noise of some sites takes it off: then the epsilons further right hold.",
            f"Drawing the noise of {_DRAWN:,} numbers, the demo's at rank 16: {seconds_to_draw(_DRAWN):.2f} s.",
        ],
    )
