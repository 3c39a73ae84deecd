"""A tiny random Llama with a real tokenizer, shards and the files of a federation, whose rounds take milliseconds."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TERMS = [
    f"{a} {b} of the {c}" for a in ("acute", "chronic") for b in ("pain", "swelling") for c in ("hand", "foot", "ear")
]
#: Limits of sites whose few rows are nobody's.
OF_FEW_ROWS = {"min_rows_per_update": 1, "min_held_out": 1, "score_step": 1e-6, "max_evaluations": 1000}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template, trained on a few terms."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TERMS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")  # noqa: S106
    fast.chat_template = TEMPLATE
    return fast


def make_model(folder: Path, *, seed: int = 0, layers: int = 4) -> Path:
    """Write a random Llama (about 50k parameters) with its tokenizer to ``folder``."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_shard(file: Path, rows: int, offset: int = 0) -> Path:
    """A JSONL shard with the columns term and title; ``offset`` makes shards differ."""
    lines = []
    for i in range(rows):
        term = f"{TERMS[(i + offset) % len(TERMS)]} {i + offset}"
        lines.append(json.dumps({"term": term, "title": term.replace("pain", "ache")}))
    file.write_text("\n".join(lines) + "\n")
    return file


def make_federation(folder: Path, sizes: dict[str, int], **changes: Any) -> Path:  # noqa: ANN401 - of any section
    """Write model, shards, site files and a federation file of FedFTG; return the federation file.

    Args:
        folder: where.
        sizes: rows of every site's shard, by site name.
        changes: sections or keys that replace the defaults; a mapping without a name is merged into the section.
    """
    if not (folder / "model").exists():
        make_model(folder / "model")
    offset = 0
    for site, rows in sizes.items():
        make_shard(folder / f"{site}.jsonl", rows, offset)
        offset += rows
        data = {"path": f"{site}.jsonl", "prompt": "term", "answer": "title", "held_out": 0.25}
        (folder / f"{site}.yaml").write_text(yaml.safe_dump({"name": site, "data": data, "policy": OF_FEW_ROWS}))
    make_shard(folder / "server.jsonl", 6, offset)
    config: dict[str, Any] = {
        "name": "tiny",
        "model": {"path": "model"},
        "strategy": {"name": "fedftg", "blocks": "lower half", "rank": 4, "update_proj_gap": 2, "scale": 1.0},
        "rounds": 2,
        "cohort": {"min_clients": len(sizes), "join_deadline": 120.0, "round_deadline": 120.0},
        "training": {"learning_rate": 0.01, "local_steps": 3, "batch_size": 4, "max_length": 64},
        "evaluation": {
            "max_examples": 4,
            "generate": 0,  # the scores of answers take seconds to import, in every process
            "max_new_tokens": 4,
            "samples": 2,
            "server": {"path": "server.jsonl", "prompt": "term", "answer": "title"},
        },
        "local": {"sites": [f"{site}.yaml" for site in sizes]},
    }
    for key, value in changes.items():
        merged = isinstance(value, dict) and isinstance(config.get(key), dict) and "name" not in value
        config[key] = {**config[key], **value} if merged else value
    file = folder / "federation.yaml"
    file.write_text(yaml.safe_dump(config))
    return file
