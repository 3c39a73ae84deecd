"""Rows as tokens: chat template where there is one, loss on the answers and their end tokens only."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.nn import functional

from common.data.packing import Packing, pack
from common.data.rows import Row
from common.errors import ModelError
from common.protocol.digest import PINNED_DATE

Batch = dict[str, Tensor]
Turns = tuple[tuple[str, str], ...]  # roles and texts
_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>\s*$")
_DATE = datetime.fromisoformat(PINNED_DATE)
_PARTS = "".join(f"|replace('%{part}', '{_DATE.strftime('%' + part)}')" for part in "AaBbdHIjMmpSYy")
_PINNED = "{%- macro strftime_now(form) -%}{{ form" + _PARTS + " }}{%- endmacro -%}"  # in place of transformers' own


@dataclass(frozen=True, repr=False)
class Example:
    """A row as tokens: ``input_ids[answer_start:]`` is the answer with its end token.

    ``earlier``: where the assistant's turns before that begin and end, with their end tokens.
    """

    input_ids: list[int]
    answer_start: int
    earlier: tuple[tuple[int, int], ...] = ()

    def counted(self) -> Iterator[tuple[int, int]]:
        """Begin and end of every span that the loss counts; never a row's first token, which nothing predicts."""
        for start, end in (*self.earlier, (self.answer_start, len(self.input_ids))):
            if max(start, 1) < end:
                yield max(start, 1), end


def prompt_ids(tokenizer: Any, prompt: str, system: str | None, before: Turns = ()) -> list[int]:  # noqa: ANN401
    """The tokens after which the answer begins; ``before``: the turns of the conversation before the prompt.

    Raises:
        ModelError: the chat template refuses such a conversation, e.g. a system message.
    """
    return _prompt(tokenizer, prompt, system, before)[0]


def _prompt(
    tokenizer: Any,  # noqa: ANN401
    prompt: str,
    system: str | None,
    before: Turns,
) -> tuple[list[int], list[tuple[int, int]]]:
    """The same, and where in it the assistant's earlier turns are; each is tokenized by itself, as the last one is."""
    first = [("system", system)] if system is not None and not (before and before[0][0] == "system") else []
    turns = [{"role": role, "content": text} for role, text in (*first, *before, ("user", prompt))]
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    ids: list[int] = []
    spans = []
    for number, text in enumerate(_between(tokenizer, turns)):
        start = len(ids)
        if number:
            ids += _tokens(tokenizer, answers[number - 1], special=False)
            if not tokenizer.chat_template:
                ids += _end(tokenizer)
        told = _tokens(tokenizer, text, special=number == 0 and not tokenizer.chat_template)
        if number:
            ends = bool(tokenizer.chat_template) and told[:1] == _end(tokenizer)
            spans.append((start, len(ids) + ends))
        ids += told
    ends_itself = not tokenizer.chat_template and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if ends_itself else ids, spans  # some tokenizers close every text they are given


def _between(tokenizer: Any, turns: list[dict[str, str]]) -> list[str]:  # noqa: ANN401
    """The text around the assistant's turns: before the first, between two, and up to where the next answer begins."""
    marks = [f"fedspan answer {number}" for number in range(sum(turn["role"] == "assistant" for turn in turns))]
    left = iter(marks)
    marked = [{**turn, "content": next(left)} if turn["role"] == "assistant" else turn for turn in turns]
    if tokenizer.chat_template:
        text = _render(tokenizer, marked, add_generation_prompt=True)
        if thought := _THOUGHT.search(text):  # the template opens a block of thoughts; an answer comes after it
            text = f"{text.rstrip()}\n\n</{thought[1]}>\n\n"
    else:
        text = "".join(turn["content"] + ("" if turn["role"] == "assistant" else "\n") for turn in marked)
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found:
            raise ModelError("the tokenizer's chat template leaves out earlier turns; use rows of one turn with it")
        pieces.append(piece)
    return [*pieces, text]


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
    whole, spans = _prompt(tokenizer, row.prompt, system, row.before)
    prompt = last_tokens(tokenizer, whole, room=max(max_length - len(answer), 1))
    lost = len(whole) - len(prompt)
    earlier = tuple((max(start - lost, 0), end - lost) for start, end in spans if end > lost)
    return Example((prompt + answer)[:max_length], len(prompt), earlier)


