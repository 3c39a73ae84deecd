"""Score a finished model on a file: ``fedspan model score FOLDER --data FILE``; the scores of the federation's task."""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from common.config.federation import EvaluationConfig
from common.config.load import parse
from common.config.section import DataConfig
from common.errors import ConfigError
from common.metrics import COUNTS, SCORES
from common.system.command import Command, number
from deploy.model.loading import Loaded, add_folder, load


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="rows with the right answers, in any form that a site's shard may have",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="keys of a site file's section `data`, such as prompt='Term: {term}' answer=title, delimiter=';' or "
        "skip_empty=true (default: prompt, answer and system as the federation's)",
    )
    parser.add_argument("--rows", type=number(int, 1), metavar="N", help="score N rows, always the same (default: all)")
    parser.add_argument(
        "--generate",
        type=number(int, 0),
        metavar="N",
        help="answer N of these rows by generation, which takes most of the time (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(options: argparse.Namespace) -> None:
    loaded = load(options.folder, options.base)
    data = data_config(loaded, options.data, options.columns)
    if options.generate is not None and not loaded.task.generates:
        raise ConfigError("--generate is for models that write; this one tells labels")
    rows, found = scored(loaded, data, options.rows, options.generate)
    if options.json:
        print(json.dumps({"rows": rows, **found}))  # noqa: T201
        return
    width = max(len(score.title) for score in SCORES.values())
    print(f"{rows} rows of {options.data}")  # noqa: T201
    for name, value in found["scores"].items():
        print(f"{SCORES[name].title:{width}}  {value:.4f}")  # noqa: T201


def scored(loaded: Loaded, data: DataConfig, most: int | None, generate: int | None) -> tuple[int, dict[str, Any]]:
    """Score a model.

    Args:
        loaded: the model.
        data: the rows.
        most: rows to score; None: all.
        generate: rows to answer by generation; None: all that are scored.

    Returns:
        The number of rows; the ``scores`` by name; of a language model the number of rows that were ``generated``; of a
        classifier the ``confusion``: for each right label the number of rows by chosen label.

    Raises:
        DataError: the file cannot be used.
    """
    rows = loaded.task.rows(data, Path.cwd() / "-").rows
    count, use = min(most or len(rows), len(rows)), loaded.finished.use
    asked = count if generate is None else min(generate, count)
    evaluation = EvaluationConfig(
        max_examples=count, generate=asked, max_new_tokens=use.max_new_tokens, batch_size=use.batch_size
    )
    metrics = loaded.task.evaluate(loaded.model, loaded.tokenizer, rows, loaded.settings(evaluation, data.system))
    found: dict[str, Any] = {"scores": {name: metrics[name] for name in SCORES if name in metrics}}
    if labels := loaded.task.labels:
        numbers = range(len(labels))
        found["confusion"] = {
            labels[i]: {labels[j]: int(metrics[f"{COUNTS}{i}/{j}"]) for j in numbers} for i in numbers
        }
    else:
        found["generated"] = asked
    return count, found


def data_config(loaded: Loaded, file: Path, given: list[str]) -> DataConfig:
    """The section ``data`` for a file: the federation's columns, with KEY=VALUE pairs in their place.

    Raises:
        ConfigError: a pair names no key, or a value is not allowed.
    """
    pairs: dict[str, object] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--columns {text!r}; allowed: KEY=VALUE, with a key of a site file's section `data`")
        pairs[key] = yaml.safe_load(value) if value in ("true", "false") else value
    use = loaded.finished.use.model_dump(include={"prompt", "answer", "messages", "system"})
    if {"prompt", "answer", "messages"} & pairs.keys():
        use = {"system": use["system"]}
    if "path" in pairs:
        raise ConfigError("--columns path=...; give the file with --data")
    if not use.get("prompt") and not use.get("messages") and not {"prompt", "messages"} & pairs.keys():
        raise ConfigError("this model's folder names no columns; give --columns prompt=... answer=...")
    return parse({**use, **pairs, "path": str(file)}, DataConfig, "--columns")


SCORE = Command(
    _arguments,
    _run,
    example="runs/demo/model --data .cache/demo/icd/server.jsonl --rows 24",
    then="fedspan model card, which tells what the sites have scored",
    notes="Runs here alone; nothing is fetched or sent.",
)
