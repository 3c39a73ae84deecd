"""Tokens of rows: what the loss counts, what an answer ends with, and answers that are really generated."""

import math

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from common.config.federation import EvaluationConfig
from common.data.chat import causal_loss_sum, collate, encode, last_tokens, prompt_ids
from common.data.evaluation import EvalSettings, evaluate_model, generate_answers, in_fixed_order
from common.data.rows import Row
from common.errors import ModelError
from common.model.base_model import pad_id
from deploy.sandbox.tiny import make_tokenizer

ROW = Row("acute pain", "ache of the hand")
CPU = torch.device("cpu")


def model() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(make_tokenizer()), max_position_embeddings=64, **size))


def test_labels_are_the_answer_and_the_token_that_ends_its_turn() -> None:
    tokenizer = make_tokenizer()
    example = encode(tokenizer, ROW, "Be brief.", 64)
    batch = collate([example], pad_id(tokenizer))
    assert tokenizer.decode(batch["labels"]) == "ache of the hand<|im_end|>"
    assert torch.equal(batch["input_ids"][0][batch["sources"] + 1], batch["labels"])
    assert tokenizer.decode(batch["input_ids"][0][: batch["sources"][0] + 1]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nacute pain<|im_end|>\n<|im_start|>assistant\n"
    )


TALK = Row(
    "acute pain", "ache of the hand", before=(("system", "Be kind."), ("user", "foot"), ("assistant", "ache of it"))
)


def test_loss_counts_every_turn_of_the_assistant_with_its_end() -> None:
    tokenizer = make_tokenizer()
    for template, ended in ((tokenizer.chat_template, "<|im_end|>"), (None, "<|im_end|>")):
        tokenizer.chat_template = template
        batch = collate([encode(tokenizer, TALK, "not this one", 200)], pad_id(tokenizer))
        assert tokenizer.decode(batch["labels"]) == f"ache of it{ended}ache of the hand{ended}"
        if template is not None:
            messages = [{"role": r, "content": c} for r, c in (*TALK.before, ("user", TALK.prompt))]
            messages.append({"role": "assistant", "content": TALK.answer})
            whole = tokenizer.apply_chat_template(messages, tokenize=False)
            assert tokenizer.decode(batch["input_ids"][0]) == whole.removesuffix("\n")
            assert tokenizer.decode(prompt_ids(tokenizer, TALK.prompt, None, TALK.before)) + "ache" in whole


@pytest.mark.parametrize("max_length", [10, 16, 22, 30])
def test_conversation_that_is_cut_keeps_what_the_loss_counts_in_place(max_length: int) -> None:
    tokenizer = make_tokenizer()
    whole, cut = (collate([encode(tokenizer, TALK, None, n)], pad_id(tokenizer)) for n in (200, max_length))
    assert cut["input_ids"].shape[1] == max_length
    assert torch.equal(cut["input_ids"][0], whole["input_ids"][0][-max_length:])
    lost, places = whole["input_ids"].shape[1] - max_length, whole["sources"]
    assert torch.equal(cut["sources"], places[places >= lost] - lost)
    assert torch.equal(cut["labels"], whole["labels"][places >= lost])


def test_template_that_drops_earlier_turns_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ModelError, match="leaves out earlier turns"):
        encode(tokenizer, TALK, None, 64)


def test_without_a_chat_template_the_answer_follows_on_a_new_line() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    example = encode(tokenizer, ROW, "Be brief.", 64)
    assert tokenizer.decode(example.input_ids) == "Be brief.\nacute pain\nache of the hand<|im_end|>"


def test_padding_does_not_hide_the_end_token_though_they_are_the_same() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    examples = [encode(tokenizer, row, None, 64) for row in (ROW, Row("p", "a"))]
    batch = collate(examples, pad_id(tokenizer))
    ended = [line * batch["input_ids"].shape[1] + len(example.input_ids) - 2 for line, example in enumerate(examples)]
    assert batch["sources"][batch["labels"] == tokenizer.eos_token_id].tolist() == ended
    for line, example in enumerate(examples):
        assert batch["attention_mask"][line].sum() == len(example.input_ids)


