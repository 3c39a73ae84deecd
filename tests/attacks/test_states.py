"""A server that sends what no training can have made: a site refuses it before anything is written into its model."""

import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, RecordDict

from client.received import receive
from client.session import Session
from common.errors import WireError
from common.model.adapters import LORA_A, LORA_B
from common.protocol import wire
from common.protocol.factors import Factors, pack
from common.protocol.messages import TrainRequest
from common.protocol.tensors import Tensors
from common.protocol.versions import Step
from tests.client.test_session import session
from tests.harness.processes import ROOT, environment

LORA = {"rank": 2, "blocks": "lower half", "modules": "mlp"}
STEPS = {"training": {"local_steps": 10, "learning_rate": 1e-3}, "rounds": 3}


class Ledger:
    """Takes note of nothing."""

    def receive(self, tensors: Tensors) -> None:
        del tensors


class Site:
    """A site in one process, and what it is asked."""

    def __init__(self, folder: Path, strategy: dict[str, Any], **changes: Any) -> None:
        self.own: Session = session(folder, strategy=strategy, **{**STEPS, **changes})
        self._context = Context(1, 1, {}, RecordDict(), {})

    def asked(self, number: int, arrays: ArrayRecord, **state: Any) -> None:
        """A round's work comes in, up to where training would begin."""
        active, gate = list(self.own.exchanged), Ledger()
        request = TrainRequest(
            federation="{}", signatures=None, evaluate=False, server_round=number, active=active, arrays=arrays, **state
        )
        receive(request, active, self.own, gate, self._context)  # type: ignore[arg-type]

    def takes(self, number: int, tensors: Tensors) -> None:
        self.asked(number, wire.encode(tensors, bundled=True))

    def refuses(self, reason: str, number: int, arrays: ArrayRecord, **state: Any) -> None:
        before = self.own._tuned.get()
        with pytest.raises(WireError, match=reason):
            self.asked(number, arrays, **state)
        assert all(torch.equal(tensor, before[name]) for name, tensor in self.own._tuned.get().items())


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """One that has taken the first state."""
    made = Site(tmp_path, {"name": "fedit", **LORA})
    made.takes(1, made.own._tuned.get())
    return made


def only(end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    """The first tensor with this end is changed."""

    def changed(state: Tensors) -> Tensors:
        name = next(name for name in state if name.endswith(end))
        return {**state, name: change(state[name])}

    return changed


def one_input(a: torch.Tensor) -> torch.Tensor:
    """A (rank, in) that overflows only for rows with a certain feature."""
    crafted = a.clone()
    crafted[0, 3] = 3e4
    return crafted


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    crafted = tensor.clone()
    crafted[0, 0] = torch.nan
    return crafted


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (only(LORA_A, lambda a: 1e4 * a), r"lora_A.weight: an entry moved by \d+; allowed: up to 0.02"),
        (only(LORA_A, one_input), r"lora_A.weight: an entry moved by 3e\+04; allowed: up to 0.02"),
        (only(LORA_B, lambda b: b + 0.03), r"lora_B.weight: an entry moved by 0.03; allowed: up to 0.02"),
        (only(LORA_A, with_nan), "lora_A.weight: 1 numbers are not finite"),
        (only(LORA_A, lambda a: a.half()), "lora_A.weight: torch.float16 of shape .* received, torch.float32 of"),
        (only(LORA_A, lambda a: a.T.contiguous()), r"lora_A.weight: torch.float32 of shape \(32, 2\) received"),
        (only(LORA_A, lambda a: a.double()), "lora_A.weight: 512 bytes came; allowed: up to 256"),
        (lambda state: {**state, "more": torch.zeros(1)}, "'more' was not to come"),
    ],
    ids=["blown up", "one input", "a little", "nan", "float16", "turned", "float64", "one more"],
)
def test_state_that_training_cannot_have_made_is_refused_with_both_numbers(
    site: Site, tamper: Callable[[Tensors], Tensors], reason: str
) -> None:
    state = site.own._tuned.get()
    site.refuses(reason, 2, wire.encode(tamper(state), bundled=True))
    moved = {name: tensor + 0.019 for name, tensor in state.items()}  # as far as ten steps of Adam go, nearly
    site.takes(2, moved)
    site.refuses(
        "an entry moved by .*; allowed: up to 0.02", 3, wire.encode(state | {n: t - 0.01 for n, t in state.items()})
    )


def test_sites_that_were_away_take_what_more_rounds_can_do(site: Site) -> None:
    site.takes(3, {name: tensor + 0.035 for name, tensor in site.own._tuned.get().items()})


def test_first_state_is_the_one_that_the_site_makes_itself(tmp_path: Path) -> None:
    made = Site(tmp_path, {"name": "fedit", **LORA})
    state = made.own._tuned.get()
    made.refuses(
        r"an entry moved by 1e-06; allowed: up to \d.*e-07", 1, wire.encode({n: t + 1e-6 for n, t in state.items()})
    )
    made.takes(1, state)


