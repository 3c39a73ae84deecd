"""A client that knows only Flower and PEFT federates under every strategy, exactly.

Client and server write down what they received, returned and made of it; the expected state is computed here in
float64.
"""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from deploy.sandbox.flower import Flower

pytestmark = pytest.mark.long
APP = Path(__file__).parent / "plain_app"
WEIGHTS = (10, 17)  # the clients' num-examples
Arrays = dict[str, np.ndarray]
ROUNDS = 2  # of FlexLoRA
RANKS, ALPHAS = (8, 4), (16.0, 12.0)  # under FlexLoRA; under the others all have 8 and 16


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What clients and server wrote down, in a folder for each strategy."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "out").mkdir()
    with Flower(folder) as flower:
        for i, (rank, alpha) in enumerate(zip(RANKS, ALPHAS, strict=True)):
            flower.start_node(f"node-{i}", f"partition-id={i} rank={rank} alpha={alpha}")
        flower.submit(APP, {"out": str(folder / "out")})
        flower.wait(480)
    return folder / "out"


def read(out: Path, number: int, what: str) -> Arrays:
    return {k: v.astype(np.float64) for k, v in load_file(out / f"round-{number}-{what}.safetensors").items()}


def mean(replies: list[Arrays], name: str) -> np.ndarray:
    return sum(w * r[name] for w, r in zip(WEIGHTS, replies, strict=True)) / sum(WEIGHTS)  # type: ignore[no-any-return]


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-6) -> bool:
    return bool(np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1e-12))


@pytest.mark.parametrize(
    ("strategy", "active"),
    [
        ("fedftg", [("up_proj",)]),
        ("fedit", [("lora_A", "lora_B")]),
        ("ffa-lora", [("lora_B",)]),
        ("rolora", [("lora_B",), ("lora_A",)]),
    ],
)
def test_plain_client_federates(out: Path, strategy: str, active: list[tuple[str, ...]]) -> None:
    out = out / strategy
    for number in range(1, len(active) + 1):
        before, after = read(out, number - 1, "state"), read(out, number, "state")
        replies = [read(out, number, f"site-{i}-trained") for i in (0, 1)]
        for name in before:
            if any(factor in name for factor in active[number - 1]):
                assert close(after[name], mean(replies, name))
            else:
                assert np.array_equal(after[name], before[name])
        moved = [name for name in before if not np.array_equal(before[name], after[name])]
        assert moved or number == 1


def pairs(state: Arrays) -> list[tuple[str, str]]:
    return [(name, name.replace("lora_A", "lora_B")) for name in state if "lora_A" in name]


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]  # type: ignore[no-any-return]


def test_plain_clients_of_different_rank_and_alpha_federate_under_flexlora(out: Path) -> None:
    out = out / "flexlora"
    scales = [alpha / rank for alpha, rank in zip(ALPHAS, RANKS, strict=True)]
    for number in range(1, ROUNDS + 1):
        after = read(out, number, "state")
        replies = [read(out, number, f"site-{i}-trained") for i in (0, 1)]
        for a, b in pairs(after):
            exact = sum(w / sum(WEIGHTS) * s * r[b] @ r[a] for w, s, r in zip(WEIGHTS, scales, replies, strict=True))
            assert np.linalg.norm(exact) > 0
            assert close(2.0 * after[b] @ after[a], truncated(exact, 8), 1e-5)
            if number < ROUNDS:
                received = [read(out, number + 1, f"site-{i}-received") for i in (0, 1)]
                for got, rank, scale in zip(received, RANKS, scales, strict=True):
                    assert got[a].shape[0] == got[b].shape[1] == rank
                    assert close(scale * got[b] @ got[a], truncated(exact, rank), 1e-5)
