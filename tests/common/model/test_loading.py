"""A model's files and its loader are believed: what is not there, is another's, or has another meaning is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from common.config.task import CausalLMTask, SequenceClassificationTask
from common.data.chat import prompt_ids
from common.data.tasks import make_task
from common.errors import ModelError
from common.model.base_model import Base
from common.protocol.digest import tokenizer_digest
from deploy.sandbox.tiny import TEMPLATE, make_model, make_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", layers=2)


def load(folder: Path, labels: list[str] | None = None) -> Base:
    task = SequenceClassificationTask(labels=labels) if labels else CausalLMTask()
    return make_task(task).load(str(folder), None, "float32", 0)


def change(folder: Path, file: str, **keys: Any) -> None:
    told = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(told | keys))


def rename(folder: Path, how: Callable[[str], str | None]) -> None:
    """Save the weights under other names; None: leave one out."""
    weights = load_file(folder / "model.safetensors")
    named = {new: tensor for name, tensor in weights.items() if (new := how(name)) is not None}
    save_file(named, folder / "model.safetensors", {"format": "pt"})


def prefixed(folder: Path) -> None:
    rename(folder, lambda name: f"_orig_mod.{name}")


def untied(folder: Path) -> None:
    change(folder, "config.json", tie_word_embeddings=False)


def short(folder: Path) -> None:
    change(folder, "config.json", num_hidden_layers=3)


def long(folder: Path) -> None:
    change(folder, "config.json", num_hidden_layers=1)


def wide(folder: Path) -> None:
    change(folder, "config.json", intermediate_size=64)


def quantised(folder: Path) -> None:
    change(folder, "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text(POINTER)


def pointer_of_torch(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model-00001-of-00002.bin")
    (folder / "pytorch_model-00002-of-00002.bin").write_text(POINTER)
    where = dict.fromkeys(weights, "pytorch_model-00001-of-00002.bin")
    where["model.norm.weight"] = "pytorch_model-00002-of-00002.bin"
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()


def pointer_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(POINTER)


def damaged_torch(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK no archive")


def damaged_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def new_word(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["angioneogenesis"])
    tokenizer.save_pretrained(folder)


def new_padding(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (
            prefixed,
            r"21 of 21 tensors of the model are not in its files \(lm_head.weight, .* files name 18 .*_orig_mod",
        ),
        (untied, r"1 of 21 tensors of the model are not in its files \(lm_head.weight\)"),
        (short, r"9 of 30 tensors of the model are not in its files \(model.layers.2.input_layernorm.weight, "),
        (long, r"its files hold 9 tensor\(s\) of blocks that the model does not have \(model.layers.1."),
        (wide, r"6 tensor\(s\) have another shape in its files .*\(model.layers.0.mlp.down_proj.weight \(32, 48\) for"),
        (quantised, r"is stored quantised \(gptq, .* or the model it was made of"),
        (pointer, r"model.safetensors is a Git-LFS pointer, not the file itself; run: git -C .*model lfs pull"),
        (pointer_of_torch, r"pytorch_model-00002-of-00002.bin is a Git-LFS pointer"),
        (pointer_tokenizer, r"tokenizer.json is a Git-LFS pointer"),
        (damaged_torch, r"model .* cannot be loaded: "),
        (damaged_index, r"index.json is damaged or cut off"),
        (adapter, r"holds a PEFT adapter; merge it into its base model first"),
        (new_word, r"the tokenizer gives numbers up to (\d+), the model has embeddings up to \d+; resize"),
        (new_padding, r"the tokenizer gives numbers up to (\d+), the model has embeddings up to \d+; resize"),
    ],
)
def test_model_that_is_not_what_its_files_say_is_refused_by_name(
    folder: Path, breaks: Callable[[Path], None], says: str
) -> None:
    assert load(folder).model is not None
    breaks(folder)
    with pytest.raises(ModelError, match=says) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def classifier(folder: Path, names: list[str], seed: int = 0) -> BertForSequenceClassification:
    """Save a finished classifier of these classes."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    told = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForSequenceClassification(
            BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes, **told)
        )
    with torch.no_grad():
        model.classifier.bias.copy_(torch.arange(1.0, len(names) + 1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("names", "labels", "rows"),
    [
        (["ham", "spam"], ["ham", "spam"], [0, 1]),
        (["ham", "spam"], ["spam", "ham"], [1, 0]),
        (["Ham", "SPAM "], ["spam", "ham"], [1, 0]),
        (["bad", "fair", "good"], ["good", "bad"], [2, 0]),
        (["bad", "good"], ["good", "fair", "bad"], [1, None, 0]),
        (["bad", "good"], ["cat", "dog"], [None, None]),
        (["bad", "fair", "good"], ["cat", "dog"], [None, None]),
    ],
)
def test_rows_of_a_finished_head_follow_their_names(
    tmp_path: Path, names: list[str], labels: list[str], rows: list[int | None]
) -> None:
    made = classifier(tmp_path / "model", names)
    base = load(tmp_path / "model", labels)
    assert base.model.config.id2label == dict(enumerate(labels))
    head: Any = base.model.classifier
    for here, there in enumerate(rows):
        if there is None:
            assert head.bias[here] == 0
            assert not any(torch.equal(head.weight[here], row) for row in made.classifier.weight)
        else:
            assert head.bias[here] == there + 1
            assert torch.equal(head.weight[here], made.classifier.weight[there])
    again: Any = load(tmp_path / "model", labels).model
    assert torch.equal(again.classifier.weight, head.weight)  # what is drawn is the same at every site


def test_finished_head_whose_classes_have_no_names_is_refused(tmp_path: Path) -> None:
    classifier(tmp_path / "model", ["LABEL_0", "LABEL_1"])
    with pytest.raises(ModelError, match=r"2 classes have no names .* write the names into `id2label`"):
        load(tmp_path / "model", ["ham", "spam"])


def test_head_that_the_files_lack_is_new_and_nothing_else_may_be(tmp_path: Path) -> None:
    classifier(tmp_path / "model", ["a", "b"])
    rename(tmp_path / "model", lambda name: None if name.startswith("classifier") else name)
    assert load(tmp_path / "model", ["ham", "spam"]).head == "new"
    rename(tmp_path / "model", lambda name: None if "word_embeddings" in name else name)
    with pytest.raises(ModelError, match=r"not in its files \(bert.embeddings.word_embeddings.weight\)"):
        load(tmp_path / "model", ["ham", "spam"])


NAMED = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "tools"}]


