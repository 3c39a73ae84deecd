"""The report's sentences about a run: headline, first facts, versions."""

import math
from pathlib import Path

from common.metrics import SCORES
from common.text import clock
from server.report.format import score, size, utc
from server.report.read import Run
from server.run import records

_WORDS = {"better": "better", "worse": "worse", "same": "unchanged", "unknown": "not comparable"}


def headline(run: Run, results: list[records.Result]) -> list[str]:
    """The result in one to three sentences, as plain when it is bad as when it is good."""
    judged = [line for line in results if line.version]
    if not judged:
        return ["No trained model was evaluated, so there is no result to compare."]
    sentences = []
    for line in judged:
        if line.who == records.SERVER:
            parts = [
                f"{how.in_text} went from {score(change.before)} to {score(change.after)} ({_WORDS[change.verdict]})"
                for how in SCORES.values()
                if how.headline and (change := line.changes.get(how.name)) is not None
            ]
            after = f"After {line.version} round{'s' if line.version > 1 else ''} of {run.strategy}"
            sentences.append(f"{after}, on the server's own set, {' and '.join(parts)}.")
    sites = [line for line in judged if line.who != records.SERVER and "loss" in line.changes]
    if sites:
        count = {v: [s.who for s in sites if s.changes["loss"].verdict == v] for v in ("better", "worse", "same")}
        worse = f", worse at {len(count['worse'])} ({', '.join(count['worse'][:5])})" if count["worse"] else ""
        same = f", unchanged at {len(count['same'])}" if count["same"] else ""
        sentences.append(
            f"At the sites, held-out loss is better at {len(count['better'])} of {len(sites)}{worse}{same}."
        )
    return sentences


def first_facts(run: Run) -> list[tuple[str, str]]:
    """The first facts about a run: pairs (name, value)."""
    model = run.config.get("model", {})
    revision = f" at {model['revision'][:12]}" if model.get("revision") else ""
    lasted = run.info.get("seconds") or run.newest - run.info["started"]
    costs = records.costs(run.metrics)
    moved = f"{size(sum(c.down for c in costs))} down, {size(sum(c.up for c in costs))} up" if costs else "none"
    return [
        ("Status", str(run.info["status"])),
        ("Strategy", run.strategy),
        ("Base model", Path(model["path"]).name if model.get("path") else f"{model.get('hub', '–')}{revision}"),
        ("Rounds", f"{run.done} of {run.planned}"),
        ("Sites that trained", str(len(costs))),
        ("Started", utc(run.info["started"])),
        ("Duration", clock(lasted)),
        ("Tensors moved", moved),
    ]


def sent(run: Run) -> str:
    """The share of the model that is sent, in words."""
    started = run.event("started")
    if not started.get("model_parameters"):
        return ""
    tensors, trained, all_ = (started[k] for k in ("trained_tensors", "trained_parameters", "model_parameters"))
    return (
        f"Only what is trained travels: {tensors} tensors, {trained:,} of the model's {all_:,} parameters "
        f"({trained / all_:.1%})."
    )


def versions(run: Run) -> list[tuple[str, str]]:
    """The server's software and machine."""
    machine = run.info.get("machine", {})
    lines = [(key, str(value)) for key, value in run.info.get("versions", {}).items()]
    cores, memory = machine.get("cores"), machine.get("memory_gib")
    lines += [("machine", f"{machine['cpu']}, {cores} cores, {memory} GiB")] if "cpu" in machine else []
    lines += [("system", str(machine["system"]))] if "system" in machine else []
    lines += [("GPU", ", ".join(machine["gpus"]) or "none")] if "gpus" in machine else []
    return lines


def digests(run: Run) -> list[tuple[str, str]]:
    """SHA-256 digests: pairs (name of the hashed thing, digest)."""
    keys = {"base_digest": "base model", "tokenizer_digest": "tokenizer", "federation_digest": "federation file"}
    return [(title, str(run.info[key])) for key, title in keys.items() if key in run.info]


def noise(run: Run) -> str | None:
    """How much of the newest mean is noise, where every site that trained for it adds noise; else None."""
    rounds = [record["round"] for record in run.metrics if record["phase"] == "aggregate"]
    told = next((d for d in records.diagnostics(run.metrics) if d.name == "client-norm"), None)
    if not rounds or told is None:
        return None
    newest = max(rounds)
    privacy = {event["client"]: event.get("privacy") for event in run.events if event["event"] == "client_joined"}
    trained = [r["client"] for r in run.metrics if r["phase"] == "train" and r["round"] == newest]
    declared = [privacy.get(client) for client in trained]
    if not declared or not all(declared):
        return None
    norm = math.hypot(*(values.get(newest) or 0.0 for values in told.groups.values()))
    clip = max(section["clip"] for section in declared if section)
    mean = math.sqrt(max(norm**2 - clip**2, 0.0) / len(trained))
    return (
        f"Signal against noise: in round {newest} an update had an L2 norm of {norm:.3g} on average, of which training "
        f"made at most {clip:.3g} (`clip`). The mean of {len(trained)} updates has noise of about {mean:.3g} against a "
        f"signal of at most {clip:.3g}."
    )