@pytest.mark.parametrize("max_length", [8, 12, 20])
def test_long_row_loses_the_beginning_of_its_prompt_first(max_length: int) -> None:
    tokenizer = make_tokenizer()
    whole, cut = (encode(tokenizer, Row("word " * 30, "a b"), None, n) for n in (500, max_length))
    assert len(cut.input_ids) == max_length
    assert cut.input_ids[cut.answer_start :] == whole.input_ids[whole.answer_start :]
    assert cut.input_ids == whole.input_ids[-max_length:]


def test_beginning_of_text_is_kept_when_a_prompt_is_cut() -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"  # noqa: S105
    begin = tokenizer.bos_token_id
    assert last_tokens(tokenizer, [begin, 7, 8, 9], 3) == [begin, 8, 9]
    assert last_tokens(tokenizer, [begin, 7, begin, 9], 3) == [7, begin, 9]


def test_loss_is_that_of_the_answer_alone() -> None:
    tokenizer, lm = make_tokenizer(), model()
    example = encode(tokenizer, ROW, None, 64)
    with torch.no_grad():
        loss, count = causal_loss_sum(lm, collate([example], pad_id(tokenizer)))
    logits = lm(input_ids=torch.tensor([example.input_ids])).logits[0].detach().double().log_softmax(-1)
    places = range(example.answer_start, len(example.input_ids))
    assert count == len(places)
    assert float(loss) == pytest.approx(-sum(float(logits[i - 1, example.input_ids[i]]) for i in places), rel=1e-5)


def test_answers_are_generated_token_by_token_and_batching_changes_none() -> None:
    tokenizer, lm = make_tokenizer(), model()
    rows = [Row("acute pain of the hand", "x"), Row("ear", "x"), Row("swelling of the foot and more", "x")]
    expected = []
    for row in rows:
        ids = prompt_ids(tokenizer, row.prompt, None)
        new: list[int] = []
        while len(new) < 6 and (not new or new[-1] != tokenizer.eos_token_id):
            new.append(int(lm(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        expected.append(
            tokenizer.decode([t for t in new if t != tokenizer.eos_token_id], skip_special_tokens=True).strip()
        )
    lm.generation_config = GenerationConfig(repetition_penalty=5.0, max_length=3)  # must not change what greedy is
    for batch_size in (1, 3):
        settings = EvalSettings(EvaluationConfig(max_new_tokens=6, batch_size=batch_size), 64, CPU)
        assert generate_answers(lm, tokenizer, rows, settings) == expected


def test_metrics_do_not_depend_on_order_or_batch_size_and_leave_the_model_as_it_was() -> None:
    tokenizer, lm = make_tokenizer(), model().train()
    rows = [Row(f"term {i}", f"title {i}") for i in range(7)]
    found = [
        evaluate_model(
            lm,
            tokenizer,
            some,
            EvalSettings(EvaluationConfig(max_examples=5, generate=2, max_new_tokens=3, batch_size=size), 64, CPU),
        )
        for some, size in ((rows, 1), (rows[::-1], 4))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["perplexity"] == pytest.approx(math.exp(found[0]["loss"]))
    assert (found[0]["examples"], found[0]["generated"]) == (5, 2)
    assert lm.training
    assert in_fixed_order(rows) == in_fixed_order(rows[::-1])


def test_evaluation_goes_on_with_fewer_rows_when_memory_runs_out() -> None:
    tokenizer, lm = make_tokenizer(), model()
    rows = [Row(f"term {i}", f"title {i}") for i in range(7)]
    settings = EvalSettings(EvaluationConfig(generate=5, max_new_tokens=3, batch_size=4), 64, CPU)
    expected = evaluate_model(lm, tokenizer, rows, settings)
    sizes = []

    def fail(module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    lm.register_forward_pre_hook(fail, with_kwargs=True)
    assert evaluate_model(lm, tokenizer, rows, settings) == pytest.approx(expected, rel=1e-5)
    assert sizes.count(4) == 2  # once for the loss, once for the answers


def test_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="the tokenizer has no end-of-text token"):
        encode(tokenizer, ROW, None, 64)


def test_template_that_refuses_a_system_message_is_told_without_quoting_it() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no secret') }}{% endif %}x"
    with pytest.raises(ModelError, match=r"refuses a conversation of system, user; leave out data\.system") as caught:
        prompt_ids(tokenizer, "secret", "secret")
    assert "secret" not in str(caught.value)
