"""Peak memory of the ServerApp with 2, 8 and 16 clients of 100 MB each: FedFTG against Flower's FedAvg."""

import json
import tempfile
from pathlib import Path

from benchmarks.table import Cell, Table
from deploy.sandbox.flower import Flower
from server.superlink.process import MALLOC

APP = Path(__file__).parent / "memory_app"
CLIENTS = (2, 8, 16)  # every SuperNode and its client are processes of their own: 32 were too many for two cores


def run() -> Table:
    """One round for each number of clients and each strategy."""
    found = {(name, n): measure(name, n) for n in CLIENTS for name in ("FedFTG", "FedAvg")}
    rows: list[dict[str, Cell]] = []
    for n in CLIENTS:
        ours, peer = found["FedFTG", n], found["FedAvg", n]
        row: dict[str, Cell] = {"clients": n, "FedFTG MB": ours["peak"] / 1e6, "FedAvg MB": peer["peak"] / 1e6}
        row |= {"FedAvg / FedFTG": peer["peak"] / ours["peak"]}
        row |= {"FedFTG / with 2 clients": ours["peak"] / found["FedFTG", 2]["peak"]}
        row |= {"FedAvg / with 2 clients": peer["peak"] / found["FedAvg", 2]["peak"]}
        rows.append(row)
    return Table(
        "Peak memory of the ServerApp in a round with dense updates of 105 MB",
        rows,
        [
            "Resident memory; real SuperLink and SuperNodes over gRPC. Both send the weights to all clients.",
            f"Both ServerApps with the environment in which FedSpan starts a SuperLink: {MALLOC}.",
        ],
    )


def measure(strategy: str, clients: int) -> dict[str, float]:
    """One round."""
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        out = Path(temporary) / "out.json"
        with Flower(Path(temporary), env=MALLOC) as flower:
            for site in range(clients):
                flower.start_node(f"site-{site}", f"site={site}")
            flower.submit(APP, {"strategy": strategy, "clients": clients, "out": str(out)})
            flower.wait(3000)
        print(strategy, clients, out.read_text(), flush=True)
        return dict(json.loads(out.read_text(encoding="utf-8")))
