"""Masked sums against updates that the server sees, and against the arithmetic of Flower's SecAgg+ on the same vectors.

The vectors are those of the demo with ``subspace: shared``: 30 MLP weights of SmolLM2-135M, rank 16, 737,280 numbers.
Sites and server are the product's own classes and hand their bytes to each other in one process, one after the other.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ArrayRecord
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from benchmarks.table import Cell, Table
from common.config.federation import FederationConfig
from common.config.load import parse
from common.masking import primitives
from common.masking.fixed_point import encoded_weight
from common.masking.parts import SumId, shown
from common.masking.server import ServerSum
from common.masking.site import SiteSum
from common.protocol import wire
from common.protocol.factors import Factors, pack
from common.protocol.tensors import Tensors
from strategies.combine.masked import Vector, weight_of

SITES = {3: 0, 10: 1, 50: 5}  # drop-outs by the number of sites
RANK, BLOCKS, WIDE, NARROW = 16, 10, 1536, 576
WEIGHTS = {"gate_proj": (WIDE, NARROW), "up_proj": (WIDE, NARROW), "down_proj": (NARROW, WIDE)}
STATE = {f"model.layers.{block}.mlp.{name}.weight": WEIGHTS[name] for block in range(BLOCKS) for name in WEIGHTS}
_MODULUS, _RANGE, _HEAVIEST = 2**32, 2**22, 1000  # SecAgg+'s defaults
Floats = npt.NDArray[np.float64]
T = TypeVar("T")


class Watch:
    """Seconds spent, by who spent them."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def __call__(self, who: str, work: Callable[[], T]) -> T:
        """Do some work."""
        began = time.perf_counter()
        result = work()
        self.spent[who] = self.spent.get(who, 0.0) + time.perf_counter() - began
        return result


def run() -> Table:
    """3, 10 and 50 sites; of 50, five drop out after they have shared their secrets."""
    return Table(
        "One round of the demo's vectors: masked sums, and Flower's SecAgg+ on the same vectors",
        [_measure(sites, lost) for sites, lost in SITES.items()],
        [
            "bytes: what a site sends in a round, all exchanges, over what it sends without masks: float32, packed.",
            "seconds: site, of its own work; server; and a round, if all sites work at once: site + server.",
            "error: |mean - float64 mean|_F / |float64 mean|_F of the changes, 50 to 500 rows. SecAgg+ with defaults",
            "(22 bits, weights up to 1000), clipped to the largest change, every site paired with all others.",
        ],
    )


def _federation(threshold: int) -> FederationConfig:
    data = {"name": "x", "model": {"path": "m"}, "rounds": 4, "secure_aggregation": {"threshold": threshold}}
    data |= {"strategy": {"name": "fedftg", "subspace": "shared", "rank": RANK}}
    training = {"learning_rate": 8e-3, "local_steps": 5}
    return parse({**data, "training": training, "cohort": {"min_clients": threshold}}, FederationConfig, "benchmark")


