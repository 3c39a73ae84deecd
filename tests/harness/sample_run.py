"""A run folder with made-up numbers of three sites and four rounds, written through RunFolder's own API."""

import math
from pathlib import Path

from common.config.federation import FederationConfig, resolved
from common.config.load import parse
from server.loop.recorder import record_evaluation
from server.run.folder import RunFolder

SITES = {"site-a": (2210, 245, 11.0), "site-b": (1480, 164, 7.5), "site-c": (655, 72, 3.5)}  # rows, held out, seconds
ROUNDS = 4
START = {"server": 3.91, "site-a": 3.62, "site-b": 3.88, "site-c": 4.15}
SAMPLES = [
    {
        "prompt": "Term: Pneumonia due to E. coli",
        "expected": "Pneumonia due to Escherichia coli",
        "before": "Pneumonia is an infection of the lungs that can be caused by bacteria, viruses or fungi. E. coli is",
        "after": "Pneumonia due to Escherichia coli",
    },
    {
        "prompt": "Term: Acute appendicitis NOS",
        "expected": "Unspecified acute appendicitis",
        "before": "Acute appendicitis is a medical emergency.\n\n1. Pain\n2. Fever",
        "after": "Acute appendicitis, unspecified",
    },
    {"prompt": "Term: Hangover", "expected": "Alcohol abuse with intoxication", "before": "", "after": "Headache"},
]


def federation(**changes: object) -> FederationConfig:
    data: dict[str, object] = {
        "name": "sample",
        "model": {"path": "models/SmolLM2-135M-Instruct"},
        "strategy": {"name": "fedftg", "blocks": "lower third", "rank": 16},
        "rounds": ROUNDS,
        "cohort": {"min_clients": 2},
        "training": {"learning_rate": 1.0e-3, "local_steps": 12},
        "evaluation": {"server": {"path": "data/server.jsonl", "prompt": "Term: {term}", "answer": "title"}},
        "local": {"sites": [f"{site}.yaml" for site in SITES]},
    }
    return parse({**data, **changes}, FederationConfig, "sample")


def scores(who: str, version: int) -> dict[str, float]:
    """Better with every round, except at site-c, where the loss rises after round 2."""
    loss = START[who] - 1.3 * (1 - 0.5**version) + (0.75 * max(0, version - 2) if who == "site-c" else 0.0)
    rouge = 0.08 + 0.07 * version - (0.04 * version if who == "site-c" else 0.0)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "tokens": 800.0,
        "examples": 64.0,
        "generated": 16.0,
        "rouge_l": rouge,
        "bleu_4": rouge / 3,
        "exact_match": 0.0625 * (version // 2),
    }


def begin(path: Path, **changes: object) -> RunFolder:
    folder = RunFolder.create(path, resolved(federation(**changes), path.parent / "federation.yaml"))
    shapes = {f"model.layers.{i}.mlp.{m}_proj.weight": [1536, 576] for i in range(10) for m in ("gate", "up", "down")}
    folder.model_info({"base_digest": "8e79005e" * 8, "tokenizer_digest": "1586ad1f" * 8, "trained": shapes})
    folder.event(
        "started",
        rounds=ROUNDS,
        strategy="fedftg",
        trained_tensors=30,
        trained_parameters=26_542_080,
        model_parameters=134_515_008,
    )
    folder.event("waiting", connected=0, needed=2, deadline=300)
    for site, (rows, held_out, _) in SITES.items():
        folder.event(
            "client_joined",
            client=site,
            num_examples=rows,
            held_out=held_out,
            device="cpu",
            version="0.1.0",
            privacy=None,
        )
    return folder


def evaluate(folder: RunFolder, who: str, version: int) -> None:
    record_evaluation(folder, version, who, scores(who, version), 6.25 if who == "server" else None)


def train(folder: RunFolder, number: int, site: str) -> None:
    slow = SITES[site][2]
    seconds = {"download": 2.5, "load": 6.0 if number == 1 else 0.0, "train": 4 * slow, "evaluate": 2 * slow}
    seconds |= {"upload": 3.0, "wait": 6 * (11.0 - slow) + 0.5}
    loss = 3.4 - 0.3 * number
    trained = {"loss": loss, "loss_first": loss + 0.2, "loss_last": loss - 0.2, "steps": 12.0, "num_examples": 96}
    trained |= {"tokens": 4800.0, "tokens_per_second": 1200 / slow, "learning_rate": 1e-3, "peak_memory_bytes": 0.0}
    moved = {"down": 106_200_000, "up": 106_200_000}
    folder.metrics(
        {"round": number, "client": site, "phase": "train", "train": trained, "bytes": moved, "seconds": seconds}
    )
    folder.event("reply", round=number, client=site, loss=loss, seconds=sum(seconds.values()))


def play_round(folder: RunFolder, number: int) -> None:
    """Site-c fails in round 3."""
    folder.event("round_started", round=number, clients=list(SITES), deadline=600.0)
    evaluate(folder, "server", number - 1)
    for site in SITES:
        if number == 3 and site == "site-c":
            reason = "site-c: CUDA out of memory in round 3, step 4; lower training.batch_size or set max_batch_size"
            folder.event("client_failed", round=number, client=site, reason=reason, kind="TrainingError", counted=True)
        else:
            train(folder, number, site)
            evaluate(folder, site, number - 1)
    drift = {f"client-cosine/model.layers.{i}": 0.6 - 0.04 * i - 0.05 * number for i in range(11)}
    drift |= {f"client-norm/model.layers.{i}": 1.5 + 0.1 * i - 0.2 * number for i in range(11)}
    folder.metrics(
        {"round": number, "client": "server", "phase": "aggregate", "diagnostics": drift, "seconds": {"aggregate": 2.5}}
    )
    moved = 106_200_000 * (2 if number == 3 else 3)
    folder.event("round_finished", round=number, seconds=80.0, bytes_down=106_200_000 * 3, bytes_up=moved)


def completed(path: Path, **changes: object) -> Path:
    folder = begin(path, **changes)
    for number in range(1, ROUNDS + 1):
        play_round(folder, number)
    for who in START:
        evaluate(folder, who, ROUNDS)
    folder.samples(SAMPLES)
    folder.finish()
    return path
