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
from common.data.chat import Example, causal_loss_sum, collate, encode, end_ids, last_tokens, pad_id, prompt_ids
from common.data.rows import Row
from common.metrics import ANSWERS, scores
from common.system.memory import halving


@dataclass(frozen=True)
class LossResult:
    """Held-out loss.

    Attributes:
        loss: mean cross-entropy over all answer tokens, nats.
        perplexity: exp(loss).
        tokens: answer tokens counted.
        examples: rows.
    """

    loss: float
    perplexity: float
    tokens: int
    examples: int


def evaluate_model(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    rows: list[Row],
    config: EvaluationConfig,
    *,
    system: str | None,
    max_length: int,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
) -> dict[str, float]:
    """All metrics of a model on some rows.

    Returns:
        loss, perplexity, tokens, examples; with ``config.generate`` also generated (rows), and the scores of answers.
    """
    chosen = in_fixed_order(rows)
    result = evaluate_loss(
        model,
        tokenizer,
        chosen[: config.max_examples],
        system=system,
        max_length=max_length,
        batch_size=config.batch_size,
        device=device,
        autocast_dtype=autocast_dtype,
    )
    metrics = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "tokens": float(result.tokens),
        "examples": float(result.examples),
    }
    asked = chosen[: config.generate]
    if asked:
        answers = generate_answers(
            model,
            tokenizer,
            asked,
            system=system,
            max_length=max_length,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            device=device,
            autocast_dtype=autocast_dtype,
        )
        metrics |= {"generated": float(len(asked)), **scores(ANSWERS, answers, [row.answer for row in asked])}
    return metrics


def in_fixed_order(rows: list[Row]) -> list[Row]:
    """Rows ordered by a hash of their content: the first k are the same rows in every round, and mixed."""
    return sorted(rows, key=Row.key)


@torch.no_grad()
def evaluate_loss(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    rows: list[Row],
    *,
    system: str | None,
    max_length: int,
    batch_size: int,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
) -> LossResult:
    """Mean loss over the answer tokens of all rows; on half as many rows at a time where memory runs out."""
    examples = [encode(tokenizer, row, system, max_length) for row in rows]
    examples.sort(key=lambda example: len(example.input_ids))  # little padding
    total, tokens = 0.0, 0
    padding = pad_id(tokenizer)

    def loss_of(some: list[Example]) -> tuple[float, int]:
        batch = collate(some, padding)
        loss, counted = causal_loss_sum(model, {key: value.to(device) for key, value in batch.items()})
        return float(loss), counted

    with _evaluating(model, device, autocast_dtype):
        for loss, counted in halving(examples, batch_size, loss_of):
            total, tokens = total + loss, tokens + counted
    mean = total / max(tokens, 1)
    return LossResult(mean, math.exp(min(mean, 700.0)), tokens, len(rows))


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    rows: list[Row],
    *,
    system: str | None,
    max_length: int,
    max_new_tokens: int,
    batch_size: int,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
) -> list[str]:
    """Greedy answers to the rows' prompts, in their order.

    A prompt keeps its last ``max_length`` tokens, fewer where the model has no positions for these and the answer.
    """
    from transformers import GenerationConfig

    padding = pad_id(tokenizer)
    ends = end_ids(tokenizer)
    settings = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=padding)
    positions = getattr(model.config, "max_position_embeddings", None) or max_length + max_new_tokens
    room = max(min(max_length, positions - max_new_tokens), 1)
    prompts = [last_tokens(tokenizer, prompt_ids(tokenizer, row.prompt, system), room) for row in rows]
    by_length = sorted(range(len(rows)), key=lambda i: len(prompts[i]))

    def answers_to(some: list[int]) -> list[str]:
        width = max(len(prompts[i]) for i in some)
        ids = torch.full((len(some), width), padding)
        mask = torch.zeros_like(ids)
        for line, i in enumerate(some):  # padded on the left: generation continues at the right
            ids[line, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[line, width - len(prompts[i]) :] = 1
        out = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
        )
        answers = []
        for new in out[:, width:].tolist():
            stop = min((new.index(end) for end in ends if end in new), default=len(new))
            answers.append(tokenizer.decode(new[:stop], skip_special_tokens=True).strip())
        return answers

    with _evaluating(model, device, autocast_dtype), _only_settings(model, settings):
        answers = dict(zip(by_length, chain.from_iterable(halving(by_length, batch_size, answers_to)), strict=True))
    return [answers[i] for i in range(len(rows))]


@contextmanager
def _evaluating(model: nn.Module, device: torch.device, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """Evaluation mode and arithmetic; afterwards the model is in the mode it was in."""
    was_training = model.training
    model.train(False)
    try:
        with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            yield
    finally:
        model.train(was_training)


@contextmanager
def _only_settings(model: Any, settings: Any) -> Iterator[None]:  # noqa: ANN401
    """Generate by ``settings`` alone.

    ``generate`` fills what is unset in a configuration that it is given from the model's own, so a model's repetition
    penalty or maximum length would change what "greedy" means.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, inner.generation_config = inner.generation_config, settings
    try:
        yield
    finally:
        inner.generation_config = own