def padded(rows: Sequence[Sequence[int]], padding: int) -> Batch:
    """Rows of tokens, padded on the right: input_ids and attention_mask, each (rows, longest row)."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), padding)
    mask = torch.zeros_like(ids)
    for line, row in enumerate(rows):
        ids[line, : len(row)] = torch.tensor(row)
        mask[line, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def collate(examples: Sequence[Example], padding: int, packing: Packing | None = None) -> Batch:
    """A batch of the model's inputs, and of what the loss counts.

    Returns:
        input_ids and attention_mask, padded on the right or packed (``common.data.packing``); labels (counted tokens,);
        sources (counted tokens,), the place of the hidden state that predicts each, counted over all rows. They come
        from positions, not from token values, so a padding token that doubles as end token does not hide the answer's
        end.
    """
    if packing is not None and (batch := pack(examples, padding, packing)) is not None:
        return batch
    batch = padded([example.input_ids for example in examples], padding)
    width = batch["input_ids"].shape[1]
    spans = [(line * width, example, span) for line, example in enumerate(examples) for span in example.counted()]
    sources = [at + place - 1 for at, _, span in spans for place in range(*span)]
    labels = [token for _, example, (start, end) in spans for token in example.input_ids[start:end]]
    return {**batch, "sources": torch.tensor(sources).long(), "labels": torch.tensor(labels).long()}


def causal_loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Summed cross-entropy of a batch's counted tokens, in float32, and the number of these tokens."""
    logits = counted_logits(model, batch)
    return summed_loss(logits, batch["labels"]), len(logits)


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy, in float32, where the logits (n, classes) are; labels: (n,), on any device."""
    return functional.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")


def counted_logits(model: Any, batch: Batch) -> Tensor:  # noqa: ANN401
    """Logits (counted tokens, vocabulary) at a batch's ``sources``.

    The output embedding sees no other hidden states, because over a large vocabulary it is most of the work; the
    model's own code goes on from there (a cap, a scale). Where a model calls no such module, its logits are selected.
    """
    selected = False

    def select(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal selected
        del module
        selected = True
        hidden = inputs[0]  # (rows, width, hidden)
        return hidden.flatten(0, 1)[batch["sources"].to(hidden.device)][None], *inputs[1:]

    head = model.get_output_embeddings()
    hook = None if head is None else head.register_forward_pre_hook(select)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    return logits[0] if selected else logits.flatten(0, 1)[batch["sources"].to(logits.device)]


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
        text = _render(tokenizer, [{"role": "user", "content": "question"}, {"role": "assistant", "content": probe}])
        tail = _tokens(tokenizer, text.rpartition(probe)[2], special=False)
        # The end of a turn (Phi's <|end|>) need not be one of the named special tokens.
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        ends = [token for token in tail if token in special]
        if ends:
            return ends[:1]
    return [int(tokenizer.eos_token_id)]


def _render(tokenizer: Any, turns: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:  # noqa: ANN401
    """The turns as the template writes them: of several the one named default, without thoughts, on a pinned day."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise ModelError(
                f"the tokenizer's chat templates are named {', '.join(template)}; one must be named default"
            )
        template = template["default"]
    if "strftime_now" in template:
        template = _PINNED + template
    try:
        text = tokenizer.apply_chat_template(
            turns,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,
        )
    except (TemplateError, TypeError, ValueError):  # its text may quote the conversation
        roles = ", ".join(turn["role"] for turn in turns)
        hint = "; leave out data.system" if turns[0]["role"] == "system" else ""
        raise ModelError(f"the tokenizer's chat template refuses a conversation of {roles}{hint}") from None
    return str(text)


def _tokens(tokenizer: Any, text: str, *, special: bool) -> list[int]:  # noqa: ANN401
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])
