"""Rows as tokens: chat template where there is one, loss on the answer and its end token only."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import ModelError
from common.rows import Row

Batch = dict[str, Tensor]
IGNORED = -100  # label of a token that the loss does not count


@dataclass(frozen=True, repr=False)
class Example:
    """A row as tokens: ``input_ids[answer_start:]`` is the answer with its end token."""

    input_ids: list[int]
    answer_start: int


def prompt_ids(tokenizer: Any, prompt: str, system: str | None) -> list[int]:  # noqa: ANN401
    """The tokens after which the answer begins."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(_turns(prompt, system), tokenize=False, add_generation_prompt=True)
        return _tokens(tokenizer, text, special=False)
    text = prompt if system is None else f"{system}\n{prompt}"
    return _tokens(tokenizer, f"{text}\n", special=True)


def encode(tokenizer: Any, row: Row, system: str | None, max_length: int) -> Example:  # noqa: ANN401
    """A row as one training example of at most ``max_length`` tokens.

    A row that is too long loses the beginning of its prompt first, so that the answer and its end stay; an answer that
    is longer than ``max_length`` by itself loses its end.

    Raises:
        ModelError: the tokenizer has no end-of-text token.
    """
    prompt = prompt_ids(tokenizer, row.prompt, system)
    answer = [*_tokens(tokenizer, row.answer, special=False), *_end(tokenizer)]
    room = max(max_length - len(answer), 1)
    prompt = prompt[-room:]
    return Example((prompt + answer)[:max_length], len(prompt))


def collate(examples: list[Example], pad_id: int) -> Batch:
    """A batch padded on the right.

    Returns:
        input_ids, attention_mask and labels, each (rows, longest row). Labels come from positions, not from token
        values, so a padding token that doubles as end token does not hide the answer's end.
    """
    width = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids)
        mask[row, :length] = 1
        labels[row, example.answer_start : length] = ids[row, example.answer_start : length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def causal_loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Summed cross-entropy of a batch's answer tokens, in float32, and how many these are."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    loss = functional.cross_entropy(logits[counted].float(), labels[counted], reduction="sum")
    return loss, int(counted.sum())


def pad_id(tokenizer: Any) -> int:  # noqa: ANN401
    """The padding token; the end token where the tokenizer has none (positions, not values, mark the padding).

    Raises:
        ModelError: the tokenizer has neither.
    """
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if padding is None:
        raise ModelError("the tokenizer has neither a padding nor an end-of-text token")
    return int(padding)


def end_ids(tokenizer: Any) -> list[int]:  # noqa: ANN401
    """Tokens that end a generated answer.

    Raises:
        ModelError: the tokenizer has no end-of-text token.
    """
    return list(dict.fromkeys([_end(tokenizer)[0], int(tokenizer.eos_token_id)]))


def _end(tokenizer: Any) -> list[int]:  # noqa: ANN401
    """The token that ends an assistant's turn: what the chat template puts after an answer, else end-of-text."""
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-text token")
    if tokenizer.chat_template:
        probe = "fedspan"
        turns = [*_turns("question", None), {"role": "assistant", "content": probe}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        tail = _tokens(tokenizer, text.rpartition(probe)[2], special=False)
        special = set(tokenizer.all_special_ids)
        ends = [token for token in tail if token in special]
        if ends:
            return ends[:1]
    return [int(tokenizer.eos_token_id)]


def _turns(prompt: str, system: str | None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def _tokens(tokenizer: Any, text: str, *, special: bool) -> list[int]:  # noqa: ANN401
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])