def test_first_state_of_another_processor_is_taken(tmp_path: Path) -> None:
    """PyTorch draws A with other last bits where it has no vector instructions."""
    made = Site(tmp_path, {"name": "fedit", **LORA})
    code = (
        "import sys; from pathlib import Path; import torch; from tests.attacks.test_states import LORA, Site\n"
        "site = Site(Path(sys.argv[1]), {'name': 'fedit', **LORA})\n"
        "torch.save({name: tensor.detach() for name, tensor in site.own._tuned.get().items()}, sys.argv[2])"
    )
    file = tmp_path / "state.pt"
    env = {**environment(), "ATEN_CPU_CAPABILITY": "default"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(file)], cwd=ROOT, env=env, check=True, timeout=300)
    state = torch.load(file)
    made.takes(1, state)
    factors = {name: tensor * (1 + 1e-5) for name, tensor in state.items()}
    Site(tmp_path, {"name": "fedit", **LORA}).refuses("an entry moved by", 1, wire.encode(factors))


def test_rounds_are_those_of_the_federation(site: Site) -> None:
    state = wire.encode(site.own._tuned.get())
    site.refuses("this is a message of round 4; allowed: up to 3", 4, state)
    site.refuses("this is a message of round 0; allowed: up to 3", 0, state)


def test_steps_come_only_where_base_weights_change(site: Site) -> None:
    steps = {1: wire.encode({"x": torch.zeros(1)})}
    state = wire.encode(site.own._tuned.get())
    site.refuses("steps came of rounds 1; allowed: none", 2, state, steps=steps, since="a", version="b")


def test_huge_shapes_and_headers_are_refused_before_they_are_made(site: Site) -> None:
    state = site.own._tuned.get()
    name = next(iter(state))
    huge = Array("float32", (2**40,), "numpy.ndarray", wire.encode(state)[name].data)
    rest = {key: array for key, array in wire.encode(state).items() if key != name}
    site.refuses(
        f"{re.escape(name)}: declared as float32 .1099511627776,., holds something else",
        2,
        ArrayRecord({**rest, name: huge}),
    )
    entries = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(400_000))
    raw = len(entries).to_bytes(8, "little") + f"{{{entries}}}".encode()
    bundle = ArrayRecord({wire.BUNDLE: Array("uint8", (len(raw),), wire.BUNDLE, raw)})
    tracemalloc.start()
    try:
        site.refuses("23088899 bytes of tensors came; allowed: up to", 2, bundle)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_flexloras_a_is_no_longer_than_its_rows_are_even_where_the_product_is_honest(tmp_path: Path) -> None:
    made = Site(tmp_path, {"name": "flexlora", **LORA})
    state = made.own._tuned.get()
    made.takes(1, state)
    blown = {n: 1e4 * t if n.endswith(LORA_A) else t for n, t in state.items()}  # B is zero, so is the product
    made.refuses(r"lora_A.weight: its longest row has norm \d+; allowed: up to 1.001", 2, wire.encode(blown))
    grown = {n: t + 10.0 if n.endswith(LORA_B) else t for n, t in state.items()}
    made.refuses(r"lora_B.weight: its norm is \d+.*; allowed: up to ", 2, wire.encode(grown))


@pytest.mark.parametrize("strategy", ["fedftg", "flora"])
def test_step_that_goes_further_than_a_round_is_refused(tmp_path: Path, strategy: str) -> None:
    made = Site(tmp_path, {"name": strategy, **LORA})
    weights = made.own.weights
    assert weights is not None
    name = next(name for name in weights.tensors if ".lora_" not in name)
    rows, columns = weights.tensors[name].shape

    def sent(size: float, number: int = 1) -> dict[str, Any]:
        change = Factors(1.0, [(torch.ones(rows, 1), torch.full((1, columns), size))])
        step = Step(number, pack(name, change, weights.tensors[name], made.own.model.exchange(1)))
        steps = {number: wire.encode(step.tensors, bundled=True)}
        return {"steps": steps, "since": weights.first, "version": step.next(weights.first)}

    made.refuses(f"{re.escape(name)}: it moved by a norm of .*; allowed: up to", 2, ArrayRecord(), **sent(1e4))
    made.refuses("a step of round 4; allowed: 1 to 3", 2, ArrayRecord(), **sent(1e-5, 4))
    made.refuses("1 arrays came; allowed: up to 0", 2, wire.encode({name: torch.zeros(1)}), **sent(1e-5))
    more = sent(1e-5)
    more["steps"][1] = wire.encode({**wire.decode(more["steps"][1]), "more": torch.zeros(1)}, bundled=True)
    made.refuses("'more' was not to come", 2, ArrayRecord(), **more)
    made.asked(2, ArrayRecord(), **sent(1e-5))
    assert weights.after == 1
    whole = {n: t + 50.0 if n == name else t for n, t in made.own.exchanged.items()}  # instead of steps
    made.refuses(f"{re.escape(name)}: it moved by a norm of", 3, wire.encode(whole), version="v")