def _measure(sites: int, lost: int) -> dict[str, Cell]:
    config, generator = _federation(sites // 2 + 1), torch.Generator().manual_seed(sites)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in STATE.items()}
    exchange, rows = config.strategy.exchange(0, 1), np.random.default_rng(sites).integers(50, 500, sites).tolist()
    vector = Vector(config, base, list(base), exchange, max(rows))
    updates = [_update(base, exchange, generator) for _ in range(sites)]
    weights = [weight_of(count, max(rows)) for count in rows]
    flat = [torch.cat([update[key].flatten() for key in vector.most]).double().numpy() for update in updates]
    exact: Floats = np.average(flat[lost:], axis=0, weights=weights[lost:])
    plain = wire.num_bytes(wire.encode(updates[0], bundled=True))
    ours, sent, watch = _masked(vector, updates, weights, lost, config)
    theirs, their_bytes, their_watch = _secaggplus(flat, rows, lost, max(float(np.abs(one).max()) for one in flat))
    row: dict[str, Cell] = {"sites": sites, "drop-outs": lost, "bytes without": plain, "bytes": sent / plain}
    row |= {"SecAgg+ bytes": their_bytes / plain, "error": _error(ours, exact), "SecAgg+ error": _error(theirs, exact)}
    for title, spent in (("", watch.spent), ("SecAgg+ ", their_watch.spent)):
        row |= {f"{title}site s": spent["site"], f"{title}server s": spent["server"]}
        row |= {f"{title}round s": spent["site"] + spent["server"]}
    return row


def _error(found: Floats, exact: Floats) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def _update(base: Tensors, exchange: Any, generator: torch.Generator) -> Tensors:  # noqa: ANN401 - an Exchange
    sent: Tensors = {}
    for name, start in base.items():
        basis, right = exchange.basis(name, start.shape), start.shape[0] >= start.shape[1]
        low = 1e-3 * torch.randn((len(start), RANK) if right else (RANK, start.shape[1]), generator=generator)
        sent |= pack(name, Factors(1.0, [(low, basis) if right else (basis, low)], common=True), start, exchange)
    return sent


def _masked(
    vector: Vector, updates: list[Tensors], weights: list[float], lost: int, config: FederationConfig
) -> tuple[Floats, float, Watch]:
    """Our mean, bytes that a site sends, and seconds: of the mean site, and of the server."""
    assert config.secure_aggregation is not None
    watch, threshold = Watch(), config.secure_aggregation.threshold
    which = SumId(run=1, server_round=1, attempt=0, threshold=threshold)
    keys = [ec.generate_private_key(ec.SECP384R1()) for _ in updates]
    peers = {shown(primitives.id_of(key.public_key())): f"site-{k}" for k, key in enumerate(keys)}
    server = ServerSum(which)
    server.expect(vector.words + 1)
    sites = [watch("site", partial(SiteSum, which, key, peers, 1)) for key in keys]
    ids = [watch("server", partial(server.add_keys, f"site-{k}", site.advert)) for k, site in enumerate(sites)]
    sizes = [len(sites[0].advert)]
    listing = watch("server", lambda: server.listing.raw)
    for member, site in zip(ids, sites, strict=True):
        sealed = watch("site", partial(site.share, listing))
        watch("server", partial(server.add_shares, member, sealed))
    sizes.append(len(sealed))

    def masked(site: SiteSum, update: Tensors, weight: float, sealed: bytes) -> tuple[ArrayRecord, np.uint32]:
        site.receive(sealed)
        words, _ = vector.encode(update, weight, site.members)
        word = np.array([encoded_weight(weight, site.members)], np.uint32)
        found = site.mask(np.concatenate([words, word]), b"state")
        return wire.encode(vector.split(found[:-1]), bundled=True), found[-1]

    def added(member: bytes, record: ArrayRecord, word: np.uint32) -> None:
        server.add_vector(member, np.append(vector.join(wire.decode(record, vector.most)), word))

    left = list(zip(ids, sites, strict=True))[lost:]
    for (member, site), update, weight in zip(left, updates[lost:], weights[lost:], strict=True):
        own = watch("server", partial(server.shares_for, member))
        record, word = watch("site", partial(masked, site, update, weight, own))
        watch("server", partial(added, member, record, word))
    sizes += [wire.num_bytes(record), 8]
    survivors = watch("server", lambda: server.survivors)
    for member, site in left:
        signature = watch("site", partial(site.sign, survivors))
        watch("server", partial(server.add_signature, member, signature))
    signatures = watch("server", lambda: server.signatures)
    for member, site in left:
        shares = watch("site", partial(site.unmask, signatures))
        watch("server", partial(server.add_unmasking, member, shares))
    sizes += [len(signature), len(shares)]

    def unmasked() -> Floats:
        total = server.total(b"state")
        _, factors = vector.mean(total[:-1], sum(weights[lost:]), len(ids))
        pairs = [factors[name].terms[0] for name in sorted(factors)]
        parts = [left if len(left) > right.shape[1] else right for left, right in pairs]
        return np.concatenate([part.flatten().double().numpy() for part in parts])

    result = watch("server", unmasked)
    watch.spent["site"] /= len(sites)
    return result, float(sum(sizes)), watch


def _secaggplus(flat: list[Floats], rows: list[int], lost: int, bound: float) -> tuple[Floats, float, Watch]:
    """The mean by SecAgg+'s functions in the order of its client mod and workflow; seeds in place of key exchanges."""
    watch, count, total = Watch(), len(flat), list[npt.NDArray[Any]]()
    for k in range(lost, count):
        vector = watch("site", partial(_masked_by_flower, flat[k], rows[k], bound, k, count))
        total = watch("server", partial(parameters_addition, total, vector)) if total else vector
    watch.spent["site"] /= count - lost

    def unmasked() -> Floats:
        shares = create_shares(bytes(32), count // 2 + 1, count)
        left, shapes = total, get_parameters_shape(total)
        for k in range(lost, count):
            combine_shares(shares[: count // 2 + 1])
            left = parameters_subtraction(left, _mask(k, k, shapes))
        for gone in range(lost):
            combine_shares(shares[: count // 2 + 1])
            for k in range(lost, count):
                left = parameters_subtraction(left, _mask(gone, k, shapes))
        scales, numbers = factor_extract(parameters_mod(left, _MODULUS))
        found = dequantize(numbers, bound, _RANGE)[0] - (count - lost - 1) * bound
        return found * (_RANGE / scales)

    result = watch("server", unmasked)
    return result, 8.0 * (len(flat[0]) + 1), watch


def _mask(k: int, j: int, shapes: list[tuple[int, ...]]) -> list[npt.NDArray[Any]]:
    """The mask of two sites; of a site with itself: its private one."""
    return pseudo_rand_gen(np.random.default_rng((min(j, k), max(j, k))).bytes(32), _MODULUS, shapes)


def _masked_by_flower(numbers: Floats, rows: int, bound: float, k: int, count: int) -> list[npt.NDArray[Any]]:
    """The masked vector of site k, and shares of its two secrets."""
    for _ in range(2):
        create_shares(bytes(32), count // 2 + 1, count)
    scale = round(rows / _HEAVIEST * _RANGE)
    vector = factor_combine(scale, quantize([numbers * (scale / _RANGE)], bound, _RANGE))
    shapes = get_parameters_shape(vector)
    vector = parameters_addition(vector, _mask(k, k, shapes))
    for j in range(count):
        if j != k:
            change = parameters_addition if k > j else parameters_subtraction
            vector = change(vector, _mask(k, j, shapes))
    return parameters_mod(vector, _MODULUS)
