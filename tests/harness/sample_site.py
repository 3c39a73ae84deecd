"""A site's folder with made-up work: agreements, ledger, status; each written through its own code."""

import json
import time
from pathlib import Path
from typing import Any

import yaml

from client.privacy.agreement import make_agreement, write_agreement
from client.privacy.ledger import Ledger
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from deploy.sandbox.tiny import make_federation

SITE = "site-a"
ROUNDS = 14
LEFT = {"tensors": {"model.layers.0.mlp.up_proj.weight/u": ["float32", [9, 2], "ab"]}, "bytes": 4_100_000}
TOLD = ["loss", "num-examples", "seconds", "steps"]


def site_folder(folder: Path, **policy: object) -> Path:
    """A site file with this policy, beside its data and its federation file; returns the site file."""
    make_federation(folder, {SITE: 30}, name="coding")
    file = folder / f"{SITE}.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "policy": policy}))
    return file


def agree(file: Path, name: str = "coding") -> str:
    """Agree to the folder's federation under this name; returns the agreement as the ledger writes it."""
    source = file.parent / "federation.yaml"
    federation = resolved(load(source, FederationConfig), source).model_copy(update={"name": name, "rounds": ROUNDS})
    agreement = make_agreement(federation)
    write_agreement(file.with_name(f"{SITE}-agreements.json"), name, agreement)
    return f"{agreement.digest[:16]} {agreement.agreed}"


def ledger(file: Path, agreement: str, rounds: int, refused: str = "", name: str = "coding") -> None:
    """So many rounds in the site's ledger, and a refusal."""
    book = Ledger(file.with_name(f"{SITE}-ledger.jsonl"))
    about: dict[str, Any] = {"message": "train", "run": "77", "federation": name, "strategy": "fedavg-lora"}
    about |= {"agreement": agreement, "bundle": "ab" * 32}
    with book.opened():
        if not book.lines:
            book.append({"event": "begun", "site": SITE, "format": 2})
        for number in range(1, rounds + 1):
            about["round"] = number
            book.append({"event": "charged", **about, "bytes": LEFT["bytes"], "evaluation": True, "privacy": None})
            sent = {"charged": book.lines, "rows": 27, "in": LEFT, "out": LEFT, "told": TOLD, "update_norm": 1.0}
            book.append({"event": "sent", **about, **sent, "privacy": None, "aside": None})
        if refused:
            book.append({"event": "refused", **about, "reason": refused})


def status(file: Path, *, rounds: int = 0, step: int | None = None, name: str = "coding", **told: Any) -> Path:
    """The status file as `site join` writes it, after so many rounds, perhaps within one; returns it."""
    now = time.time()
    work: dict[str, Any] = {"federation": name, "run": "77", "strategy": "fedavg-lora", "rounds": ROUNDS}
    work |= {"trained": [{"round": n, "loss": 3.4 - 0.1 * n, "seconds": 75.0 + n} for n in range(1, rounds + 1)]}
    work |= {"scored": [{"after": n, "scores": {"loss": 3.6 - 0.08 * n, "examples": 9}} for n in range(rounds + 1)]}
    work |= {"doing": None, "round": None, "since": now - 40, "step": None, "steps": None, "refused": None, "time": now}
    work["devices"] = "2 x NVIDIA L4"
    if step is not None:
        work |= {"doing": "training", "round": rounds + 1, "step": step, "steps": 20}
    worker = {"state": "idle" if step is None else "working", "messages": 2 * rounds, "crashes": 0}
    worker |= {
        "bundle": "ab" * 32,
        "bench": 4711,
        "memory_bytes": 1_900_000_000,
        "device_bytes": 0,
        "last_message": now,
    }
    known: dict[str, Any] = {"time": now, "site": SITE, "device": "auto", "superlink": "fl.example.org:9092"}
    known |= {"link": "up", "link_since": now - 7200, "link_reason": None, "link_deaths": 0, "worker_deaths": 0}
    home = file.parent / f".{SITE}"
    home.mkdir(exist_ok=True)
    (home / "status.json").write_text(json.dumps({**known, "worker": worker, "work": work if name else {}, **told}))
    return home / "status.json"
