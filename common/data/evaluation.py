"""Held-out evaluation: loss and perplexity on answers, and scores of generated answers. Never teacher-forced argmax."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from common.config.federation import EvaluationConfig
from common.data.chat import Example, causal_loss_sum, collate, encode, end_ids, last_tokens, prompt_ids
from common.data.rows import Row
from common.metrics import ANSWERS, scores
from common.model.base_model import pad_id
from common.system.machine import halving


@dataclass(frozen=True)
class EvalSettings:
    """Settings of an evaluation.

    Attributes:
        config: the federation's evaluation section.
        max_length: most tokens of a row; longer prompts keep their last tokens.
        device: the model's device.
        system: system message of every prompt, where the chat template has one.
        autocast: arithmetic of the forward passes; None for the weights' own.
    """

    config: EvaluationConfig
    max_length: int
    device: torch.device
    system: str | None = None
    autocast: torch.dtype | None = None


def evaluate_model(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    rows: list[Row],
    settings: EvalSettings,
) -> dict[str, float]:
    """Compute all metrics of a language model on some rows.

    Returns:
        loss (mean cross-entropy of an answer's tokens, nats), perplexity, tokens (of answers), examples (rows); with
        ``config.generate`` also generated (rows), and the scores of answers.
    """
    chosen, config = in_fixed_order(rows), settings.config
    metrics = _loss(model, tokenizer, chosen[: config.max_examples], settings)
    asked = chosen[: config.generate]
    if asked:
        answers = generate_answers(model, tokenizer, asked, settings)
        metrics |= {"generated": float(len(asked)), **scores(ANSWERS, answers, [row.answer for row in asked])}
    return metrics


def in_fixed_order(rows: list[Row]) -> list[Row]:
    """Rows ordered by a hash of their content: the first k are the same rows in every round, and mixed."""
    return sorted(rows, key=Row.key)


@torch.no_grad()
def _loss(model: nn.Module, tokenizer: Any, rows: list[Row], settings: EvalSettings) -> dict[str, float]:  # noqa: ANN401
    """Mean loss over the answer tokens of all rows; when memory runs out, the batch size is halved."""
    examples = [encode(tokenizer, row, settings.system, settings.max_length) for row in rows]
    examples.sort(key=lambda example: len(example.input_ids))  # little padding
    total, tokens = 0.0, 0
    padding = pad_id(tokenizer)

    def loss_of(some: list[Example]) -> tuple[float, int]:
        batch = collate(some, padding)
        loss, counted = causal_loss_sum(model, {key: value.to(settings.device) for key, value in batch.items()})
        return float(loss), counted

    with _evaluating(model, settings):
        for loss, counted in halving(examples, settings.config.batch_size, loss_of):
            total, tokens = total + loss, tokens + counted
    mean = total / max(tokens, 1)
    perplexity = math.exp(min(mean, 700.0))
    return {"loss": mean, "perplexity": perplexity, "tokens": float(tokens), "examples": float(len(rows))}


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    rows: list[Row],
    settings: EvalSettings,
) -> list[str]:
    """Greedy answers to the rows' prompts, in their order.

    A prompt keeps its last ``max_length`` tokens, fewer where the model has no positions for these and the answer.
    """
    from transformers import GenerationConfig

    padding, ends, new = pad_id(tokenizer), end_ids(tokenizer), settings.config.max_new_tokens
    greedy = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=ends, pad_token_id=padding)
    positions = getattr(model.config, "max_position_embeddings", None) or settings.max_length + new
    room = max(min(settings.max_length, positions - new), 1)
    asked = [prompt_ids(tokenizer, row.prompt, settings.system, row.before) for row in rows]
    prompts = [last_tokens(tokenizer, ids, room) for ids in asked]
    by_length = sorted(range(len(rows)), key=lambda i: len(prompts[i]))

    def answers_to(some: list[int]) -> list[str]:
        width = max(len(prompts[i]) for i in some)
        ids = torch.full((len(some), width), padding)
        mask = torch.zeros_like(ids)
        for line, i in enumerate(some):  # padded on the left: generation continues at the right
            ids[line, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[line, width - len(prompts[i]) :] = 1
        out = model.generate(  # type: ignore[operator]
            input_ids=ids.to(settings.device), attention_mask=mask.to(settings.device), generation_config=greedy
        )
        answers = []
        for said in out[:, width:].tolist():
            stop = min((said.index(end) for end in ends if end in said), default=len(said))
            answers.append(tokenizer.decode(said[:stop], skip_special_tokens=True).strip())
        return answers

    with _evaluating(model, settings), _only(greedy, model):
        told = chain.from_iterable(halving(by_length, settings.config.batch_size, answers_to))
        answers = dict(zip(by_length, told, strict=True))
    return [answers[i] for i in range(len(rows))]


@contextmanager
def _evaluating(model: nn.Module, settings: EvalSettings) -> Iterator[None]:
    """Evaluation mode and arithmetic; afterwards the model is in the mode it was in."""
    was_training = model.training
    model.train(False)
    try:
        with torch.autocast(settings.device.type, dtype=settings.autocast, enabled=settings.autocast is not None):
            yield
    finally:
        model.train(was_training)


@contextmanager
def _only(generation: Any, model: Any) -> Iterator[None]:  # noqa: ANN401
    """Generate by one configuration alone.

    ``generate`` fills what is unset in a configuration that it is given from the model's own, so a model's repetition
    penalty or maximum length would change what "greedy" means.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, inner.generation_config = inner.generation_config, generation
    try:
        yield
    finally:
        inner.generation_config = own
