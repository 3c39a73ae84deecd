"""The cost of a round beside training: N light sites on a real supervised server, on one machine.

    python -m benchmarks scale                                       # all of the table
    python -m benchmarks.scale.run --sites 64 --tls --rounds 3       # one row of it, printed

The server is ``fedspan serve``, a process of its own with its SuperLink and ServerApp; all sites are threads of this
process, so that what they cost is told apart. The weights are the demo's: thirty matrices of 576 x 1536, at rank 16.
"""

import argparse
import json
import resource
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import strategies as rules
from benchmarks.scale.sites import Answers, LightSites, SitesApart
from benchmarks.scale.watch import Watch, database_bytes
from benchmarks.table import RESULTS, Cell, Table, publish
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.system.processes import ProcessGroup, free_ports, listens
from deploy.keys.certs import make_ca, make_server
from deploy.sandbox.flower import ROOT, wait_for
from deploy.sandbox.tiny import make_tokenizer
from server.loop.server_model import ServerModel
from server.run.folder import read_lines, read_run

SITES, LONGEST = (4, 16, 64, 256), 4 * 3600.0
FTG: dict[str, Any] = {"name": "fedftg", "modules": "mlp", "blocks": "all", "rank": 16, "scale": 0.25}
LORA: dict[str, Any] = {"rank": 16, "lora_alpha": 16.0}
STRATEGIES: dict[str, dict[str, Any]] = {
    "fedftg": {**FTG, "subspace": "shared"},
    "fedftg-64": {**FTG, "subspace": "shared", "rank": 64},  # the same messages, four times as large
    "fedftg-own": {**FTG, "subspace": "own"},
    "fedftg-down": {**FTG, "subspace": "own", "downlink_rank": "auto"},
    **{name: {"name": name, **LORA} for name in rules.STRATEGIES if name != "fedftg"},
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model; its heads have 64 numbers."""

    hidden: int
    intermediate: int
    blocks: int


DEMO, SMALL = Sizes(576, 1536, 10), Sizes(192, 512, 4)


@dataclass(frozen=True)
class Done:
    """A run that has ended well.

    Attributes:
        events: the run's.
        watch: the use of the server's processes.
        sites_cpu: CPU seconds of this process, which holds the sites.
        database: bytes of the SuperLink's database at the end.
        errors: failures of the sites' calls, after which they tried again.
    """

    events: list[dict[str, Any]]
    watch: Watch
    sites_cpu: float
    database: int
    errors: list[str]


def run() -> Table:
    """Every number of sites without TLS, 16 and 64 with it, and 16 under every strategy."""
    cases = [(n, "fedftg", False) for n in SITES] + [(n, "fedftg", True) for n in (16, 64)]
    cases += [(16, strategy, False) for strategy in STRATEGIES if strategy != "fedftg"]
    return table([measure(n, strategy, tls=tls) for n, strategy, tls in cases])


def table(rows: list[dict[str, Cell]]) -> Table:
    """The rows with their explanation."""
    return Table(
        "A round beside training: light sites on one machine with their supervised server",
        rows,
        [
            "s: introductions from the loaded model to round 1; a round, the mean of all; s a site: of the round.",
            "CPU s of SuperLink and ServerApp: of the whole run, start included; of the sites: of all together.",
            "MB: peak resident memory; the database at the run's end; up and down of one round, all sites.",
        ],
    )


def measure(
    count: int, strategy: str = "fedftg", *, tls: bool = False, rounds: int = 3, apart: bool = False
) -> dict[str, Cell]:
    """One run with so many sites, threads of this process or (``apart``) processes.

    Raises:
        RuntimeError: the run did not end well.
    """
    done = federate(count, strategy, tls=tls, rounds=rounds, apart=apart)
    row: dict[str, Cell] = {"strategy": strategy, "sites": count, "TLS": "yes" if tls else "no"}
    row |= _seconds(done.events, count)
    row |= {f"{name} CPU s": one.cpu for name, one in done.watch.used.items()} | {"sites' CPU s": done.sites_cpu}
    row |= {f"{name} MB": one.peak / 1e6 for name, one in done.watch.used.items()}
    return row | {"database MB": done.database / 1e6, "errors": len(done.errors)}


def federate(
    count: int,
    strategy: str = "fedftg",
    *,
    tls: bool = False,
    rounds: int = 3,
    apart: bool = False,
    sizes: Sizes = DEMO,
) -> Done:
    """See ``measure``."""
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        file = light_federation(folder, count, STRATEGIES[strategy], rounds, sizes)
        federation = resolved(load(file, FederationConfig), file)
        model = ServerModel(federation, file)
        answers = Answers(federation, model.initial_state(), model.base_digest, model.tokenizer_digest)
        del model
        (port,) = free_ports(1)
        link, root = _link(folder, tls=tls)
        command = [sys.executable, "-m", "deploy", "serve", str(file), "--runs", str(folder / "runs"), "--name", "run"]
        command += ["--fleet-api-address", f"127.0.0.1:{port}", *link]
        env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        before, done = _own_cpu(), folder / "runs" / "run"
        with ProcessGroup(folder / "logs") as group:
            server = group.start("server", command, env)
            with Watch(server.process.pid, done / "flwr") as watch:
                wait_for(lambda: listens(port) or server.process.poll() is not None, LONGEST)
                with (SitesApart if apart else LightSites)(count, f"127.0.0.1:{port}", root, answers) as sites:
                    server.process.wait(LONGEST)
        if read_run(done).get("status") != "completed":
            log = (folder / "logs" / "server.log").read_text()[-3000:]
            raise RuntimeError(f"{count} sites: {read_run(done).get('reason')}; {log}; {sites.errors[:3]}")
        events, cpu = read_lines(done / "events.jsonl"), _own_cpu() - before
        return Done(events, watch, cpu, database_bytes(done / "flwr"), sites.errors)


def _seconds(events: list[dict[str, Any]], count: int) -> dict[str, Cell]:
    """Introductions and rounds, from the run's events."""
    began = next(one["time"] for one in events if one["event"] == "started")
    first = next(one["time"] for one in events if one["event"] == "round_started")
    rounds = [one for one in events if one["event"] == "round_finished"]
    each = sum(one["seconds"] for one in rounds) / len(rounds)
    told: dict[str, Cell] = {"introductions s": first - began, "round s": each, "s a site": each / count}
    return told | {"up MB": rounds[-1]["bytes_up"] / 1e6, "down MB": rounds[-1]["bytes_down"] / 1e6}


def light_federation(folder: Path, count: int, strategy: dict[str, Any], rounds: int, sizes: Sizes = DEMO) -> Path:
    """A model, by default with the demo's trained shapes in ten blocks, and the federation's file."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=sizes.hidden // 64,
        num_key_value_heads=sizes.hidden // 192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    content: dict[str, Any] = {
        "name": "scale",
        "model": {"path": "model"},
        "strategy": strategy,
        "rounds": rounds,
        "cohort": {"min_clients": count, "join_deadline": LONGEST, "round_deadline": LONGEST},
        "training": {"learning_rate": 0.01, "local_steps": 3, "batch_size": 4, "max_length": 64},
        "evaluation": {"every": rounds, "generate": 0, "samples": 0},
    }
    file = folder / "federation.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def _link(folder: Path, *, tls: bool) -> tuple[list[str], bytes | None]:
    """Options of the server, and the authority's certificate."""
    if not tls:
        return ["--insecure"], None
    make_ca(folder / "pki", 30)
    make_server(folder / "pki", ["127.0.0.1"], 30)
    files = {"ca-certfile": "ca.crt", "certfile": "server.pem", "keyfile": "server.key"}
    options = [word for key, name in files.items() for word in (f"--ssl-{key}", str(folder / "pki" / name))]
    return options, (folder / "pki" / "ca.crt").read_bytes()


def _own_cpu() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime


def _kept() -> list[dict[str, Cell]]:
    """The rows of earlier calls, which a new one is put among."""
    file = RESULTS / "scale.json"
    rows: list[dict[str, Cell]] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    return rows


def _case(row: dict[str, Cell]) -> tuple[str, bool, int]:
    return str(row["strategy"]), row["TLS"] == "yes", int(str(row["sites"]))


def main() -> None:
    """Command line: one row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.run", description=__doc__)
    parser.add_argument("--sites", type=int, default=16)
    parser.add_argument("--strategy", choices=STRATEGIES, default="fedftg")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    row = measure(options.sites, options.strategy, tls=options.tls, rounds=options.rounds)
    rows = {_case(old): old for old in _kept()} | {_case(row): row}
    publish("scale", table([rows[case] for case in sorted(rows)]))


if __name__ == "__main__":
    main()
