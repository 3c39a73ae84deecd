"""The small base models of the long runs, trained here from random weights, the same in every run of one machine."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

WIDTH, BLOCKS, HEADS = 64, 4, 4
_RATE, _BATCH, _LONGEST = 3e-3, 32, 24


def decoder(texts: list[str], template: str, folder: Path, steps: int) -> None:
    """Write a Llama that was trained to write ``texts``, with a byte-level BPE of the same texts."""
    special = ["<|end|>", "<|user|>", "<|system|>", "<|assistant|>"]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=special[0], pad_token=special[0])
    tokenizer.chat_template = template
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=BLOCKS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    rows = torch.full((len(texts), _LONGEST), -100)
    for number, text in enumerate(texts):
        tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:_LONGEST]
        rows[number, : len(tokens)] = torch.tensor(tokens)

    def loss(some: Tensor) -> Tensor:
        longest = int((some >= 0).sum(1).max())
        some = some[:, :longest]  # padding follows the text, so causal attention needs no mask
        result: Tensor = model(input_ids=some.clamp_min(0), labels=some).loss
        return result

    _train(model, loss, rows, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def vision(pixels: Tensor, folder: Path, steps: int) -> None:
    """Write a ViT that was trained to tell by how many quarters images (N, 28, 28) are turned (arXiv 1803.07728)."""
    torch.manual_seed(0)
    size = pixels.shape[-1]
    config = ViTConfig(  # type: ignore[call-arg]  # transformers takes any configuration's keys
        image_size=size,
        patch_size=size // 4,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_labels=4,
    )
    model = ViTForImageClassification(config)
    images = (pixels.float() / 255 - 0.5) / 0.5

    def loss(some: Tensor) -> Tensor:
        turned = torch.cat([torch.rot90(part, k, (1, 2)) for k, part in enumerate(some.chunk(4))])
        turns = torch.arange(4).repeat_interleave(len(some) // 4)
        result: Tensor = model(pixel_values=turned[:, None].expand(-1, 3, -1, -1), labels=turns).loss
        return result

    _train(model, loss, images, steps)
    model.vit.save_pretrained(folder)
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)


def _train(model: nn.Module, loss: Callable[[Tensor], Tensor], rows: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(rows[torch.randint(len(rows), (_BATCH,))]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