def test_tokenizer_with_named_templates_uses_the_default_one_and_all_count_in_the_digest(folder: Path) -> None:
    plain = load(folder).tokenizer
    (folder / "chat_template.jinja").unlink()
    change(folder, "tokenizer_config.json", chat_template=NAMED)
    named = load(folder).tokenizer
    assert prompt_ids(named, "acute pain", None) == prompt_ids(plain, "acute pain", None)
    digest = tokenizer_digest(named)
    change(folder, "tokenizer_config.json", chat_template=[NAMED[0], {"name": "tool_use", "template": "other"}])
    assert tokenizer_digest(load(folder).tokenizer) not in (digest, tokenizer_digest(plain))
    named.chat_template = {"tool_use": TEMPLATE}
    with pytest.raises(ModelError, match="templates are named tool_use; one must be named default"):
        prompt_ids(named, "acute pain", None)


def test_template_that_prints_the_date_prints_the_same_one_every_day() -> None:
    tokenizer = make_tokenizer()
    undated = tokenizer_digest(tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
    assert tokenizer.decode(prompt_ids(tokenizer, "pain", None)).startswith("01 Jan 2026<|im_start|>user")
    assert tokenizer_digest(tokenizer) != undated


@pytest.mark.parametrize(
    "opened",
    [
        "<|im_start|>assistant\n<think>\n",
        "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
    ],
)
def test_answer_comes_after_the_thoughts_that_a_template_opens(opened: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<|im_start|>assistant\n", opened)
    text = tokenizer.decode(prompt_ids(tokenizer, "pain", None))
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
