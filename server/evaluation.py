"""The server's own model: where the federation starts, how the global state does, and what is exported."""

import os
import shutil
from pathlib import Path

import torch

from common import tuning
from common.base_model import load_base
from common.config import FederationConfig
from common.digest import base_digest, tokenizer_digest
from common.evaluation import evaluate_model, generate_answers, in_fixed_order
from common.rows import Row, load_rows
from strategies.rule import Tensors


class Evaluator:
    """The base model in the server's memory.

    Args:
        config: the federation file, with absolute paths.
        source: where that file lies, for errors.

    Raises:
        ModelError: the base model cannot be used.
        DataError: the server's evaluation set cannot be used.
    """

    def __init__(self, config: FederationConfig, source: Path) -> None:
        self._config = config
        data = config.evaluation.server
        self._rows: list[Row] = load_rows(data, source) if data is not None else []
        model = config.model
        self._base = load_base(str(model.path or model.hub), model.revision, model.dtype)
        self.model_parameters = sum(p.numel() for p in self._base.model.parameters())
        self.base_digest = base_digest(self._base.model)
        self.tokenizer_digest = tokenizer_digest(self._base.tokenizer)
        self._tuned = tuning.tune(self._base.model, config.strategy, seed=config.training.seed)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tuned.model.to(self._device)

    def initial_state(self) -> Tensors:
        """The trained tensors of the base model, from which round 1 starts."""
        return self._tuned.get()

    def evaluate(self, state: Tensors) -> dict[str, float]:
        """Metrics of a state on the server's own set; empty when there is none."""
        if not self._rows:
            return {}
        self._tuned.set(state)
        return evaluate_model(
            self._tuned.model,
            self._base.tokenizer,
            self._rows,
            self._config.evaluation,
            system=self._system,
            max_length=self._config.training.max_length,
            device=self._device,
            autocast_dtype=None,
        )

    def answers(self, state: Tensors) -> list[dict[str, str]]:
        """Questions of the server's own set with the expected and the generated answer."""
        rows = in_fixed_order(self._rows)[: self._config.evaluation.samples]
        if not rows:
            return []
        self._tuned.set(state)
        generated = generate_answers(
            self._tuned.model,
            self._base.tokenizer,
            rows,
            system=self._system,
            max_length=self._config.training.max_length,
            max_new_tokens=self._config.evaluation.max_new_tokens,
            batch_size=self._config.evaluation.batch_size,
            device=self._device,
            autocast_dtype=None,
        )
        return [
            {"prompt": row.prompt, "expected": row.answer, "answer": answer}
            for row, answer in zip(rows, generated, strict=True)
        ]

    def export(self, state: Tensors, folder: Path) -> None:
        """Write the fine-tuned model with its tokenizer as ``folder``, all of it or nothing."""
        self._tuned.set(state)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            self._tuned.save(temporary)
            self._base.tokenizer.save_pretrained(temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @property
    def _system(self) -> str | None:
        return self._config.evaluation.server.system if self._config.evaluation.server is not None else None
