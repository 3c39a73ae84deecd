"""Ask a finished model: ``fedspan model ask FOLDER [QUESTION ...]``.

A language model answers as in the federation's evaluation: the same template and system message, greedily. A classifier
tells its labels with their probabilities; for an image a question is a file.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from common.config.federation import EvaluationConfig
from common.data.rows import Row, Template
from common.errors import ConfigError, DataError
from common.model.finished import Use
from common.system.command import Command, number
from deploy.model.loading import Loaded, add_folder, load

_SHOWN = 5  # labels


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument(
        "questions",
        nargs="*",
        metavar="QUESTION",
        help="a text, or an image's file; where prompts are made of several columns, a JSON object with these; -, or "
        "none: one question from standard input",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message (default: the federation's)")
    parser.add_argument(
        "--max-new-tokens", type=number(int, 1), metavar="N", help="longest answer (default: the federation's)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per question, with all labels")


def _run(options: argparse.Namespace) -> None:
    loaded = load(options.folder, options.base)
    questions = [sys.stdin.read().strip() if one == "-" else one for one in options.questions or ["-"]]
    if not all(questions):
        raise ConfigError("a question is empty")
    if loaded.task.generates:
        answers = generated(loaded, questions, options.system, options.max_new_tokens)
        told = [{"question": question, "answer": answer} for question, answer in zip(questions, answers, strict=True)]
        shown = answers
    else:
        if options.system is not None or options.max_new_tokens is not None:
            raise ConfigError("--system and --max-new-tokens are for models that write; this one tells labels")
        labels = classified(loaded, questions)
        told = [{"question": question, "labels": found} for question, found in zip(questions, labels, strict=True)]
        shown = [_table(found) for found in labels]
    for question, answer, record in zip(questions, shown, told, strict=True):
        if options.json:
            print(json.dumps(record, ensure_ascii=False))  # noqa: T201
        else:
            print(answer if len(questions) == 1 else f"> {question}\n{answer}\n")  # noqa: T201


def generated(loaded: Loaded, questions: Sequence[str], system: str | None, longest: int | None) -> list[str]:
    """A language model's answers, in the order of the questions.

    Args:
        loaded: the model.
        questions: texts that fill the column of its prompts.
        system: system message; None: the one it was evaluated with.
        longest: most tokens of an answer; None: as in its evaluation.

    Raises:
        DataError: a question lacks a column of the prompts.
    """
    from common.data.evaluation import generate_answers

    use = loaded.finished.use
    evaluation = EvaluationConfig(max_new_tokens=longest or use.max_new_tokens, batch_size=use.batch_size)
    rows = [Row(_prompt(use, question), "") for question in questions]
    settings = loaded.settings(evaluation, use.system if system is None else system)
    return generate_answers(loaded.model, loaded.tokenizer, rows, settings)


def classified(loaded: Loaded, questions: Sequence[str]) -> list[dict[str, float]]:
    """A classifier's probabilities of all labels, the most likely first, in the order of the questions.

    Raises:
        DataError: a question lacks a column of the prompts, or is no image that can be read.
    """
    import torch

    from common.system.machine import halving

    task, use = loaded.task, loaded.finished.use
    if task.reads_files and (missing := [file for file in questions if not Path(file).is_file()]):
        raise DataError(f"{missing[0]}: no such image")
    prompts = questions if task.reads_files else [_prompt(use, question) for question in questions]
    rows = [Row(prompt, task.labels[0]) for prompt in prompts]  # the label is not looked at
    examples, collate = task.examples(loaded.tokenizer, rows, None, use.max_length), task.collater(loaded.tokenizer)

    def measure(some: list[object]) -> list[list[float]]:
        batch = {key: value.to(loaded.device) for key, value in collate(some).items() if key != "labels"}
        with torch.no_grad():
            shares: list[list[float]] = loaded.model(**batch).logits.float().softmax(-1).tolist()
        return shares

    found = [
        dict(zip(task.labels, row, strict=True)) for part in halving(examples, use.batch_size, measure) for row in part
    ]
    return [dict(sorted(one.items(), key=lambda label: -label[1])) for one in found]


def _prompt(use: Use, question: str) -> str:
    """A question as a row's prompt."""
    if not use.prompt:  # conversations, or a server without rows of its own
        return question
    template = Template(use.prompt, "prompt")
    columns = list(dict.fromkeys(template.columns))
    cells: dict[str, object] = {columns[0]: question}
    if len(columns) > 1:
        try:
            cells = json.loads(question)
            complete = all(isinstance(cells[column], str | int | float) for column in columns)
        except (ValueError, KeyError, TypeError):
            complete = False
        if not complete:
            example = json.dumps(dict.fromkeys(columns, "..."))
            raise DataError(f"this model's prompts are made of several columns; give a question as {example}")
    return template.fill(cells)


def _table(labels: dict[str, float]) -> str:
    width = max(map(len, labels))
    return "\n".join(f"{label:{width}}  {share:.3f}" for label, share in list(labels.items())[:_SHOWN])


ASK = Command(
    _arguments,
    _run,
    example="runs/demo/model 'Fistula of appendix'",
    then="fedspan model score, on rows of your own",
    notes="Runs here alone; nothing is fetched or sent.",
)
