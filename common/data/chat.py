"""Rows as tokens: chat template where there is one, loss on the answer and its end token only."""

from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.nn import functional

from common.data.rows import Row
from common.errors import ModelError

Batch = dict[str, Tensor]
IGNORED = -100  # label of a token that the loss does not count


@dataclass(frozen=True, repr=False)
class Example:
    """A row as tokens: ``input_ids[answer_start:]`` is the answer with its end token."""

    input_ids: list[int]
    answer_start: int


def prompt_ids(tokenizer: Any, prompt: str, system: str | None) -> list[int]:  # noqa: ANN401
    """The tokens after which the answer begins.

    Raises:
        ModelError: the chat template refuses such a conversation, e.g. a system message.
    """
    if tokenizer.chat_template:
        text = _render(tokenizer, _turns(prompt, system), add_generation_prompt=True)
        return _tokens(tokenizer, text, special=False)
    text = prompt if system is None else f"{system}\n{prompt}"
    ids = _tokens(tokenizer, f"{text}\n", special=True)
    ends_itself = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id  # some tokenizers close every text they are given
    return ids[:-1] if ends_itself else ids


def last_tokens(tokenizer: Any, prompt: list[int], room: int) -> list[int]:  # noqa: ANN401
    """The last ``room`` (at least 1) tokens of a prompt, behind its beginning-of-text token where it has one.

    Some models (Gemma) fall apart without that token. A token that occurs again, such as the mark that opens every
    turn, is no beginning of a text.
    """
    if len(prompt) <= room:
        return prompt
    begin = prompt[:1] if prompt[0] == tokenizer.bos_token_id and prompt.count(prompt[0]) == 1 and room > 1 else []
    return begin + prompt[len(prompt) - room + len(begin) :]


def encode(tokenizer: Any, row: Row, system: str | None, max_length: int) -> Example:  # noqa: ANN401
    """A row as one training example of at most ``max_length`` tokens.

    A row that is too long loses the beginning of its prompt first, so that the answer and its end stay; an answer that
    is longer than ``max_length`` by itself loses its end.

    Raises:
        ModelError: the tokenizer has no end-of-text token, or see ``prompt_ids``.
    """
    answer = [*_tokens(tokenizer, row.answer, special=False), *_end(tokenizer)]
    prompt = last_tokens(tokenizer, prompt_ids(tokenizer, row.prompt, system), room=max(max_length - len(answer), 1))
    return Example((prompt + answer)[:max_length], len(prompt))


def collate(examples: list[Example], padding: int) -> Batch:
    """A batch padded on the right.

    Returns:
        input_ids, attention_mask and labels, each (rows, longest row). Labels come from positions, not from token
        values, so a padding token that doubles as end token does not hide the answer's end.
    """
    width = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), width), padding)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids)
        mask[row, :length] = 1
        labels[row, example.answer_start : length] = ids[row, example.answer_start : length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def causal_loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Summed cross-entropy of a batch's answer tokens, in float32, and the number of these tokens."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    loss = functional.cross_entropy(logits[counted].float(), labels[counted], reduction="sum")
    return loss, int(counted.sum())


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
        text = _render(tokenizer, [*_turns("question", None), {"role": "assistant", "content": probe}])
        tail = _tokens(tokenizer, text.rpartition(probe)[2], special=False)
        # The end of a turn (Phi's <|end|>) need not be one of the named special tokens.
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        ends = [token for token in tail if token in special]
        if ends:
            return ends[:1]
    return [int(tokenizer.eos_token_id)]


def _render(tokenizer: Any, turns: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:  # noqa: ANN401
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError:  # its text may quote the conversation
        roles = ", ".join(turn["role"] for turn in turns)
        hint = "; leave out data.system" if turns[0]["role"] == "system" else ""
        raise ModelError(f"the tokenizer's chat template refuses a conversation of {roles}{hint}") from None
    return str(text)


def _turns(prompt: str, system: str | None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def _tokens(tokenizer: Any, text: str, *, special: bool) -> list[int]:  # noqa: ANN401
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])
