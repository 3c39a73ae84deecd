"""The report's sentences about a run: headline, first facts, versions, what secures it."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from common.metrics import SCORES
from common.web.format import duration, score, size, utc
from server.run import records
from server.run.read import Run
from server.run.state import RunState

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


def delta(change: records.Change) -> str:
    """A change in words and an arrow that shows where the number went."""
    if change.before is None or change.after is None:
        return "not comparable"
    if change.verdict == "same":
        return "unchanged"
    arrow = "▲" if change.after > change.before else "▼"
    return f"{arrow}\u00a0{score(abs(round(change.after, 3) - round(change.before, 3)))} {change.verdict}"


def first_facts(run: Run, state: RunState, *, live: bool = False) -> list[tuple[str, str]]:
    """The first facts about a run: pairs (name, value); ``live``: without those that change."""
    model = run.config.get("model", {})
    revision = f" at {model['revision'][:12]}" if model.get("revision") else ""
    costs = records.costs(run.metrics)
    moved = f"{size(sum(c.down for c in costs))} down, {size(sum(c.up for c in costs))} up" if costs else "none"
    federation = str(run.info.get("name", run.config.get("name", "")))
    return [
        *([("Federation", federation)] if federation != run.name else []),
        ("Strategy", run.strategy),
        ("Base model", Path(model["path"]).name if model.get("path") else f"{model.get('hub', '–')}{revision}"),
        ("Started", utc(state.started) if state.started else "–"),
        ("Sites that trained", str(len(costs))),
        *([] if live else [("Rounds", f"{run.done} of {run.planned or '–'}"), ("Duration", _lasted(state))]),
        *([] if live else [("Tensors moved", moved)]),
    ]


def _lasted(state: RunState) -> str:
    """The duration; of a run that was resumed, what was worked and how long it took with the pauses."""
    if len(state.worked) < 2:
        return duration(state.seconds)
    return f"{duration(sum(state.worked))} in {len(state.worked)} parts, {duration(state.seconds)} with the pauses"


def without_paths(text: str) -> str:
    """A text with absolute paths cut down to their last part: a page is handed on, folders are nobody's business."""
    return re.sub(r"(?<![\w/.:])/(?:[^\s/:,;'\"]+/)+([^\s/:,;'\"]*)", r"…/\1", text)


def settings(run: Run) -> str:
    """The federation file, of paths the last part."""
    return yaml.safe_dump(_named(run.config), sort_keys=False, allow_unicode=True) if run.config else ""


def _named(value: Any, key: str = "") -> Any:  # noqa: ANN401 - any YAML value
    if isinstance(value, dict):
        return {name: _named(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_named(item, key) for item in value]
    return Path(value).name if key in ("path", "sites") and isinstance(value, str) else value


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


def delivered(run: Run) -> list[tuple[str, str, str]]:
    """The sites that keep the model: triples (site, in words, tone)."""
    found: dict[str, tuple[str, str]] = {}
    for event in run.events:
        if event["event"] == "model_delivered":
            same = "the same files as the server's" if event["same"] else "files that differ from the server's"
            found[event["client"]] = f"of round {event['round']}, {same}", "good" if event["same"] else "bad"
        elif event["event"] == "model_missing":
            found[event["client"]] = f"not yet: {without_paths(event['reason'])}", "bad"
    return [(site, *found[site]) for site in records.order(found)]


def security(run: Run) -> list[tuple[str, str, str]]:
    """Everything that secures the run: triples (name, in words, a digest or fingerprint)."""
    names = {"base_digest": "Base model", "tokenizer_digest": "Tokenizer", "federation_digest": "Federation file"}
    models = [(title, "SHA-256", str(run.info[key])) for key, title in names.items() if key in run.info]
    if not run.security:
        return [("Code and link", "not recorded for this run", ""), ("Updates", _updates(run), ""), *models]
    last = run.security[-1]
    earlier = sum(entry["bundle"] != last["bundle"] for entry in run.security)
    changed = f"SHA-256; the run began with other code ({earlier} times changed)" if earlier else "SHA-256"
    signers = [("Signed by", f"key, signed {entry['made'][:10]}", entry["key"]) for entry in run.signatures]
    return [
        ("Code sent to the sites", changed, last["bundle"]),
        *(signers or [("Signed by", "nobody; a site with `trust` runs only what it lists or what is signed", "")]),
        ("Settings the sites agreed to", "SHA-256, as `fedspan site agree` shows it", last["settings"]),
        *_link(last["link"]),
        ("Updates", _updates(run), ""),
        *models,
    ]


def _updates(run: Run) -> str:
    if not (secure := run.config.get("secure_aggregation")):
        return "the server saw each site's own"
    return f"masked: the server saw sums of at least {secure['threshold']} sites' updates, and no single one"


def _link(link: dict[str, Any]) -> list[tuple[str, str, str]]:
    if "named" in link:
        return [("Link to the sites", f"by the SuperLink {link['named']}, which was not started here", "")]
    if link["local"]:
        return [("Link to the sites", "sockets on one machine, shut to its other accounts", "")]
    who = "only registered keys" if link["registered"] else "any site; there was no register"
    tls = link["tls"]
    if tls is None:
        return [("Link to the sites", "WITHOUT TLS", ""), ("Who may connect", who, "")]
    return [
        (
            "Link to the sites",
            f"TLS, certificate for {', '.join(tls['names'])} until {tls['until']}",
            tls["certificate"],
        ),
        ("Certificate authority", "SHA-256", tls["ca"]),
        ("Who may connect", who, ""),
    ]


def keys(run: Run) -> list[tuple[str, str]]:
    """The registered keys: pairs (site, fingerprint)."""
    found = {(str(node["site"]), str(node["key"])) for node in run.owners.values()}
    return sorted(found, key=lambda pair: (records.natural(pair[0]), pair[1]))


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
